"""Our parameter paths <-> published tensor names, one table per family, used in both directions: to fill a module that
was built without memory from a folder's tensors, and to write it out again.

Modules here are nested like the published ones, so a table holds prefixes only; the leaf rule is common: `kernel` is
the transposed `weight`, `scale` and `embedding` are `weight`, a convolution's kernel is its flattened `weight`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jaxspec.checkpoints.finite import cast, is_finite, why_not_finite
from jaxspec.checkpoints.foreign import counted, foreign_tensors
from jaxspec.quantization import INPUT_AXES, SUFFIX, is_quantized, matrices, quantized, to_int8
from jaxspec.sharding import head_dims_of, parameter_sharding

Module = TypeVar("Module")
"""An `nnx.Module`; not a bound, for a protocol such as `DraftModel` cannot say that it is one."""

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
LISTED, SHOWN = 20, 3
"""More problems than `LISTED` are counted, and the first `SHOWN` of a kind are named."""


@dataclasses.dataclass(frozen=True)
class NameTable:
    """How a family is published.

    prefixes: our path prefix -> published prefix, the first that fits is used.
    aliases: (regex at the start of a name, replacement), applied in order, bring other layouts to the published one.
    ignored: regexes of published tensors that carry no parameter.
    """

    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def published(self, path: str) -> str:
        """Published name of our parameter path."""
        for ours, theirs in self.prefixes.items():
            if path.startswith(ours):
                path = theirs + path.removeprefix(ours)
                break
        stem, _, leaf = path.rpartition(".")
        leaf = LEAVES.get(leaf, leaf)
        return f"{stem}.{leaf}" if stem else leaf

    def canonical(self, name: str) -> str:
        """The published name in the table's layout, whichever layout it came in."""
        for pattern, replacement in self.aliases:
            name = re.sub("^" + pattern, replacement, name)
        return name

    def is_ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def dotted_path(path: Iterable) -> str:
    return ".".join(map(str, path))


