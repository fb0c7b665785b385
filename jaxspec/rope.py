"""Rotary positions: frequencies of every published kind, one axis or three (time, height, width), and how they turn
queries and keys."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

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
    mrope_interleaved: bool = False
    """Multimodal rope: frequencies turn with time, height, width in turn, as long as each has some left of its section,
    and those that remain with time (Qwen3-VL)."""

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise ValueError(f"rope type {self.type!r} is not implemented; known types: {', '.join(ROPE_TYPES)}")
        for name in ("theta", "factor"):
            value = getattr(self, name)
            if not (isinstance(value, numbers.Real) and float(value) > 0):
                raise ValueError(f"rope {name} must be a number above 0, got {value!r}")


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


def mrope_axes(config: RopeConfig, count: int) -> np.ndarray:
    """Which axis (0 time, 1 height, 2 width) each of `count` frequencies of a multimodal rope turns with, `[count]`."""
    section = config.mrope_section
    if not config.mrope_interleaved:
        return np.repeat(np.arange(len(section)) % 3, section)
    number = np.arange(count)
    axis = number % 3
    return np.where(number < 3 * np.array(section)[axis], axis, 0)


@jax.named_scope("rope")
def rope_tables(config: RopeConfig, head_dim: int, position_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine f32 `[B, N, Dh / 2]` of positions `[B, N]`, or `[3, B, N]` (time, height, width)."""
    positions = position_ids[..., None]
    if position_ids.ndim == 3:
        positions = jnp.moveaxis(position_ids[mrope_axes(config, head_dim // 2)], 0, -1)  # [B, N, Dh / 2]
    angles = positions.astype(jnp.float32) * rope_frequencies(config, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


@jax.named_scope("rope")
def apply_rope(x: jax.Array, tables: tuple[jax.Array, jax.Array], dtype: DTypeLike | None = None) -> jax.Array:
    """Rotate `x` `[B, N, H, Dh]`, halves convention (Llama in transformers). Computed in `dtype`, by default that of
    `x`, in which the result is."""
    dtype = dtype or x.dtype
    cos, sin = (table[:, :, None, :].astype(dtype) for table in tables)  # [B, N, 1, Dh / 2]
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
