"""A tiny target and drafters of known quality for tests of decoding.

Equality of speculative and autoregressive decoding says little where every draft is rejected. `linked_target` is
random, but its first layer does most of the work, and `linked_head` builds draft heads around a copy of that layer, so
they agree with it often; `linked_lm` is a text model that is the target's with noise. `SelfDrafter` is the target
drafting for itself with noisy logits, so it agrees as often as its noise allows, at every temperature. `fitted_medusa`
heads have learnt a few answers by heart.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec import Drafter, SamplingParams, Target, TreeConfig, load_target
from jaxspec.cache import Cache
from jaxspec.demo.processor import build_processor
from jaxspec.drafters.compressor import MODES, CompressorConfig
from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.lookup import PromptLookup
from jaxspec.drafters.massv import MassvConfig, MassvDrafter
from jaxspec.drafters.medusa import MedusaConfig, MedusaHeads
from jaxspec.drafters.specvlm import SpecVLMConfig, SpecVLMHead
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.drafters.vocabulary import take_from_target
from jaxspec.kernels.masks import Mask
from jaxspec.layers import Uncommitted
from jaxspec.prompting import encode_prompt
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.sampling import Noise, choose
from jaxspec.speculation.tree import Tree, grow_tree
from jaxspec.targets.llava import Llava, LlavaConfig
from jaxspec.targets.registry import save_model
from tests.helpers import config_for, randomized


def linked_target(folder: Path, **text: int) -> Target:
    """A two-layer LLaVA with grouped query heads and the demo's processor, saved to `folder` and loaded from it; `text`
    holds more fields of its text model."""
    processor = build_processor(folder / "processor", scenes=300)
    hf_config = config_for(
        processor,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        **text,
    )
    model = randomized(Llava(LlavaConfig.from_hf(hf_config), rngs=nnx.Rngs(0)), seed=5, scale=1.0)
    language = model.language_model
    language.embed_tokens.embedding[...] *= np.sqrt(language.config.vocab_size)  # entries near 1
    language.lm_head.kernel[...] *= 4.0  # some tokens are clearly preferred
    language.layers[0].self_attn.o_proj.kernel[...] *= 2.0  # and which ones depends on everything before
    for projection in (language.layers[1].self_attn.o_proj, language.layers[1].mlp.down_proj):
        projection.kernel[...] *= 0.3
    save_model(model, hf_config, folder / "processor", folder / "target", jnp.float32)
    return load_target(folder / "target")


def linked_head(target: Target, method: str, seed: int = 1) -> EagleHead:
    """A head that runs the target's first layer on the token's embedding, with small random weights everywhere else."""
    fresh = fresh_head(target, method, seed)
    head = randomized(fresh, seed, scale=0.1)
    if method == "vispec":
        head.img_fc.kernel[...] += fresh.img_fc.kernel[...]
    if isinstance(head, SpecVLMHead):
        for mine, theirs in zip(convolutions(head), convolutions(fresh), strict=True):
            mine.kernel[...] += theirs.kernel[...]
    if method == "tapped":
        head.tap_fc.kernel[...] += fresh.tap_fc.kernel[...]
    if method == "narrow":
        take_from_target(head.draft_head, target.model, NARROW)
    width, first = target.config.text.hidden_size, target.model.language_model.layers[0]
    head.fc.kernel[...] += jnp.eye(2 * width, width)
    if head.config.input_norm:
        nnx.update(head.layers[0].input_layernorm, nnx.state(first.input_layernorm))
    nnx.update(head.layers[0].self_attn, nnx.state(first.self_attn))
    nnx.update(head.layers[0].mlp, nnx.state(first.mlp))
    return head


def random_head(target: Target, method: str = "eagle2", seed: int = 2) -> EagleHead:
    """A head that knows nothing of its target."""
    return randomized(fresh_head(target, method, seed), seed, scale=1.0)


def fresh_head(target: Target, method: str, seed: int) -> EagleHead:
    text = target.config.text.plain()
    match method:
        case "vispec":
            return ViSpecHead(ViSpecConfig(text, num_q=3), rngs=nnx.Rngs(seed))
        case _ if method in ("specvlm", *MODES):
            mode = "select" if method == "specvlm" else method
            compressor = CompressorConfig(mode, pruning_ratio=5, pooling_ratio=4, gate_hidden_size=16)
            return SpecVLMHead(SpecVLMConfig(text, compressor=compressor), rngs=nnx.Rngs(seed))
        case _:
            ours = {"tapped": {"tap_layers": (0, 1)}, "narrow": {"draft_vocab_size": NARROW.size}}
            config = EagleConfig(text, input_norm=method == "eaglevlm", **ours.get(method, {}))
            return EagleHead(config, rngs=nnx.Rngs(seed))


def convolutions(head: SpecVLMHead) -> list[nnx.Linear]:
    if "convolution" not in head.config.compressor.primitives:
        return []
    return [head.compressor.convolution.embeds, head.compressor.convolution.features]


def linked_lm(target: Target, multimodal: bool, vocab_size: int, seed: int = 4) -> MassvDrafter:
    """A text model that is the target's with noise in its matrices, cut or padded to `vocab_size` tokens; with eyes its
    projector is the target's with noise."""
    text = dataclasses.replace(target.config.text, vocab_size=vocab_size)
    config = MassvConfig(text, "llama", target.config.vision_width if multimodal else 0)
    drafter, model = MassvDrafter(config, rngs=nnx.Rngs(seed)), target.model
    pairs = [(drafter.language_model, model.language_model)]
    if multimodal:
        pairs.append((drafter.projector, model.multi_modal_projector))
    rng = np.random.default_rng(seed)

    def noisy(theirs, ours):
        size = [(0, max(0, b - a)) for a, b in zip(theirs.shape, ours.shape, strict=True)]
        theirs = jnp.pad(theirs, size)[tuple(slice(n) for n in ours.shape)]
        return theirs * (1 + 0.1 * rng.normal(size=theirs.shape)) if theirs.ndim > 1 else theirs

    for ours, theirs in pairs:
        nnx.update(ours, jax.tree.map(noisy, nnx.state(theirs), nnx.state(ours)))
    return drafter


