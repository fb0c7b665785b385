"""The parts every model here is made of: norms, the decoder layer and the loop over layers.

Modules hold parameters and nothing else; caches and masks are arguments. One decoder layer and one loop serve all text
models, whose `TextConfig` says what their layers have, and with `input_norm=False` the EAGLE / ViSpec draft heads.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.cache import Cache, LayerKV
from jaxspec.kernels.attention import Segment, attend
from jaxspec.kernels.masks import Mask
from jaxspec.quantization import product
from jaxspec.rope import RopeConfig, apply_rope, rope_tables
from jaxspec.splitting import BATCH, TENSOR, by_rows, by_vocabulary, constrained, kv_copies, summed


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What the layers of one model differ by."""

    rope: RopeConfig
    window: int | None = None
    """How far back the layer sees, itself included; None for all the way."""


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A decoder: Llama's where nothing else is said."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False
    max_position_embeddings: int = 4096
    layer_kinds: tuple[LayerKind, ...] = ()
    """One for each layer; empty where all have `rope` and see everything."""
    qk_norm: bool = False
    """Queries and keys are normed, head by head (Qwen3, Gemma3)."""
    post_norms: bool = False
    """What attention and MLP add is normed, too (Gemma3)."""
    norms_from_one: bool = False
    """Weights of norms count from 1 and multiply in float32 (Gemma3)."""
    activation: str = "silu"
    query_scale: float | None = None
    """Factor of the attention scores; None for `head_dim**-0.5`."""
    embedding_scale: float = 1.0
    """Factor of the token embeddings."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"{len(self.layer_kinds)} layer_kinds are given for {self.num_layers} layers")
        if any(kind.window is not None and kind.rope.mrope_section for kind in self.layer_kinds):
            raise ValueError("a layer with a window cannot have multimodal rope, whose positions are no places")

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        return self.layer_kinds or (LayerKind(self.rope),) * self.num_layers

    def plain(self, num_layers: int = 1) -> "TextConfig":
        """Llama layers of the same sizes: what draft heads are made of, whatever the target's layers are."""
        return dataclasses.replace(
            self,
            num_layers=num_layers,
            layer_kinds=(),
            qk_norm=False,
            post_norms=False,
            norms_from_one=False,
            activation="silu",
            query_scale=None,
            embedding_scale=1.0,
        )


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class RMSNorm(nnx.Module):
    """Root-mean-square norm; `from_one` as `TextConfig.norms_from_one`."""

    def __init__(self, features: int, epsilon: float, *, from_one: bool = False, rngs: nnx.Rngs) -> None:
        del rngs
        self.scale = nnx.Param(jnp.zeros((features,)) if from_one else jnp.ones((features,)))
        self.epsilon, self.from_one = epsilon, from_one

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        if self.from_one:
            return (x32 * (1.0 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return x32.astype(x.dtype) * self.scale[...]


class Embed(nnx.Module):
    """A table of vectors, in whatever dtype it is filled with. (`nnx.Embed` keeps the one that it was built in: built
    abstractly in float32, it makes float32 of a bfloat16 table at every call.) One that `unembeds` is the LM head, too,
    and may be int8 (jaxspec.quantization)."""

    embedding_scale: nnx.Param | None = None  # f32 [V, 1]

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: nnx.Initializer = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
        unembeds: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.embedding = nnx.Param(embedding_init(rngs.params(), (num_embeddings, features)))
        self.unembeds = unembeds

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Vectors `[.., D]` of integer ids `[..]`, float32 where the table is int8."""
        vectors = jnp.take(self.embedding[...], ids, axis=0)
        return vectors if self.embedding_scale is None else vectors * jnp.take(self.embedding_scale[...], ids, axis=0)

    @property
    def table(self) -> jax.Array:
        """All vectors `[V, D]`, float32 where they are int8."""
        return self.embedding[...] if self.embedding_scale is None else self.embedding[...] * self.embedding_scale[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 `[.., V]` of `[.., D]`."""
        return product(hidden, self.embedding[...].T, self.embedding_scale)


class Linear(nnx.Linear):
    """Flax's, whose kernel may be int8 (jaxspec.quantization)."""

    kernel_scale: nnx.Param | None = None  # f32 [1, features out]

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """`[.., features out]` of `[.., features in]`."""
        if self.kernel_scale is None:
            return super().__call__(inputs, out_sharding)
        outputs = product(inputs, self.kernel[...], self.kernel_scale).astype(inputs.dtype)
        return outputs if self.bias is None else outputs + self.bias[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 of an LM head, which has no bias."""
        return product(hidden, self.kernel[...], self.kernel_scale)


def linear(features_in: int, features_out: int, *, bias: bool, rngs: nnx.Rngs, zero: bool = False) -> Linear:
    """A linear layer, initialised at fan-in scale, or at zero where its output is added to a residual stream (a fresh
    layer is then the identity, which small models trained from scratch learn faster from)."""
    init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    return Linear(features_in, features_out, use_bias=bias, kernel_init=init, rngs=rngs)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TextConfig, *, qkv_bias: bool, output_bias: bool, rngs: nnx.Rngs) -> None:
        query_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query_width, bias=qkv_bias, rngs=rngs)
        self.k_proj = linear(config.hidden_size, kv_width, bias=qkv_bias, rngs=rngs)
        self.v_proj = linear(config.hidden_size, kv_width, bias=qkv_bias, rngs=rngs)
        self.o_proj = linear(query_width, config.hidden_size, bias=output_bias, rngs=rngs, zero=True)
        self.q_norm = text_norm(config, config.head_dim, rngs) if config.qk_norm else None
        self.k_norm = text_norm(config, config.head_dim, rngs) if config.qk_norm else None
        self.head_dim, self.scale = config.head_dim, config.query_scale

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: Mask, past: Sequence[Segment]
    ) -> tuple[jax.Array, LayerKV]:
        """As of `DecoderLayer`."""
        batch, length, _ = x.shape
        # Seen through to the heads, XLA wants kernels transposed on TPU: a copy of them at every call that decodes.
        projected = jax.lax.optimization_barrier((self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        query, key, value = (part.reshape(batch, length, -1, self.head_dim) for part in projected)  # [B, N, H, Dh]
        query = apply_rope(query if self.q_norm is None else self.q_norm(query), rope)
        key = apply_rope(key if self.k_norm is None else self.k_norm(key), rope)
        if (copies := kv_copies(query.shape[2], key.shape[2])) > 1:
            key, value = (jnp.repeat(part, copies, axis=2) for part in (key, value))
        query, key, value = (
            constrained(part.swapaxes(1, 2), BATCH, TENSOR) for part in (query, key, value)
        )  # [B, H, N, Dh]
        new = LayerKV(key, value)
        out = attend(query, [*past, Segment(new, mask)], self.scale)  # [B, H, N, Dh]
        return summed(self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))), new


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, width: int, inner: int, *, bias: bool, activation: str = "silu", rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.gate_proj = linear(width, inner, bias=bias, rngs=rngs)
        self.up_proj = linear(width, inner, bias=bias, rngs=rngs)
        self.down_proj = linear(inner, width, bias=bias, rngs=rngs, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return summed(self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x)))


def text_norm(config: TextConfig, features: int, rngs: nnx.Rngs) -> RMSNorm:
    """A norm as the model's are."""
    return RMSNorm(features, config.rms_norm_eps, from_one=config.norms_from_one, rngs=rngs)


class DecoderLayer(nnx.Module):
    """One pre-norm layer. `input_norm=False` is EAGLE's draft layer (arXiv 2401.15077, published code)."""

    def __init__(
        self, config: TextConfig, *, input_norm: bool = True, qkv_bias: bool | None = None, rngs: nnx.Rngs
    ) -> None:
        width = config.hidden_size
        self.input_layernorm = text_norm(config, width, rngs) if input_norm else None
        self.self_attn = SelfAttention(
            config,
            qkv_bias=config.attention_bias or config.qkv_bias if qkv_bias is None else qkv_bias,
            output_bias=config.attention_bias,
            rngs=rngs,
        )
        # As published: before the MLP in Llama, behind attention in layers that have norms there.
        self.post_attention_layernorm = text_norm(config, width, rngs)
        self.pre_feedforward_layernorm = text_norm(config, width, rngs) if config.post_norms else None
        self.post_feedforward_layernorm = text_norm(config, width, rngs) if config.post_norms else None
        self.mlp = GatedMLP(
            width, config.intermediate_size, bias=config.mlp_bias, activation=config.activation, rngs=rngs
        )

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: Mask,
        past: Sequence[Segment] = (),
    ) -> tuple[jax.Array, LayerKV]:
        """`x` `[B, N, D]`, `mask` among the new tokens, `past` what they see beside each other. Returns the output
        `[B, N, D]` and the new tokens' keys and values."""
        x = by_rows(x)
        attended, kv = self.self_attn(x if self.input_layernorm is None else self.input_layernorm(x), rope, mask, past)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x)), kv
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), kv


