"""Attention of JAX's own: splash attention for what has no cache, `jax.nn.dot_product_attention` for any segments.

Splash attention (a Pallas kernel for TPUs) never holds scores, and leaves out what is after the diagonal: for prompts
and training. `jax.nn` is XLA's attention or cuDNN's, one call a segment; the parts are joined by how much of the
softmax each holds, the log-sum-exp that a call returns. JAX rounds that to the dtype of the values: with bfloat16,
where it is near 10, a part is weighed wrong by several per cent. So those two are here to be measured
(docs/KERNELS.md).
"""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    FullMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)

from jaxspec.kernels.cached import LANES
from jaxspec.kernels.segments import Keys, Scores, Segment

Backend = Literal["xla", "cudnn"]
SHORT = 128
"""Splash attention is for so many tokens or more."""


def splash_fits(query: jax.Array, segments: Sequence[Segment]) -> bool:
    """Whether tokens attend to themselves alone, in order or all to all, as far as they are filled."""
    (first, *rest), length = segments, query.shape[2]
    mask = first.mask
    given = (mask.query_places, mask.key_places, mask.groups, mask.ancestors, mask.dense, mask.window)
    alone = not rest and all(each is None for each in given)
    return alone and first.kv.keys.shape[2] == length >= SHORT


def splash(query: jax.Array, segments: Sequence[Segment], how: Scores = Scores()) -> jax.Array:
    """As `plain.attend`, of what fits; where there is no TPU, under `pltpu.force_tpu_interpret_mode` only."""
    ((kv, mask),) = segments
    lengths = jnp.full((query.shape[0],), query.shape[2]) if mask.lengths is None else mask.lengths
    return splash_segment(query, kv, lengths, how=how, causal=mask.causal)


@partial(jax.jit, static_argnames=("how", "causal"))
def splash_segment(
    query: jax.Array, kv: Sequence[jax.Array], lengths: jax.Array, *, how: Scores, causal: bool
) -> jax.Array:
    """Queries `[B, H, N, Dh]` over keys and values `[B, Hkv, N, Dh]`, of which the first `lengths` i32 `[B]` are seen
    (of none, the first)."""
    heads, length, head_dim = query.shape[1:]
    size = -(-length // LANES) * LANES
    block = next(block for block in (4 * LANES, 2 * LANES, LANES) if size % block == 0)
    room = ((0, 0), (0, 0), (0, size - length), (0, 0))
    mask = (CausalMask if causal else FullMask)((size, size))
    kernel = make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=BlockSizes(block_q=block, block_kv=block, block_kv_compute=block),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=how.soft_cap,
    )

    def of_row(row: tuple[jax.Array, ...]) -> jax.Array:
        query, keys, values, count = row
        others = jnp.arange(size) >= jnp.maximum(count, 1)
        out = kernel(query, keys, values, SegmentIds(jnp.zeros((size,), jnp.int32), others.astype(jnp.int32)))
        assert isinstance(out, jax.Array)  # a pair where residuals are asked for
        return out

    scaled = (query.astype(jnp.float32) * how.factor(head_dim)).astype(query.dtype)
    # One row after another: interpret mode knows no batches of a kernel.
    out = jax.lax.map(of_row, (*(jnp.pad(x, room) for x in (scaled, *kv)), lengths))
    return out[:, :, :length]


def cudnn_lacks(query: jax.Array, segments: Sequence[Segment], how: Scores = Scores()) -> str | None:
    """What cuDNN's attention does not have, as a clause; None if it has all."""
    if how.soft_cap is not None:
        return joined_lacks(query, segments, how)
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"{query.dtype}, where it has bfloat16 and float16"
    if any(x.dtype != query.dtype for segment in segments for x in segment.kv):
        return "queries, keys and values in several dtypes"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"heads of {query.shape[-1]} numbers, where it has multiples of 8 up to 128"
    return None


def joined_lacks(query: jax.Array, segments: Sequence[Segment], how: Scores = Scores()) -> str | None:
    """What `jax.nn.dot_product_attention` does not have, as a clause."""
    return None if how.soft_cap is None else "soft caps"


def joined(
    query: jax.Array, segments: Sequence[Segment], how: Scores = Scores(), *, backend: Backend = "xla"
) -> jax.Array:
    """As `plain.attend`, by `jax.nn.dot_product_attention` segment by segment; `backend` is its `implementation`."""
    parts = [of_segment(query, segment, how.scale, backend) for segment in segments]
    peak = reduce(jnp.maximum, [held for _, held in parts])
    shares = [jnp.exp(held - peak) for _, held in parts]
    out = reduce(jnp.add, [part * share for (part, _), share in zip(parts, shares, strict=True)])
    return (out / reduce(jnp.add, shares)).astype(query.dtype)


def of_segment(
    query: jax.Array, segment: Segment, scale: float | None, backend: Backend
) -> tuple[jax.Array, jax.Array]:
    """Attention `[B, H, N, Dh]` and log-sum-exp `[B, H, N, 1]`, both float32, over one segment alone."""
    (keys, values), mask = segment
    batch, _, length, _ = query.shape
    lengths, dense = mask.lengths, None
    if lengths is not None and Keys(segment.kv, [segment]).is_cache and mask.window is None:
        any_seen = (lengths > 0)[:, None, None, None]
    else:
        lengths, seen = None, mask.visible(jnp.arange(length), keys.shape[2])
        dense = jnp.broadcast_to(seen[:, None], (batch, 1, length, keys.shape[2]))
        any_seen = jnp.any(seen, axis=-1)[:, None, :, None]
    out, held = jax.nn.dot_product_attention(
        query.swapaxes(1, 2),
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        mask=dense,
        scale=scale,
        key_value_seq_lengths=lengths,
        implementation=backend,
        return_residual=True,
    )
    # What a query gets that sees nothing here is whatever the backend makes of it.
    held = jnp.where(any_seen, held.swapaxes(1, 2)[..., None].astype(jnp.float32), -1e30)
    return jnp.where(any_seen, out.swapaxes(1, 2).astype(jnp.float32), 0.0), held
