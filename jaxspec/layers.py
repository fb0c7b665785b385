"""The parts every model here is made of: norms, rotary positions, the Llama decoder layer.

Modules hold parameters and nothing else; caches and masks are arguments. The decoder layer serves the targets' text
models and, with `input_norm=False`, the EAGLE / ViSpec draft heads.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxspec.kernels.attention import LayerKV, Segment, attend

Text = TypeVar("Text", bound="TextConfig", covariant=True)

ROPE_TYPES = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position settings (`rope_parameters` of a Hugging Face config)."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    mrope_section: tuple[int, ...] = ()
    """Multimodal rope: how many frequencies in a row turn with time, height, width, time, .. (Qwen2-VL)."""

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ValueError(f"rope type {self.type!r} is not implemented; known types: {', '.join(ROPE_TYPES)}")
        for name in ("theta", "factor"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and float(value) > 0):
                raise ValueError(f"rope {name} must be a number above 0, got {value!r}")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A Llama-family decoder."""

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

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )


ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def rope_frequencies(config: RopeConfig, head_dim: int) -> jax.Array:
    """Inverse frequencies f32 `[Dh / 2]` (transformers `modeling_rope_utils`: default, linear, llama3)."""
    inverse = 1.0 / config.theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if config.type == "linear":
        return inverse / config.factor
    if config.type == "llama3":
        wavelength = 2 * math.pi / inverse
        context = config.original_max_position_embeddings
        span = config.high_freq_factor - config.low_freq_factor
        smooth = jnp.clip((context / wavelength - config.low_freq_factor) / span, 0.0, 1.0)
        return (1 - smooth) * inverse / config.factor + smooth * inverse
    return inverse