def fitted_medusa(target: Target, heads: int = 3) -> MedusaHeads:
    """Random Medusa heads whose LM heads are fitted (least squares) to three answers of the target, at temperatures 0,
    0.7 and 1 and with the seed that tests give to the first of their requests."""
    text = target.config.text
    features, logits, first = own_answers(target, "What is a chart for?", (0.0, 0.7, 1.0), seed=11, count=32)
    drafter = MedusaHeads(MedusaConfig(text.hidden_size, text.vocab_size, heads, own_lm_heads=True), rngs=nnx.Rngs(3))
    drafter = randomized(drafter, seed=3, scale=0.3)
    for number, (block, lm_head) in enumerate(drafter.heads, 1):
        inputs = np.asarray(block(features[:, first:-number])).reshape(-1, text.hidden_size)
        outputs = np.asarray(logits[:, first + number :]).reshape(-1, text.vocab_size)
        lm_head.kernel[...] = jnp.asarray(np.linalg.lstsq(inputs, outputs)[0])
    return drafter


def own_answers(target: Target, question: str, temperatures, seed: int, count: int):
    """Features `[n, S, D]` and logits `[n, S, V]` of a question with `count` tokens of its answer at each temperature,
    and the position before the first of these. Every token takes a whole pass."""
    prompt = encode_prompt(target, question, ()).input_ids
    ids = np.zeros((len(temperatures), len(prompt) + count), np.int32)
    ids[:, : len(prompt)] = prompt
    sampling = BatchSampling.from_params([SamplingParams(temperature, seed=seed) for temperature in temperatures])

    @jax.jit
    def run(model, ids, length):
        lengths = jnp.full((len(temperatures),), length)
        features, _ = model.prefill(model.embed(ids), lengths)
        logits = model.unembed(features)
        noise = Noise(sampling.seed, lengths, logits.shape[-1])
        return features, logits, choose(logits[:, length - 1][:, None], lambda: noise.levels(0, 1), sampling)

    for length in range(len(prompt), ids.shape[1]):
        ids[:, length] = run(target.model, ids, length)[2][:, 0]
    features, logits, _ = run(target.model, ids, ids.shape[1])
    return features, logits, len(prompt) - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelfState:
    cache: Cache
    root: jax.Array  # i32 [B]


