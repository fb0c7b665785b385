"""A Pallas kernel for TPUs: queries over a cache, of which only what is filled is read, and over the tokens behind it.

XLA's attention reads a cache to its capacity. Here the work is a flat list of blocks, those of every row that are
filled and within some query's window, and the grid is as long as that list: what is not filled costs neither bytes nor
steps, and while one block is computed the next arrives, whichever row it is of. Sums run along the list as in flash
attention (arXiv 2205.14135): every row begins with the tokens behind its cache, a tree of which the mask is small
enough to be given in full, and goes on with its blocks.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxspec.cache import LayerKV
from jaxspec.kernels.segments import MASKED, Keys, Scores, Segment, merged

LANES, TILE = 128, 16
"""Heads have a multiple of `LANES` numbers; rows of queries and keys behind the cache are padded to a multiple of
`TILE`, the height of a bfloat16 register."""
ROWS = 512
"""The most queries (times heads that share a key head) that are in the memory of a core at once."""
BEHIND = 1024
"""The most tokens behind a cache: they are there all at once."""
STEP, MEMORY = 1 << 19, 12 << 20
"""Bytes of keys that a step should read at least, and that a step may take of a core's memory by `Plan.bytes`."""


def lacks(query: jax.Array, segments: Sequence[Segment], how: Scores = Scores()) -> str | None:
    """Which size or dtype of attention over a cache the kernel does not have, as a clause; None if it has all."""
    head_dim, kv = query.shape[-1], segments[0].kv
    if head_dim % LANES:
        return f"heads of {head_dim} numbers, where it has multiples of {LANES}"
    dtypes = sorted({str(x.dtype) for x in (query, *kv)})
    if dtypes not in (["bfloat16"], ["float32"]):
        return f"queries, keys and values in {' and '.join(dtypes)}, where it has one of bfloat16 and float32"
    return None


def fits(query: jax.Array, segments: Sequence[Segment]) -> bool:
    """Whether it is attention over a cache and some tokens behind it, which is all that the kernel is about."""
    behind = sum(segment.kv.keys.shape[2] for segment in segments[1:])
    cache = Keys(segments[0].kv, segments[:1])
    return cache.is_cache and cache.parts[0].mask.key_places is None and 0 < behind <= BEHIND