class Uncommitted(NamedTuple):
    """Tokens that come after those of a cache and are not written to it: the levels of a tree that grows."""

    kv: tuple[LayerKV, ...]  # per layer, [B, Hkv, T, Dh]
    ancestors: jax.Array  # bool [B, N, T], which of them each new token sees
    position_ids: jax.Array  # i32 [B, T]

    @classmethod
    def level(cls, kv: Sequence[LayerKV], position_ids: jax.Array, before: "Uncommitted | None") -> "Uncommitted":
        """The levels `before` and the next one, of k tokens at `position_ids` i32 `[B, k]` that see those of `before`
        which its ancestors say, and each itself."""
        batch, count = position_ids.shape
        own = jnp.broadcast_to(jnp.eye(count, dtype=bool), (batch, count, count))
        if before is None:
            return cls(tuple(kv), own, position_ids)
        pairs = (zip(*layers, strict=True) for layers in zip(before.kv, kv, strict=True))
        return cls(
            tuple(LayerKV(*(jnp.concatenate(pair, axis=2) for pair in layer)) for layer in pairs),
            jnp.concatenate([before.ancestors, own], axis=2),
            jnp.concatenate([before.position_ids, position_ids], axis=1),
        )

    def children(self, parent: jax.Array) -> "Uncommitted":
        """As the children of nodes see it, `parent` i32 `[B, N]` of the last level: what their parents saw."""
        return self._replace(ancestors=jnp.take_along_axis(self.ancestors, parent[..., None], axis=1))


