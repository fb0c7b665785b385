"""MASSV (arXiv 2505.10526): a small text model of the target's family as its drafter, with eyes or without.

The drafter runs over the target's tokens with an embedding, a head and a cache of its own. At image tokens it reads
what the target's vision tower saw, which is computed once for both, through a projector of its own. Without a projector
it is the text-only drafter that MASSV is compared with: image tokens are left out of its sequence.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

from jaxspec.cache import Cache, LayerKV
from jaxspec.checkpoints.names import NameTable
from jaxspec.checkpoints.tensors import read_json
from jaxspec.drafters.contract import DrafterContext, Method
from jaxspec.kernels.masks import Mask
from jaxspec.layers import LanguageModel, TextConfig, Uncommitted
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.sampling import Noise
from jaxspec.speculation.tree import Tree, TreeConfig, grow_tree
from jaxspec.splitting import by_vocabulary
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel
from jaxspec.targets.llava import Projector
from jaxspec.targets.registry import FAMILIES
from jaxspec.targets.text import TextModel, TextTargetConfig, published_text_config

TEXT_MODELS = tuple(name for name, family in FAMILIES.items() if family.model is TextModel)


@dataclasses.dataclass(frozen=True)
class MassvConfig:
    """A text model, and how wide the target's vision features are: 0 for a drafter that reads text only."""

    text: TextConfig
    model_type: str = "llama"
    vision_width: int = 0

    @property
    def multimodal(self) -> bool:
        return self.vision_width > 0


