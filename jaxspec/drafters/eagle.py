"""EAGLE-2's draft head (arXiv 2401.15077, 2406.16858): one decoder layer on token embeddings and target features.

At entry i of its sequence the head reads `fc([embedding of token i+1 ; feature of position i])` and predicts the
feature of position i+1; the target's LM head turns that into the distribution of token i+2. ViSpec (vispec.py) and
SpecVLM (specvlm.py) change how the entries of a prompt are made and what stands beside a feature; everything else is
here. EagleVLM (arXiv 2509.11815, SpecVLM's baseline) is this head with an input norm in its layer; like EAGLE-2 it sees
every image token.
"""

import dataclasses
from typing import Generic, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.cache import Cache, LayerKV
from jaxspec.checkpoints.configs import llama_text_config, published_rope, published_text_fields
from jaxspec.drafters.contract import DrafterContext, Method, size_misfits
from jaxspec.drafters.sequence import HeadInputs
from jaxspec.drafters.vocabulary import DraftHead, take_from_target
from jaxspec.kernels.masks import Mask
from jaxspec.layers import DecoderLayer, TextConfig, Uncommitted, linear, segments_before
from jaxspec.rope import rope_tables
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.sampling import Noise
from jaxspec.speculation.tree import Tree, TreeConfig, grow_tree
from jaxspec.targets.contract import TargetConfig, VisionLanguageModel


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """A head for a target with `text.hidden_size` and `text.vocab_size`; `text` describes its one layer."""

    text: TextConfig
    qkv_bias: bool = False
    input_norm: bool = False
    fc_bias: bool = True
    tap_layers: tuple[int, ...] = ()
    """Layers of the target whose outputs the head reads beside the final features (0: embeddings, i: layer i)."""
    draft_vocab_size: int | None = None
    """Tokens that the head drafts, with an LM head of its own (jaxspec.drafters.vocabulary); None: the target's."""

    def __post_init__(self) -> None:
        # A Llama layer, as published, whatever the target's layers are.
        object.__setattr__(self, "text", self.text.plain(self.text.num_layers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EagleState:
    cache: Cache  # of one layer, over the head's own sequence
    next_position: jax.Array  # i32 [B], position of the next entry
    output: jax.Array  # [B, D], head output at the last entry: predicts the feature of the root
    global_feature: jax.Array | None  # [B, D]


Config = TypeVar("Config", bound=EagleConfig, covariant=True)


class EagleHead(nnx.Module, Generic[Config]):
    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width = config.text.hidden_size
        self.fc = linear(2 * width, width, bias=config.fc_bias, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config.text, input_norm=config.input_norm, qkv_bias=config.qkv_bias, rngs=rngs)]
        )
        if config.tap_layers:
            taps = len(config.tap_layers)
            self.tap_fc = linear((taps + 1) * width, width, bias=False, rngs=rngs)
            # [0 | I]: training starts from the head that reads the final features only.
            self.tap_fc.kernel[...] = jnp.eye((taps + 1) * width, width, k=-taps * width)
        if config.draft_vocab_size is not None:
            self.draft_head = DraftHead(width, config.draft_vocab_size, rngs=rngs)

    @property
    def tap_layers(self) -> tuple[int, ...]:
        return self.config.tap_layers

    def check_tree(self, tree: TreeConfig) -> None:
        """Raises ValueError where the head drafts fewer tokens than a node has children."""
        if self.config.draft_vocab_size is not None:
            tree.check_vocabulary(self.config.draft_vocab_size)

    def narrowed(self, model: VisionLanguageModel, ids: np.ndarray) -> Self:
        """The head drafting only the tokens `ids` i32 `[Vd]`, with the target's LM head of these as its own (FR-Spec,
        arXiv 2502.14856). Nothing is trained; all other parameters are this head's.

        Raises ValueError for a head with a draft vocabulary of its own.
        """
        if self.config.draft_vocab_size is not None:
            raise ValueError(f"the drafter has a draft vocabulary already, of {self.config.draft_vocab_size} tokens")
        head = nnx.merge(*nnx.split(self))
        head.config = dataclasses.replace(self.config, draft_vocab_size=len(ids))
        head.draft_head = DraftHead(self.config.text.hidden_size, len(ids), rngs=nnx.Rngs(0))
        take_from_target(head.draft_head, model, ids)
        dtype = self.layers[0].post_attention_layernorm.scale.dtype
        head.draft_head.kernel = nnx.Param(head.draft_head.kernel[...].astype(dtype))
        return head

    # -- the head ------------------------------------------------------------------------------------------------

    def combine(self, embeds: jax.Array, features: jax.Array, global_features: jax.Array | None) -> jax.Array:
        """Layer input `[B, N, D]`."""
        del global_features
        return self.fc(jnp.concatenate([embeds, features], axis=-1))

    def observe(self, features: jax.Array) -> jax.Array:
        """What the head reads `[.., D]` of the target's features `[.., (T + 1) * D]` (EAGLE-3's fusion of layers, arXiv
        2503.01840, in front of an EAGLE-2 head)."""
        return self.tap_fc(features) if self.tap_layers else features

    @property
    def draft_ids(self) -> jax.Array | None:
        """Which tokens the head's logits are of, i32 `[Vd]`; None where of all."""
        return None if self.config.draft_vocab_size is None else self.draft_head.ids[...]

    def logits(self, model: VisionLanguageModel, output: jax.Array) -> jax.Array:
        """Of the head's output `[.., D]`: `[.., V]` or `[.., Vd]`."""
        return model.unembed(output) if self.config.draft_vocab_size is None else self.draft_head(output)

    def run(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
        drafted: Uncommitted | None = None,
    ) -> tuple[jax.Array, LayerKV]:
        """The decoder layer on inputs `[B, N, D]`."""
        text = self.config.text
        past = segments_before(0, cache, drafted, positions)
        return self.layers[0](x, rope_tables(text.rope, text.head_dim, positions), mask, past)

    def forward(self, inputs: HeadInputs, features: jax.Array | None = None) -> tuple[jax.Array, LayerKV]:
        """Teacher-forced pass over whole sequences: output `[B, L, D]`, entry i predicting the next one's feature.

        `features` replaces `inputs.features`: the head's own earlier outputs, in multi-step training.
        """
        x = self.combine(inputs.embeds, inputs.features if features is None else features, inputs.global_features)
        if inputs.direct is not None:
            assert inputs.is_direct is not None  # it comes with `direct`
            x = jnp.where(inputs.is_direct[..., None], inputs.direct, x)
        return self.run(x, inputs.positions, Mask(inputs.count, causal=True))

    def inputs_of(self, context: DrafterContext, next_embeds: jax.Array, key: jax.Array | None = None) -> HeadInputs:
        """The sequence of a prompt; `next_embeds` `[B, S, D]` are its embeddings shifted by one. A `key` says that the
        head is in training, where a method may draw how it makes its entries."""
        positions = jnp.broadcast_to(jnp.arange(next_embeds.shape[1]), next_embeds.shape[:2])
        return HeadInputs(next_embeds, self.observe(context.features), positions, positions < context.lengths[:, None])

    def final_global_feature(self, inputs: HeadInputs, last: jax.Array) -> jax.Array | None:
        """What decoding steps set beside their features; `last` i32 `[B]` is the last entry."""
        return None

    # -- decoding (jaxspec.drafters.contract.DraftModel) ---------------------------------------------------------

    def prefill(self, model: VisionLanguageModel, context: DrafterContext, capacity: int) -> EagleState:
        batch = jnp.arange(context.lengths.shape[0])
        next_embeds = jnp.roll(context.embeds, -1, axis=1)
        next_embeds = next_embeds.at[batch, context.lengths - 1].set(model.embed(context.root[:, None])[:, 0])
        inputs = self.inputs_of(context, next_embeds)
        output, kv = self.forward(inputs)
        count = inputs.count
        return EagleState(
            cache=Cache.of_prompt([kv], count, capacity),
            next_position=context.lengths,
            output=output[batch, count - 1],
            global_feature=self.final_global_feature(inputs, count - 1),
        )

    def propose(
        self,
        model: VisionLanguageModel,
        config: TreeConfig,
        state: EagleState,
        root: jax.Array,
        noise: Noise,
        sampling: BatchSampling,
    ) -> Tree:
        own = Mask(ancestors=jnp.eye(config.top_k, dtype=bool))

        def expand(carry, tokens, parent, level):
            outputs, drafted = carry  # outputs [B, k, D] of the level before, and all levels so far
            features = jnp.take_along_axis(outputs, parent[..., None], axis=1)
            x = self.step_inputs(model, tokens, features, state)
            drafted = None if drafted is None else drafted.children(parent)
            positions = jnp.broadcast_to((state.next_position + level)[:, None], tokens.shape)
            outputs, kv = self.run(x, positions, own, state.cache, drafted)
            return (outputs, Uncommitted.level([kv], positions, drafted)), self.logits(model, outputs)

        first, carry = self.logits(model, state.output), (state.output[:, None], None)
        return grow_tree(config, root, first, noise, sampling, expand, carry, self.draft_ids)

    def advance(
        self,
        model: VisionLanguageModel,
        state: EagleState,
        tokens: jax.Array,
        features: jax.Array,
        count: jax.Array,
    ) -> EagleState:
        length = tokens.shape[1]
        steps = jnp.arange(length)
        x = self.step_inputs(model, tokens, self.observe(features), state)
        positions = state.next_position[:, None] + steps
        output, kv = self.run(x, positions, Mask(count, causal=True), state.cache)
        last = jnp.take_along_axis(output, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
        return dataclasses.replace(
            state,
            cache=state.cache.append([kv], count),
            next_position=state.next_position + count,
            output=jnp.where((count > 0)[:, None], last, state.output),
        )

    def step_inputs(
        self, model: VisionLanguageModel, tokens: jax.Array, features: jax.Array, state: EagleState
    ) -> jax.Array:
        """Layer inputs `[B, N, D]` of text tokens after the prompt."""
        beside = state.global_feature
        beside = None if beside is None else jnp.broadcast_to(beside[:, None], features.shape)
        return self.combine(model.embed(tokens), features, beside)


def read_eagle_fields(raw: dict) -> dict:
    """Fields of an `EagleConfig` from the Llama-style config.json of published heads."""
    layers = raw.get("num_hidden_layers", 1)
    if layers != 1:
        raise ValueError(f"a draft head has 1 layer, config.json says {layers}")
    from transformers import LlamaConfig  # loads slowly, and a head that is at hand needs none of it

    text = llama_text_config(LlamaConfig.from_dict({**raw, "model_type": "llama"}))
    return {
        "text": text,
        "qkv_bias": raw.get("qkv_bias", False),
        "input_norm": raw.get("input_norm", False),
        "fc_bias": raw.get("bias", True),
        "tap_layers": tuple(raw.get("tap_layers", ())),
        "draft_vocab_size": raw.get("draft_vocab_size"),
    }


def write_eagle_config(config: EagleConfig) -> dict:
    """The inverse, in the layout of published heads."""
    from transformers import LlamaConfig

    text = config.text
    llama = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        **published_text_fields(text) | {"num_hidden_layers": 1},
        rope_parameters=published_rope(text.rope),
    )
    ours = {"input_norm": True} if config.input_norm else {}
    ours |= {"tap_layers": list(config.tap_layers)} if config.tap_layers else {}
    ours |= {"draft_vocab_size": config.draft_vocab_size} if config.draft_vocab_size is not None else {}
    return llama.to_dict() | {"num_q": 0, "qkv_bias": config.qkv_bias, "bias": config.fc_bias} | ours


def eagle_misfits(config: EagleConfig, target_config: TargetConfig) -> list[str]:
    """The head shares the target's embedding and LM head."""
    layers, vocabulary = target_config.text.num_layers, target_config.text.vocab_size
    problems = [f"tap layer {each} (the target has {layers})" for each in config.tap_layers if not 0 <= each <= layers]
    if (config.draft_vocab_size or 0) > vocabulary:
        problems.append(f"draft_vocab_size {config.draft_vocab_size} (target: {vocabulary})")
    return problems + size_misfits(config.text, target_config)


EAGLE2 = Method(
    title="EAGLE-2",
    module=EagleHead,
    read_config=lambda raw: EagleConfig(**read_eagle_fields(raw)),
    write_config=write_eagle_config,
    tree=TreeConfig(5, 10, 60),  # arXiv 2406.16858
    misfits=eagle_misfits,
    copies_embedding=True,
)
EAGLEVLM = dataclasses.replace(EAGLE2, title="EagleVLM", tree=TreeConfig(7, 10, 60))  # arXiv 2509.11815
