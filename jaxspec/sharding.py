"""How parameters and batches lie on a mesh with (some of) the axes `data`, `fsdp`, `tensor`.

One rule per kind of matrix; an axis the mesh lacks, or that does not divide the dimension, is left out. The scales of
an int8 matrix follow its rule: along its inputs they have size 1, so what remains is the axis of its outputs.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxspec.quantization import SUFFIX

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
"""The axes that the rows of a batch are split over."""

# Wide matrices split their outputs over `tensor`, the matrices after them their inputs; vectors are replicated.
RULES = (
    (r".*\.(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|linear_1|merger\.mlp\.0)\.kernel", ("fsdp", "tensor")),
    (r".*\.(o_proj|out_proj|attn\.proj|down_proj|fc2|linear_2|merger\.mlp\.2)\.kernel", ("tensor", "fsdp")),
    (r".*\.(patch_embedding|patch_embed\.proj)\.kernel|.*\.mm_input_projection_weight", ("fsdp", "tensor")),
    (r".*\.(embed_tokens|position_embedding)\.embedding", ("tensor", "fsdp")),
    (r"(.*\.)?(lm_head|draft_head)\.kernel", ("fsdp", "tensor")),
    (r"(.*\.)?(fc|img_fc|tap_fc|convolution\.(embeds|features)|heads\.\d+\.0\.linear)\.kernel", ("fsdp", None)),
)


def parameter_sharding(mesh: Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of the parameter at a dotted path."""
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path.removesuffix(SUFFIX)):
            spec = [
                axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            return NamedSharding(mesh, PartitionSpec(*spec))
    return NamedSharding(mesh, PartitionSpec())


def training_mesh(fsdp: int, tensor: int) -> Mesh | None:
    """All devices: `fsdp` x `tensor` of them share the parameters, and as many such groups as there are stand along
    `data`. None where there is one device. Raises ValueError where the devices do not divide so."""
    count = jax.device_count()
    if count % (fsdp * tensor):
        raise ValueError(f"fsdp ({fsdp}) x tensor ({tensor}) must divide the number of devices, {count}")
    if count == 1:
        return None
    return jax.make_mesh((count // (fsdp * tensor), fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def place_parameters(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree, parameters or what an optimizer keeps of them, as the rules say by their paths. Without a
    mesh they stay where they are."""
    if mesh is None:
        return tree

    def placed(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in path]
        return jax.device_put(leaf, parameter_sharding(mesh, ".".join(filter(None, names)), leaf.shape))

    return jax.tree_util.tree_map_with_path(placed, tree)


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