@jax.named_scope("rope")
def rope_tables(config: RopeConfig, head_dim: int, position_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine f32 `[B, N, Dh / 2]` of positions `[B, N]`, or `[3, B, N]` (time, height, width)."""
    angles = position_ids[..., None].astype(jnp.float32) * rope_frequencies(config, head_dim)
    if angles.ndim == 4:
        ends = np.cumsum(config.mrope_section)
        parts = zip(ends - np.array(config.mrope_section), ends, strict=True)
        angles = jnp.concatenate([angles[index % 3, ..., a:b] for index, (a, b) in enumerate(parts)], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rope")
def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array], dtype: DTypeLike | None = None) -> jax.Array:
    """Rotate `x` `[B, N, H, Dh]`, halves convention (Llama in transformers). Computed in `dtype`, by default that of
    `x`, in which the result is."""
    dtype = dtype or x.dtype
    cos, sin = (table[:, :, None, :].astype(dtype) for table in tables)  # [B, N, 1, Dh / 2]
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, features: int, epsilon: float, *, rngs: nnx.Rngs) -> None:
        del rngs
        self.scale = nnx.Param(jnp.ones((features,)))
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return x32.astype(x.dtype) * self.scale[...]


class Embed(nnx.Module):
    """A table of vectors, in whatever dtype it is filled with. (`nnx.Embed` keeps the one that it was built in: built
    abstractly in float32, it makes float32 of a bfloat16 table at every call.)"""

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        embedding_init: nnx.Initializer = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
        rngs: nnx.Rngs,
    ) -> None:
        self.embedding = nnx.Param(embedding_init(rngs.params(), (num_embeddings, features)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Vectors `[.., D]` of integer ids `[..]`."""
        return jnp.take(self.embedding[...], ids, axis=0)


def linear(features_in: int, features_out: int, *, bias: bool, rngs: nnx.Rngs, zero: bool = False) -> nnx.Linear:
    """A linear layer, initialised at fan-in scale, or at zero where its output is added to a residual stream (a fresh
    layer is then the identity, which small models trained from scratch learn faster from)."""
    init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    return nnx.Linear(features_in, features_out, use_bias=bias, kernel_init=init, rngs=rngs)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: TextConfig, *, qkv_bias: bool, output_bias: bool, rngs: nnx.Rngs) -> None:
        query_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query_width, bias=qkv_bias, rngs=rngs)
        self.k_proj = linear(config.hidden_size, kv_width, bias=qkv_bias, rngs=rngs)
        self.v_proj = linear(config.hidden_size, kv_width, bias=qkv_bias, rngs=rngs)
        self.o_proj = linear(query_width, config.hidden_size, bias=output_bias, rngs=rngs, zero=True)
        self.head_dim = config.head_dim

    def heads(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query `[B, N, H, Dh]`, key and value `[B, N, Hkv, Dh]`, turned to their positions."""
        query, key, value = (
            proj(x).reshape(*x.shape[:2], -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return apply_rope(query, rope), apply_rope(key, rope), value

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array, past: Sequence[Segment]
    ) -> tuple[jax.Array, LayerKV]:
        """As of `DecoderLayer`."""
        batch, length, _ = x.shape
        query, key, value = (part.swapaxes(1, 2) for part in self.heads(x, rope))  # [B, H, N, Dh]
        new = LayerKV(key, value)
        out = attend(query, [*past, Segment(new, mask)])  # [B, H, N, Dh]
        out = out.swapaxes(1, 2).reshape(batch, length, -1)
        return self.o_proj(out), new


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, width: int, inner: int, *, bias: bool, activation: str = "silu", rngs: nnx.Rngs) -> None:
        self.activation = activation
        self.gate_proj = linear(width, inner, bias=bias, rngs=rngs)
        self.up_proj = linear(width, inner, bias=bias, rngs=rngs)
        self.down_proj = linear(inner, width, bias=bias, rngs=rngs, zero=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One pre-norm Llama layer. `input_norm=False` is EAGLE's draft layer (arXiv 2401.15077, published code)."""

    def __init__(
        self, config: TextConfig, *, input_norm: bool = True, qkv_bias: bool | None = None, rngs: nnx.Rngs
    ) -> None:
        epsilon = config.rms_norm_eps
        self.input_layernorm = RMSNorm(config.hidden_size, epsilon, rngs=rngs) if input_norm else None
        self.self_attn = SelfAttention(
            config,
            qkv_bias=config.attention_bias or config.qkv_bias if qkv_bias is None else qkv_bias,
            output_bias=config.attention_bias,
            rngs=rngs,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, epsilon, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        past: Sequence[Segment] = (),
    ) -> tuple[jax.Array, LayerKV]:
        """`x` `[B, N, D]`, `mask` bool `[B, N, N]` among the new tokens, `past` what they see beside each other.
        Returns the output `[B, N, D]` and the new tokens' keys and values."""
        residual = x
        x = x if self.input_layernorm is None else self.input_layernorm(x)
        attended, kv = self.self_attn(x, rope, mask, past)
        x = residual + attended
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Uncommitted(NamedTuple):
    """Tokens that come after those of a cache and are not written to it: the levels of a tree that grows."""

    kv: tuple[LayerKV, ...]  # per layer, [B, Hkv, T, Dh]
    mask: jax.Array  # bool [B, N, T], which of them each new token sees
    position_ids: jax.Array  # i32 [B, T]


class LanguageModel(nnx.Module, Generic[Text]):
    """Token embedding, decoder layers, final norm, LM head."""

    layer: ClassVar[Callable[..., Any]] = DecoderLayer
    norm_type: ClassVar[Callable[..., Any]] = RMSNorm

    def __init__(self, config: Text, *, rngs: nnx.Rngs) -> None:
        self.config = config
        init = nnx.initializers.normal(0.3)
        self.embed_tokens = Embed(config.vocab_size, config.hidden_size, embedding_init=init, rngs=rngs)
        self.layers = nnx.List([self.layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = self.norm_type(config.hidden_size, config.rms_norm_eps, rngs=rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else linear(config.hidden_size, config.vocab_size, bias=False, rngs=rngs)

    def __call__(
        self,
        embeds: jax.Array,
        position_ids: jax.Array,
        mask: jax.Array,
        cache: Sequence[LayerKV] | None = None,
        cache_mask: jax.Array | None = None,
        uncommitted: Uncommitted | None = None,
        tap_layers: Sequence[int] = (),
    ) -> tuple[jax.Array, tuple[LayerKV, ...]]:
        """`embeds` `[B, N, D]`, `position_ids` i32 `[B, N]`, `mask` bool `[B, N, N]`; `cache` is one `LayerKV` per
        layer, `cache_mask` bool `[B, 1, S]`; `uncommitted` an `Uncommitted` or None. Returns features
        `[B, N, (T + 1) * D]`, the outputs of the T `tap_layers` before that of the final norm, and one new `LayerKV`
        per layer."""
        rope = rope_tables(self.config.rope, self.config.head_dim, position_ids)
        states, new_kv = [embeds], []
        for index, layer in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                past = []
                if cache is not None:
                    assert cache_mask is not None  # it comes with the cache
                    past.append(Segment(cache[index], cache_mask))
                if uncommitted is not None:
                    past.append(Segment(uncommitted.kv[index], uncommitted.mask))
                x, kv = layer(states[-1], rope, mask, past)
            states.append(x)
            new_kv.append(kv)
        return self.features(states, tap_layers), tuple(new_kv)

    def features(self, states: Sequence[jax.Array], tap_layers: Sequence[int]) -> jax.Array:
        """Features `[B, N, (T + 1) * D]` of the hidden states `[B, N, D]` before the first layer and after each."""
        return jnp.concatenate([*(states[layer] for layer in tap_layers), self.norm(states[-1])], axis=-1)

    def embed(self, input_ids: jax.Array) -> jax.Array:
        """Embeddings `[.., D]` of ids `[..]`."""
        return self.embed_tokens(input_ids)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits f32 `[..., V]` of features `[..., D]`, or of the last D of more."""
        hidden = hidden[..., -self.config.hidden_size :]
        kernel = self.embed_tokens.embedding[...].T if self.lm_head is None else self.lm_head.kernel[...]
        with jax.named_scope("logits"):
            return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)


def causal_mask(valid: jax.Array) -> jax.Array:
    """Bool `[B, S, S]`: position j is visible from i iff j <= i and `valid[j]`; `valid` bool `[B, S]`."""
    length = valid.shape[1]
    return jnp.tril(jnp.ones((length, length), bool))[None] & valid[:, None, :]