def parameter_paths(module: object) -> dict[str, nnx.Param]:
    """Every parameter of a module by dotted path."""
    return {dotted_path(path): leaf for path, leaf in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def to_ours(path: str, array: np.ndarray) -> np.ndarray:
    """A published array in our layout (a view; nothing is read yet)."""
    if path.endswith("kernel"):
        return array.reshape(array.shape[0], -1).T
    return array


def to_published(path: str, array: np.ndarray) -> np.ndarray:
    """Inverse of `to_ours`."""
    if path.endswith("patch_embedding.kernel"):
        patch = round((array.shape[0] / 3) ** 0.5)
        return array.T.reshape(-1, 3, patch, patch)
    if path.endswith("patch_embed.proj.kernel"):  # Qwen: two frames to a patch
        patch = round((array.shape[0] / 6) ** 0.5)
        return array.T.reshape(-1, 3, 2, patch, patch)
    return array.T if path.endswith("kernel") else array


class OneKey:
    """Stands in for `nnx.Rngs` where nothing is drawn: each draw of a real one walks back through all before it."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract(build: Callable[[Any], Module]) -> Module:
    """The module that `build(rngs)` makes, with shapes in place of values."""
    return nnx.eval_shape(lambda: build(OneKey()))


def match(
    module: object, tensors: Mapping[str, np.ndarray], table: NameTable, source: str
) -> list[tuple[tuple, nnx.Variable, np.ndarray]]:
    """(path, leaf, published array in our layout) of every parameter of an abstract module; no values are read.

    Raises ValueError for quantised weights and EAGLE-3 heads, by name, and for every missing, extra, doubled and
    mis-shaped tensor at once.
    """
    problems, by_name = [], {}
    for name, array in tensors.items():
        canonical = table.canonical(name)
        if table.is_ignored(canonical):
            continue
        if canonical in by_name:
            problems.append(f"doubled: {name} (also {canonical})")
        by_name[canonical] = array
    found = []
    for path, leaf in nnx.to_flat_state(nnx.state(module)):
        dotted = dotted_path(path)
        name = table.published(dotted)
        if name not in by_name:
            problems.append(f"missing: {name} {published_shape(dotted, leaf.shape)}")
            continue
        array, expected = by_name.pop(name), published_shape(dotted, leaf.shape)
        if array.shape != expected:
            problems.append(f"mis-shaped: {name} is {array.shape}, the config wants {expected}")
        elif jnp.issubdtype(array.dtype, jnp.floating) != jnp.issubdtype(leaf.dtype, jnp.floating):
            wanted = "a floating-point" if jnp.issubdtype(leaf.dtype, jnp.floating) else "an integer"
            problems.append(f"wrong dtype: {name} is {array.dtype}, not {wanted} type")
        else:
            found.append((path, leaf, to_ours(dotted, array)))
    problems += [f"extra: {name} {tuple(array.shape)}" for name, array in by_name.items()]
    if problems:
        raise ValueError(
            foreign_tensors(tensors, source) or f"{source} does not fit its config.json:\n  {listed(problems)}"
        )
    return found


def listed(problems: list[str]) -> str:
    """Problems, each "kind: what", one a line; many of them shortened kind by kind."""
    if len(problems) > LISTED:
        kinds = {}
        for problem in problems:
            kinds.setdefault(problem.partition(": ")[0], []).append(problem)
        problems = [
            line
            for kind, own in kinds.items()
            for line in own[:SHOWN] + ([f"{kind}: {len(own) - SHOWN} more"] if len(own) > SHOWN else [])
        ]
    return "\n  ".join(problems)


def fill(
    module: Module,
    tensors: Mapping[str, np.ndarray],
    table: NameTable,
    source: str,
    dtype: DTypeLike | None,
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | None = None,
    part: str | None = None,
) -> Module:
    """A module with the same structure (built abstractly) whose parameters are the published tensors in `dtype`
    (integers keep theirs).

    With a mesh every shard is read on its own: the host holds one at a time. With `quantize` the matrices below the
    attribute `part` (all of them where none is named) become int8 as they are read, so that one of them at a time is
    there in the type of its file. Raises ValueError as `match` does, and for values that are not finite in `dtype`,
    naming their tensors.
    """
    as_int8 = {path for path, _, _ in matrices(module, part)} if quantize else set()
    values, spoiled, head_dims = [], [], head_dims_of(module)
    for path, leaf, array in match(module, tensors, table, source):
        dotted, wanted = dotted_path(path), settled(leaf.dtype, dtype)
        if path in as_int8:
            wanted = array.dtype if array.dtype.itemsize <= 4 else np.float32
        value, finite = place(array, dotted, wanted, mesh, head_dims)
        if not finite:
            spoiled.append(f"{table.published(dotted)} ({why_not_finite(array, wanted)})")
        if path in as_int8:
            *owner, name = path
            value, scale = to_int8(value, INPUT_AXES[name])
            if mesh is not None:
                value, scale = (
                    jax.device_put(each, parameter_sharding(mesh, dotted + suffix, each.shape, head_dims))
                    for each, suffix in ((value, ""), (scale, SUFFIX))
                )
            jax.block_until_ready(value)  # before the next one is read
            values.append(((*owner, name + SUFFIX), leaf.replace(scale)))
        values.append((path, leaf.replace(value)))
    if spoiled:
        name = jnp.dtype(dtype).name
        raise ValueError(f"{source} holds weights that are not finite in {name}: {counted(spoiled, 5)}")
    graph = nnx.graphdef(quantized(module, part) if quantize else module)
    return nnx.merge(graph, nnx.from_flat_state(values))


def settled(own: DTypeLike, wanted: DTypeLike | None) -> DTypeLike:
    """The dtype that a parameter of dtype `own` gets where `wanted` is asked for: integers stay what they are."""
    return wanted if wanted is not None and jnp.issubdtype(own, jnp.floating) else own


def place(
    array: np.ndarray,
    path: str,
    dtype: DTypeLike,
    mesh: jax.sharding.Mesh | None,
    head_dims: Mapping[str, int] | None = None,
) -> tuple[jax.Array, bool]:
    """A memory-mapped array in `dtype` on the device, or shard by shard on a mesh; and whether it is finite, in the
    shards of this host.

    Not `make_array_from_callback`: it holds the shards of all local devices, replicas too, before it moves the first.
    `cast` copies even without a change of type: on CPU JAX may keep the array it is given, and a file rewritten later
    must not change the model. It also keeps the order in the file; transposing is faster on the way to the device.
    """
    if mesh is None:
        whole = cast(array, dtype)
        return jnp.asarray(whole), is_finite(whole)
    sharding = parameter_sharding(mesh, path, array.shape, head_dims)
    holders = {}
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        holders.setdefault(str(index), (index, []))[1].append(device)
    shards, finite = [], True
    for index, devices in holders.values():
        shard = cast(array[index], dtype)
        finite &= is_finite(shard)
        shards += jax.block_until_ready([jax.device_put(shard, device) for device in devices])
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards), finite


def published_shape(path: str, shape: Iterable[int]) -> tuple[int, ...]:
    return to_published(path, np.broadcast_to(0, tuple(shape))).shape


def to_tensors(module: object, table: NameTable, dtype: DTypeLike | None = None) -> dict[str, np.ndarray]:
    """Published tensors of a module, the inverse of `fill`. Raises ValueError where it is quantised: what is published
    are float weights, of which any reader makes int8 ones."""
    if is_quantized(module):
        raise ValueError("a quantised model cannot be saved; save the one with float weights that it was made from")
    tensors = {}
    for path, leaf in parameter_paths(module).items():
        array = np.asarray(jax.device_get(leaf[...]))
        array = to_published(path, array.astype(settled(array.dtype, dtype)))
        tensors[table.published(path)] = np.ascontiguousarray(array)
    return tensors