class Plan(NamedTuple):
    """How the arrays are cut."""

    heads: int  # key heads at a time
    rows: int  # queries times groups at a time, R
    size: int  # positions of the cache in a block

    def bytes(self, head_dim: int, behind: int, itemsize: int) -> int:
        """About what a step takes of a core's memory."""
        moved = 2 * itemsize * (self.size + behind + self.rows) * head_dim  # keys and values, queries and output
        held = 4 * self.rows * (head_dim + 2 * LANES)
        computed = 4 * self.rows * (2 * max(self.size, behind) + head_dim)
        return self.heads * (2 * moved + held + computed) + 2 * self.rows * behind

    @classmethod
    def of(cls, kv_heads: int, rows: int, capacity: int, behind: int, head_dim: int, itemsize: int) -> "Plan":
        """The most heads whose blocks fit, but not all of them (a chip with two cores halves them), and then blocks as
        short as they can be without being too many: a shorter one wastes less at the end of what is filled."""
        rows = min(rows, ROWS)
        plan = cls(1, rows, LANES)
        for heads in (number for number in range(max(1, kv_heads // 2), 0, -1) if kv_heads % number == 0):
            size = LANES
            while size < 4 * LANES and size < capacity // 4 and heads * size * head_dim * itemsize < STEP:
                size *= 2
            plan = cls(heads, rows, size)
            if plan.bytes(head_dim, behind, itemsize) <= MEMORY:
                break
        return plan


def attend(query: jax.Array, segments: Sequence[Segment], how: Scores = Scores()) -> jax.Array:
    """As `plain.attend`, of what `fits` and lacks nothing. Where there is no TPU it runs under
    `pltpu.force_tpu_interpret_mode` only."""
    cache, *behind = merged(segments)
    (own,) = behind
    batch, heads, length, head_dim = query.shape
    mask = cache.parts[0].mask
    assert mask.lengths is not None  # it is a cache
    seen = own.visible(jnp.arange(length))
    lowest = None
    if mask.window is not None:
        places = jnp.arange(length)[None] if mask.query_places is None else mask.query_places
        lowest = jnp.broadcast_to(places - (mask.window - 1), (batch, length))
    return attend_cache(query, cache.kv, own.kv, seen, mask.lengths, lowest, how=how)


@partial(jax.jit, static_argnames="how")  # layers of one shape are traced once
def attend_cache(
    query: jax.Array,
    cache: LayerKV,
    own: LayerKV,
    seen: jax.Array,
    lengths: jax.Array,
    lowest: jax.Array | None,
    *,
    how: Scores,
) -> jax.Array:
    """Queries `[B, H, N, Dh]` over the first `lengths` i32 `[B]` positions of a cache `[B, Hkv, S, Dh]`, from `lowest`
    i32 `[B, N]` on if given, and over `own` `[B, Hkv, T, Dh]` as far as `seen` bool `[B or 1, N or 1, T]`."""
    batch, heads, length, head_dim = query.shape
    kv_heads, capacity = cache.keys.shape[1:3]
    groups = heads // kv_heads
    behind = -(-own.keys.shape[2] // TILE) * TILE
    rows = -(-groups * length // TILE) * TILE
    plan = Plan.of(kv_heads, rows, capacity, behind, head_dim, query.dtype.itemsize)
    rows = -(-rows // plan.rows) * plan.rows

    def padded(x: jax.Array, size: int, axis: int) -> jax.Array:
        room = size - x.shape[axis]
        return jnp.pad(x, [(0, room if at == axis else 0) for at in range(x.ndim)]) if room else x

    def of_rows(x: jax.Array) -> jax.Array:  # [B, N or 1, X] -> [B, R, X]
        x = jnp.broadcast_to(x[:, None], (x.shape[0], groups, length, x.shape[2]))
        return padded(x.reshape(x.shape[0], groups * length, -1), rows, 1)

    queries = padded(query.reshape(batch, kv_heads, groups * length, head_dim), rows, 2)
    own_keys, own_values = (padded(x, behind, 2) for x in own)
    work = Work.of(lengths, lowest, capacity, plan.size)
    shared = seen.shape[0] == 1

    def of_queries(head, part, item, work, *_):
        return work[item], head, part, 0

    def of_keys(head, part, item, work, blocks, *_):
        return work[item], head, blocks[item], 0

    def of_own(head, part, item, work, *_):
        return work[item], head, 0, 0

    def of_seen(head, part, item, work, *_):
        return 0 if shared else work[item], part, 0

    def of_lowest(head, part, item, work, *_):
        return work[item], part, 0

    block = (1, plan.heads, plan.rows, head_dim)
    keys_block, own_block = ((1, plan.heads, size, head_dim) for size in (plan.size, behind))
    inputs = [
        (queries, pl.BlockSpec(block, of_queries)),
        (cache.keys, pl.BlockSpec(keys_block, of_keys)),
        (cache.values, pl.BlockSpec(keys_block, of_keys)),
        (own_keys, pl.BlockSpec(own_block, of_own)),
        (own_values, pl.BlockSpec(own_block, of_own)),
        (of_rows(padded(seen, behind, 2)).astype(jnp.int8), pl.BlockSpec((1, plan.rows, behind), of_seen)),
    ]
    if lowest is not None:
        inputs.append((of_rows(lowest[:, :, None]), pl.BlockSpec((1, plan.rows, 1), of_lowest)))
    arrays, specs = zip(*inputs, strict=True)
    held = [(plan.heads, plan.rows, size) for size in (LANES, LANES, head_dim)]
    out = pl.pallas_call(
        partial(_step, how=how, windowed=lowest is not None, ragged=capacity % plan.size > 0),
        out_shape=jax.ShapeDtypeStruct(queries.shape, query.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(Work._fields) - 1,
            grid=(kv_heads // plan.heads, rows // plan.rows, work.count),
            in_specs=specs,
            out_specs=pl.BlockSpec(block, of_queries),
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in held],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=2 * MEMORY
        ),
        name="attend_cache",
    )(*work[:-1], *arrays)
    return out[:, :, : groups * length].reshape(query.shape)


class Work(NamedTuple):
    """The blocks that are read, those of a row one after another; every row has at least one."""

    rows: jax.Array  # i32 [M], of which row each is
    blocks: jax.Array  # i32 [M], which of its blocks
    first: jax.Array  # i32 [B], the first block of each row
    last: jax.Array  # i32 [B], and the last
    lengths: jax.Array  # i32 [B]
    count: jax.Array  # i32 [], how many of the M there are

    @classmethod
    def of(cls, lengths: jax.Array, lowest: jax.Array | None, capacity: int, size: int) -> "Work":
        """For rows of which `lengths` i32 `[B]` of `capacity` positions are filled, in blocks of `size`; nobody sees
        what is before the least of `lowest` i32 `[B, N]`."""
        lengths = jnp.clip(lengths, 0, capacity).astype(jnp.int32)
        last = jnp.maximum(lengths - 1, 0) // size
        first = jnp.zeros_like(last)
        if lowest is not None:
            first = jnp.clip(jnp.min(lowest, axis=1).astype(jnp.int32) // size, 0, last)
        ends = jnp.cumsum(last - first + 1, dtype=jnp.int32)
        items = jnp.arange(lengths.shape[0] * -(-capacity // size), dtype=jnp.int32)
        rows = jnp.sum(items[:, None] >= ends, axis=1, dtype=jnp.int32)
        rows = jnp.minimum(rows, lengths.shape[0] - 1)
        blocks = jnp.minimum(items - (ends - (last - first + 1))[rows] + first[rows], last[rows])
        return cls(rows, blocks, first, last, lengths, ends[-1])


def _step(rows, blocks, first, last, lengths, query, keys, values, own_keys, own_values, seen, *refs, **static):
    """One block of one row, for some heads."""
    *lowest, out, peak, total, mixed = refs
    item = pl.program_id(2)
    row, block = rows[item], blocks[item]

    def scores(keys: jax.Array, visible: jax.Array) -> jax.Array:  # [h, R, S]
        products = jax.lax.dot_general(query[0], keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
        return jnp.where(visible[None], static["how"].scores(products, query.shape[-1]), MASKED)

    def mix(weights: jax.Array, values: jax.Array) -> jax.Array:  # [h, R, Dh]
        return jax.lax.dot_general(
            weights.astype(values.dtype), values, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
        )

    @pl.when(block == first[row])
    def begin():
        logits = scores(own_keys[0], seen[0].astype(jnp.int32) != 0)
        highest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - highest)
        peak[...] = jnp.broadcast_to(highest, peak.shape)
        total[...] = jnp.broadcast_to(jnp.sum(weights, axis=-1, keepdims=True), total.shape)
        mixed[...] = mix(weights, own_values[0])

    size = keys.shape[2]
    start = block * size
    places = start + jax.lax.broadcasted_iota(jnp.int32, (1, size), 1)
    visible = places < lengths[row]
    if static["windowed"]:
        visible = visible & (places >= lowest[0][0])
    block_values = values[0]
    if static["ragged"]:  # the last block goes on past the cache, where anything may stand and 0 times NaN is NaN
        depth = start + jax.lax.broadcasted_iota(jnp.int32, block_values.shape, 1)
        block_values = jnp.where(depth < lengths[row], block_values, 0)
    logits = scores(keys[0], visible)
    before = peak[:, :, :1]
    highest = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
    shrink, weights = jnp.exp(before - highest), jnp.exp(logits - highest)
    peak[...] = jnp.broadcast_to(highest, peak.shape)
    total[...] = total[...] * shrink + jnp.sum(weights, axis=-1, keepdims=True)
    mixed[...] = mixed[...] * shrink + mix(weights, block_values)

    @pl.when(block == last[row])
    def end():
        out[0] = (mixed[...] / total[:, :, :1]).astype(out.dtype)
