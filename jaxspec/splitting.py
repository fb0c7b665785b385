"""Models on a mesh: which part of an activation lies on which device, where XLA must not choose.

Programs.py traces what it compiles with the mesh of its parameters in use (`using`), and so does training/loop.py; what
stands here asks for that mesh and does nothing where there is none, so no function of the library is given one. Rows
of a batch are split over `data`, in training over `fsdp`, too, heads and the vocabulary over `tensor`, and everything
between two layers is whole on every device of a group:

    x [B, N, D]                    rows
    queries, keys, values, cache   rows, tensor (heads)
    logits, noise [B, N, V]        rows, -, tensor

An axis that does not divide what it would split leaves it whole.
"""

import contextlib
import math
from collections.abc import Callable, Generator
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
BATCH = "batch"
"""Stands for the axes that split the rows of a batch."""
ROW_AXES = jax.make_user_context((DATA,))  # those axes; part of what jit keeps programs by
Value = TypeVar("Value")


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that the arrays of a tree lie on (or shall lie on, where they are abstract); None for one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


@contextlib.contextmanager
def using(mesh: Mesh | None, row_axes: tuple[str, ...] = (DATA,)) -> Generator[None]:
    """While a program is traced: the mesh that it is for, and the axes that split the rows of a batch."""
    if mesh is None:
        yield
        return
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), ROW_AXES(row_axes):
        yield


def mesh_in_use() -> AbstractMesh | None:
    """That mesh; None without one, and where a function runs on each device by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if mesh.size > 1 and all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def shares(axis: str, size: int) -> str | tuple[str, ...] | None:
    """The axis (or those that `BATCH` stands for) where the mesh in use has it and it splits a dimension of that size,
    else None."""
    mesh, found, parts = mesh_in_use(), [], 1
    for each in ROW_AXES.value if axis == BATCH else (axis,):
        count = 1 if mesh is None else mesh.shape.get(each, 1)
        if count > 1 and size % (parts * count) == 0:
            found, parts = [*found, each], parts * count
    return tuple(found) if len(found) > 1 else found[0] if found else None


def constrained(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with its dimensions split over `axes` as far as these divide them, the others whole."""
    if mesh_in_use() is None:
        return x
    spec = [None if axis is None else shares(axis, size) for axis, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def whole(tree: Value) -> Value:
    """The arrays of a tree whole on every device."""
    return jax.tree.map(constrained, tree)


def by_rows(x: jax.Array) -> jax.Array:
    """`x` `[B, ..]`, the rows split, the rest whole."""
    return constrained(x, BATCH)


def summed(x: jax.Array) -> jax.Array:
    """`x` `[B, N, D]`, the product of what is split over `tensor` with a matrix that is: its parts are added, rows stay
    split. Where `fsdp` splits the matrix and not the rows, each device makes its share of the D: the result travels,
    not the matrix."""
    return by_rows(x if FSDP in ROW_AXES.value else constrained(x, BATCH, None, FSDP))


def by_vocabulary(x: jax.Array) -> jax.Array:
    """`x` `[B, .., V]`, rows and vocabulary split."""
    return constrained(x, BATCH, *[None] * (x.ndim - 2), TENSOR)


def kv_copies(heads: int, kv_heads: int) -> int:
    """How often each key head stands beside itself, so that every device has whole ones, and those that its query heads
    read: 1 where `tensor` divides the key heads, and where it does not divide the query heads (nothing is split)."""
    if shares(TENSOR, heads) is None:
        return 1
    mesh = mesh_in_use()
    assert mesh is not None  # it splits the heads
    return math.lcm(mesh.shape[TENSOR], kv_heads) // kv_heads


def on_each(function: Callable[..., Value], specs: Any, out_specs: Any) -> Callable[..., Value]:
    """`function` on every device of the mesh in use, with its own parts of the arguments."""
    # What an all-gather gives is the same everywhere, which JAX's check cannot know.
    return jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)