class DraftSequence(NamedTuple):
    """Prompts as the drafter reads them: the first `lengths` of L entries are in use, at positions 0, 1, .."""

    embeds: jax.Array  # [B, L, D]
    places: jax.Array  # i32 [B, L], where the entry stands in the target's sequence
    lengths: jax.Array  # i32 [B]

    @property
    def valid(self) -> jax.Array:
        """Bool `[B, L]`."""
        return jnp.arange(self.embeds.shape[1]) < self.lengths[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MassvState:
    cache: Cache  # prompt and output up to and with the root
    output: jax.Array  # [B, D], the text model's feature at the root: says what follows it


class MassvDrafter(nnx.Module):
    def __init__(self, config: MassvConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.text.hidden_size
        self.projector = Projector(config.vision_width, width, bias=True, rngs=rngs) if config.multimodal else None
        self.language_model = LanguageModel(config.text, rngs=rngs)

    @property
    def reads_vision(self) -> bool:
        return self.config.multimodal

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Embeddings `[.., D]` of the target's ids `[..]`; its vocabulary may be padded further than the drafter's."""
        return self.language_model.embed(jnp.minimum(input_ids, self.config.text.vocab_size - 1))

    def unembed(self, features: jax.Array, vocab_size: int) -> jax.Array:
        """Logits f32 `[.., V]` over the target's vocabulary, -inf where the drafter has no token."""
        logits = self.language_model.unembed(features)[..., :vocab_size]
        missing = vocab_size - logits.shape[-1]
        return by_vocabulary(jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf))

    def sequence(self, context: DrafterContext) -> DraftSequence:
        """The target's sequence with projected features at image tokens, or without these tokens."""
        ids, lengths = context.input_ids, context.lengths
        places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        if context.max_images == 0:
            return DraftSequence(self.embed(ids), places, lengths)
        is_image = context.image_ids >= 0
        if self.projector is not None:
            assert context.vision is not None and context.vision_index is not None  # there are images
            with jax.named_scope("draft_projector"):
                table = self.projector(context.vision)  # [R, D]
            embeds = jnp.where(is_image[..., None], table[context.vision_index], self.embed(ids))
            return DraftSequence(embeds, places, lengths)
        # Text moves up, in order.
        kept = (places < lengths[:, None]) & ~is_image
        places = jnp.argsort(~kept, axis=1, stable=True)[:, : ids.shape[1] - context.min_image_tokens]
        return DraftSequence(self.embed(jnp.take_along_axis(ids, places, axis=1)), places, kept.sum(axis=1))

    def forward(self, sequence: DraftSequence) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """Features `[B, L, D]` of whole sequences, and keys and values per layer."""
        positions = jnp.broadcast_to(jnp.arange(sequence.places.shape[1]), sequence.places.shape)
        return self.language_model(sequence.embeds, positions, Mask(sequence.lengths, causal=True))

    # -- decoding (jaxspec.drafters.contract.DraftModel) ---------------------------------------------------------

    def prefill(self, model: VisionLanguageModel, context: DrafterContext, capacity: int) -> MassvState:
        sequence = self.sequence(with_root(context))
        features, new_kv = self.forward(sequence)
        last = jnp.take_along_axis(features, (sequence.lengths - 1)[:, None, None], axis=1)[:, 0]
        # With the root there may be one entry more than the cache has room for, but never one more in use.
        cut = [LayerKV(*(part[:, :, :capacity] for part in kv)) for kv in new_kv]
        return MassvState(Cache.of_prompt(cut, sequence.lengths, capacity), last)

    def propose(
        self,
        model: VisionLanguageModel,
        config: TreeConfig,
        state: MassvState,
        root: jax.Array,
        noise: Noise,
        sampling: BatchSampling,
    ) -> Tree:
        vocab_size = model.vocab_size
        own = Mask(ancestors=jnp.eye(config.top_k, dtype=bool))

        def expand(drafted, tokens, parent, level):
            drafted = None if drafted is None else drafted.children(parent)
            positions = jnp.broadcast_to((state.cache.lengths + level)[:, None], tokens.shape)
            features, kv = self.language_model(self.embed(tokens), positions, own, state.cache, drafted)
            return Uncommitted.level(kv, positions, drafted), self.unembed(features, vocab_size)

        first = self.unembed(state.output, vocab_size)
        return grow_tree(config, root, first, noise, sampling, expand, None)

    def advance(
        self,
        model: VisionLanguageModel,
        state: MassvState,
        tokens: jax.Array,
        features: jax.Array,
        count: jax.Array,
    ) -> MassvState:
        steps = jnp.arange(tokens.shape[1])
        positions = state.cache.lengths[:, None] + steps
        output, new_kv = self.language_model(self.embed(tokens), positions, Mask(count, causal=True), state.cache)
        last = jnp.take_along_axis(output, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return MassvState(
            cache=state.cache.append(new_kv, count),
            output=jnp.where((count > 0)[:, None], last, state.output),
        )


def with_root(context: DrafterContext) -> DrafterContext:
    """The prompt with the root as its last token, in what the drafter reads of it."""

    def longer(x, value):
        return jnp.pad(x, ((0, 0), (0, 1)), constant_values=value)

    batch = jnp.arange(context.lengths.shape[0])
    return dataclasses.replace(
        context,
        input_ids=longer(context.input_ids, 0).at[batch, context.lengths].set(context.root),
        image_ids=longer(context.image_ids, -1),
        vision_index=None if context.vision_index is None else longer(context.vision_index, 0),
        lengths=context.lengths + 1,
    )


def read_massv_config(raw: dict) -> MassvConfig:
    model_type = raw.get("model_type")
    if model_type not in TEXT_MODELS:
        raise ValueError(f"text model_type {model_type!r} is not supported as a drafter; only {', '.join(TEXT_MODELS)}")
    hf_config = transformers.CONFIG_MAPPING[model_type].from_dict(raw)
    return MassvConfig(TextTargetConfig.from_hf(hf_config).text, model_type, raw.get("vision_width", 0))


def write_massv_config(config: MassvConfig) -> dict:
    """The text model's own config.json, and `vision_width`."""
    hf_config = published_text_config(config.text, config.model_type)
    hf_config.architectures = [FAMILIES[config.model_type].architecture]
    return hf_config.to_dict() | {"vision_width": config.vision_width}


def massv_misfits(config: MassvConfig, target_config: TargetConfig) -> list[str]:
    """Both must have the same tokenizer (`check_tokenizer`); what configs tell of it are the sizes of the vocabularies,
    which are padded differently within a family (Qwen2.5: 151936 and 152064; Gemma3: 262144 and 262208)."""
    misfits = []
    if config.multimodal and config.vision_width != target_config.vision_width:
        misfits.append(f"vision_width {config.vision_width} (target: {target_config.vision_width})")
    ours, theirs = config.text.vocab_size, target_config.text.vocab_size
    if abs(ours - theirs) > max(64, theirs // 100):
        misfits.append(f"vocab_size {ours} (target: {theirs}, more than padding explains)")
    return misfits


def check_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Raises ValueError where the tokenizer.json of a text model's folder is not of the target's `tokenizer` (one of
    transformers'), naming the first token that differs. Without that file, or a vocabulary in it, nothing is judged.

    Compared are the ids that both have, without added tokens: marks of images, roles and padding differ within a
    family, and a draft that holds one of them is only rejected.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return
    raw = read_json(path)
    vocabulary = raw.get("model", {}).get("vocab")
    if not vocabulary:
        return
    if isinstance(vocabulary, list):  # Unigram: pairs of token and score
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    added = {token["id"] for token in raw.get("added_tokens", ())} | set(tokenizer.get_added_vocab().values())
    ours, theirs = ({index: token for token, index in each.items()} for each in (vocabulary, tokenizer.get_vocab()))
    common = (ours.keys() & theirs.keys()) - added
    first = min((index for index in common if ours[index] != theirs[index]), default=None)
    if first is not None:
        raise ValueError(
            f"drafter {folder} has another tokenizer than the target: its token {first} is {ours[first]!r}, the "
            f"target's is {theirs[first]!r}"
        )


MASSV = Method(
    title="MASSV",
    module=MassvDrafter,
    read_config=read_massv_config,
    write_config=write_massv_config,
    tree=TreeConfig.chain(5),  # arXiv 2505.10526
    misfits=massv_misfits,
    check_folder=check_tokenizer,
    # Our own layout: the text model as it is published, under `language_model.`, beside `projector.*`. The aliases read
    # the text model's own folder.
    names=NameTable(
        prefixes={"language_model.lm_head.": "language_model.lm_head.", "language_model.": "language_model.model."},
        aliases=((r"model\.", "language_model.model."), (r"lm_head\.", "language_model.lm_head.")),
        ignored=(r".*\.rotary_emb\.inv_freq",),
    ),
)