def segments_before(
    index: int,
    cache: Cache | None,
    drafted: Uncommitted | None,
    position_ids: jax.Array,
    window: int | None = None,
) -> list[Segment]:
    """What new tokens at `position_ids` i32 `[B, N]` attend to beside each other in the layer of that index."""
    past, places, drafts = [], None, None
    if window is not None:  # the j-th key of a cache has position j
        places, drafts = position_ids, None if drafted is None else drafted.position_ids
    if cache is not None:
        past.append(Segment(cache.layers[index], Mask(cache.lengths, places, window=window)))
    if drafted is not None:
        mask = Mask(query_places=places, key_places=drafts, ancestors=drafted.ancestors, window=window)
        past.append(Segment(drafted.kv[index], mask))
    return past


class LanguageModel(nnx.Module):
    """Token embedding, decoder layers, final norm, LM head."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        init = nnx.initializers.normal(0.3)
        tied, sizes = config.tie_word_embeddings, (config.vocab_size, config.hidden_size)
        self.embed_tokens = Embed(*sizes, embedding_init=init, unembeds=tied, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = text_norm(config, config.hidden_size, rngs)
        self.lm_head = None if tied else linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self,
        embeds: jax.Array,
        position_ids: jax.Array,
        mask: Mask,
        cache: Cache | None = None,
        drafted: Uncommitted | None = None,
        tap_layers: Sequence[int] = (),
        additions: Mapping[int, jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """New tokens over a cache.

        Args:
          embeds: `[B, N, D]`.
          position_ids: i32 `[B, N]`, or `[3, B, N]` for multimodal rope. Windows count them.
          mask: who sees whom among the new tokens.
          cache: what is behind them; every token sees all that is filled, but for windows.
          drafted: tokens between the cache and them.
          tap_layers: whose outputs stand before the final features (0: the embeddings, i: the i-th layer).
          additions: `[B, N, D]` to be added to the output of the layer of that index (Qwen3-VL's DeepStack).

        Returns features `[B, N, (T + 1) * D]`, the outputs of the T `tap_layers` before that of the final norm, and one
        new `LayerKV` per layer.
        """
        kinds = self.config.kinds
        each = dict.fromkeys(kind.rope for kind in kinds)  # in an order that is the same in every process
        ropes = {rope: rope_tables(rope, self.config.head_dim, position_ids) for rope in each}
        states, new_kv = [embeds], []
        for index, (layer, kind) in enumerate(zip(self.layers, kinds, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                own = mask
                if kind.window is not None:
                    own = dataclasses.replace(
                        mask, query_places=position_ids, key_places=position_ids, window=kind.window
                    )
                past = segments_before(index, cache, drafted, position_ids, kind.window)
                x, kv = layer(states[-1], ropes[kind.rope], own, past)
                if additions is not None and index in additions:
                    x = x + additions[index]
            states.append(x)
            new_kv.append(kv)
        features = [*(states[layer] for layer in tap_layers), self.norm(states[-1])]
        return jnp.concatenate(features, axis=-1), tuple(new_kv)

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations, and of parameters that are not int8."""
        return self.norm.scale.dtype

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Embeddings `[.., D]` of ids `[..]`."""
        embeds = by_rows(self.embed_tokens(input_ids))
        if self.embed_tokens.embedding_scale is not None:
            embeds = embeds.astype(self.dtype)
        scale = self.config.embedding_scale
        return embeds if scale == 1.0 else embeds * jnp.asarray(scale, embeds.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits f32 `[..., V]` of features `[..., D]`, or of the last D of more."""
        hidden = hidden[..., -self.config.hidden_size :]
        with jax.named_scope("logits"):
            return by_vocabulary((self.embed_tokens if self.lm_head is None else self.lm_head).logits(hidden))
