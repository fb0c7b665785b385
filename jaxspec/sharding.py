"""Meshes, and how parameters and batches lie on one with (some of) the axes `data`, `fsdp`, `tensor`.

One rule per kind of matrix; an axis the mesh lacks, or that does not divide the dimension, is left out. What attention
reads or writes is divided by heads: a device has whole ones. The scales of an int8 matrix follow its rule: along its
inputs they have size 1, so what remains is the axis of its outputs. Activations: splitting.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.checks import whole_number
from jaxspec.quantization import SUFFIX
from jaxspec.splitting import DATA, FSDP, TENSOR

AXES = (DATA, FSDP, TENSOR)
ROWS = (DATA, FSDP)
"""The axes that the rows of a batch are split over."""

# Wide matrices split their outputs over `tensor`, the matrices after them their inputs; vectors are replicated.
RULES = (
    (r".*\.(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|linear_1|merger\.mlp\.0)\.kernel", ("fsdp", "tensor")),
    (r".*\.(o_proj|out_proj|attn\.proj|down_proj|fc2|linear_2|merger\.mlp\.2)\.kernel", ("tensor", "fsdp")),
    (r".*\.(patch_embedding|patch_embed\.proj)\.kernel|.*\.mm_input_projection_weight", ("fsdp", "tensor")),
    (r".*\.(embed_tokens|position_embedding)\.embedding", ("tensor", "fsdp")),
    (r"(.*\.)?(lm_head|draft_head)\.kernel", ("fsdp", "tensor")),
    (r"(.*\.)?(fc|img_fc|tap_fc|heads\.\d+\.0\.linear|heads\.\d+\.1)\.kernel", ("fsdp", "tensor")),
    (r"(.*\.)?convolution\.(embeds|features)\.kernel", ("fsdp", None)),
)
OF_HEADS = r"(?P<module>.*)\.(q_proj|k_proj|v_proj|o_proj|out_proj)\.kernel"


def parameter_sharding(
    mesh: Mesh, path: str, shape: Sequence[int], head_dims: Mapping[str, int] | None = None
) -> NamedSharding:
    """The sharding of the parameter at a dotted path. `head_dims` are those of its model (`head_dims_of`); without them
    the matrices of attention are divided like any other."""
    path = path.removesuffix(SUFFIX)
    attention = re.fullmatch(OF_HEADS, path)
    unit = (head_dims or {}).get(attention["module"], 1) if attention else 1
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path):
            spec = [
                axis
                if axis in mesh.shape and size % (mesh.shape[axis] * (unit if axis == "tensor" else 1)) == 0
                else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            return NamedSharding(mesh, PartitionSpec(*spec))
    return NamedSharding(mesh, PartitionSpec())


def head_dims_of(module: Any) -> dict[str, int]:
    """The width of a head in every attention of a model (an nnx module), by its dotted path."""
    parts = nnx.iter_modules(module)
    widths = ((".".join(map(str, path)), getattr(part, "head_dim", None)) for path, part in parts)
    return {path: width for path, width in widths if isinstance(width, int)}


def decoding_mesh(tensor: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh to decode on: `tensor` devices share target and drafter, heads and vocabulary, and `data` such groups
    share the rows of a batch.

    By default of the first `data` x `tensor` devices of this machine. Raises ValueError where it has fewer, and where
    `devices` are given that are not as many.
    """
    tensor, data = whole_number("tensor", tensor, 1), whole_number("data", data, 1)
    count = data * tensor
    size = f"tensor is {tensor}" if data == 1 else f"data ({data}) x tensor ({tensor}) is {count}"
    if devices is None:
        devices = jax.local_devices()
        if len(devices) < count:
            there = "there is 1 device" if len(devices) == 1 else f"there are {len(devices)} devices"
            raise ValueError(f"{size}, but {there}")
        devices = devices[:count]
    if len(devices) != count:
        raise ValueError(f"{size}, but {len(devices)} devices are given")
    return jax.make_mesh((data, 1, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def checked_mesh(mesh: Mesh | None) -> Mesh | None:
    """The mesh as models are put on it. Raises ValueError for what is none, or has another axis than `AXES`."""
    if not isinstance(mesh, Mesh | None):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}")
    if mesh is None:
        return None
    if unknown := [axis for axis in mesh.axis_names if axis not in AXES]:
        raise ValueError(f"mesh has the axis {unknown[0]!r}; known: {', '.join(AXES)}")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_heads(heads: int, mesh: Mesh | None) -> None:
    """Raises ValueError where `tensor` gives the devices of a mesh no whole heads of a model with so many query heads.
    Key heads may be fewer: devices then have copies (`splitting.kv_copies`)."""
    size = 1 if mesh is None else mesh.shape.get("tensor", 1)
    if heads % size:
        possible = [str(each) for each in range(1, heads + 1) if heads % each == 0]
        raise ValueError(
            f"tensor is {size}, which does not divide the {heads} attention heads of the target; it may be one of "
            f"{', '.join(possible)}"
        )


def training_mesh(fsdp: int, tensor: int) -> Mesh | None:
    """All devices: `fsdp` x `tensor` of them share the parameters, and as many such groups as there are stand along
    `data`. None where there is one device. Raises ValueError where the devices do not divide so."""
    count = jax.device_count()
    if count % (fsdp * tensor):
        raise ValueError(f"fsdp ({fsdp}) x tensor ({tensor}) must divide the number of devices, {count}")
    if count == 1:
        return None
    return jax.make_mesh((count // (fsdp * tensor), fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_shardings(tree: Any, mesh: Mesh, head_dims: Mapping[str, int] | None = None) -> Any:
    """`parameter_sharding` of every array of a tree, or shape of one, by its path; of parameters, or of what an
    optimizer keeps of them."""

    def of(path: tuple, leaf: Any) -> NamedSharding:
        names = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in path]
        return parameter_sharding(mesh, ".".join(filter(None, names)), leaf.shape, head_dims)

    return jax.tree_util.tree_map_with_path(of, tree)


def place_parameters(tree: Any, mesh: Mesh | None, head_dims: Mapping[str, int] | None = None) -> Any:
    """The arrays of a tree as `parameter_shardings` says. Without a mesh they stay where they are."""
    return tree if mesh is None else jax.device_put(tree, parameter_shardings(tree, mesh, head_dims))


def place_batch(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of a batch with their first axis split over `data` and `fsdp` where that divides it. Without a mesh
    they stay on the host."""
    if mesh is None:
        return tree

    def placed(leaf):
        split = leaf.ndim and leaf.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        sharding = NamedSharding(mesh, PartitionSpec(ROWS) if split else PartitionSpec())
        return jax.device_put(leaf, sharding)

    return jax.tree.map(placed, tree)