class SelfDrafter(nnx.Module):
    """The target as its own drafter. Standard normal noise times `disturbance`, the same for all tokens at a position,
    is added to its logits: the larger, the shorter the accepted paths."""

    def __init__(self, disturbance: float):
        self.disturbance = disturbance

    def prefill(self, model, context, capacity: int) -> SelfState:
        _, kv = model.prefill(context.embeds, context.lengths)
        return SelfState(Cache.of_prompt(kv, context.lengths, capacity), context.root)

    def propose(self, model, config: TreeConfig, state: SelfState, root, noise, sampling) -> Tree:
        lengths, language = state.cache.lengths, model.language_model

        def run(tokens, positions, drafted):
            own = Mask(ancestors=jnp.eye(tokens.shape[1], dtype=bool))
            features, kv = language(model.embed(tokens), positions, own, state.cache, drafted)
            return Uncommitted.level(kv, positions, drafted), self.disturb(model.unembed(features), positions)

        def expand(drafted, tokens, parent, level):
            positions = jnp.broadcast_to((lengths + 1 + level)[:, None], tokens.shape)
            return run(tokens, positions, drafted.children(parent))

        drafted, first = run(root[:, None], lengths[:, None], None)
        return grow_tree(config, root, first[:, 0], noise, sampling, expand, drafted)

    def disturb(self, logits, positions):
        draw = lambda position: jax.random.normal(jax.random.fold_in(jax.random.key(0), position), logits.shape[-1:])  # noqa: E731
        return logits + self.disturbance * jax.vmap(jax.vmap(draw))(positions)

    def advance(self, model, state: SelfState, tokens, features, count) -> SelfState:
        length = tokens.shape[1]
        nodes = jnp.concatenate([state.root[:, None], tokens[:, :-1]], axis=1)
        positions = state.cache.lengths[:, None] + jnp.arange(length)
        _, new = model.forward(model.embed(nodes), positions, Mask(causal=True), state.cache)
        last = jnp.take_along_axis(tokens, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0]
        return SelfState(
            cache=state.cache.append(new, count),
            root=jnp.where(count > 0, last, state.root),
        )


NARROW = np.flatnonzero(np.arange(640) % 4 > 0).astype(np.int32)
"""The draft vocabulary of the head "narrow": three quarters of the target's."""
TREE = TreeConfig(depth=2, top_k=3, total_tokens=10)
DRAFTERS = {
    "eagle2": lambda target: Drafter(linked_head(target, "eagle2"), TREE, "eagle2", {}),
    "vispec": lambda target: Drafter(linked_head(target, "vispec"), TREE, "vispec", {}),
    "eaglevlm": lambda target: Drafter(linked_head(target, "eaglevlm"), TREE, "eaglevlm", {}),
    "specvlm": lambda target: Drafter(linked_head(target, "specvlm"), TREE, "specvlm", {}),
    "tapped": lambda target: Drafter(linked_head(target, "tapped"), TREE, "eagle2", {}),
    "narrow": lambda target: Drafter(linked_head(target, "narrow"), TREE, "eagle2", {}),
    "chain": lambda target: Drafter(linked_head(target, "eagle2"), TreeConfig.chain(3), "eagle2", {}),
    "random": lambda target: Drafter(random_head(target), TREE, "eagle2", {}),
    "massv": lambda target: Drafter(linked_lm(target, True, 643), TREE, "massv", {}),
    "text_lm": lambda target: Drafter(linked_lm(target, False, 633), TreeConfig.chain(4), "massv", {}),
    "self": lambda target: Drafter(SelfDrafter(1.0), TreeConfig(2, 2, 8), "self", {}),
    "medusa": lambda target: Drafter(fitted_medusa(target), TREE, "medusa", {}),
    "lookup": lambda target: Drafter(PromptLookup(), TreeConfig.chain(4), "lookup", {}),
}
