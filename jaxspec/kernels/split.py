"""Attention on a mesh: every device attends for its own rows and heads, and needs nothing of the others.

A kernel is written for one device and is called on each; nobody has to split it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import PartitionSpec

from jaxspec.kernels.masks import Mask
from jaxspec.splitting import BATCH, TENSOR, mesh_in_use, on_each, shares

if TYPE_CHECKING:
    from jaxspec.kernels.attention import Segment

    Attend = Callable[..., jax.Array]


def by_heads(attend: "Attend") -> "Attend":
    """`attend` with rows and heads split as the mesh in use splits them; where `tensor` does not divide query and key
    heads, every device has all of them."""

    @functools.wraps(attend)
    def split(query: jax.Array, segments: "Sequence[Segment]", *options: Any, **named: Any) -> jax.Array:
        if mesh_in_use() is None:
            return attend(query, segments, *options, **named)
        batch, heads = query.shape[:2]
        rows = shares(BATCH, batch)
        counts = {heads, *(each.kv.keys.shape[1] for each in segments)}
        own = TENSOR if all(shares(TENSOR, count) for count in counts) else None
        part: Any = PartitionSpec(rows, own)  # also in the places of arrays
        specs = [each._replace(kv=part, mask=mask_spec(each.mask, batch, rows)) for each in segments]
        run = on_each(lambda query, segments: attend(query, segments, *options, **named), (part, specs), part)
        return run(query, list(segments))

    return split


def mask_spec(mask: Mask, batch: int, rows: str | tuple[str, ...] | None) -> Mask:
    """How a mask's arrays are split: those with a row for each of the batch over `rows`."""

    def spec(name: str, x: jax.Array) -> PartitionSpec:
        per_row = x.shape[0] == batch and not (name == "ancestors" and x.ndim == 2)
        return PartitionSpec(rows) if per_row else PartitionSpec()

    names = ("lengths", "query_places", "key_places", "groups", "ancestors", "dense")
    given: dict[str, Any] = {name: spec(name, x) for name in names if (x := getattr(mask, name)) is not None}
    return dataclasses.replace(mask, **given)
