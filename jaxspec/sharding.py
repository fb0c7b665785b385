"""How parameters lie on a mesh with (some of) the axes `data`, `fsdp`, `tensor`.

One rule per kind of matrix; an axis the mesh lacks, or that does not divide the dimension, is left out.
"""

import re
from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding, PartitionSpec

# Wide matrices split their outputs over `tensor`, the matrices after them their inputs; vectors are replicated.
RULES = (
    (r".*\.(q_proj|k_proj|v_proj|qkv|gate_proj|up_proj|fc1|linear_1|merger\.mlp\.0)\.kernel", ("fsdp", "tensor")),
    (r".*\.(o_proj|out_proj|attn\.proj|down_proj|fc2|linear_2|merger\.mlp\.2)\.kernel", ("tensor", "fsdp")),
    (r".*\.(patch_embedding|patch_embed\.proj)\.kernel|.*\.mm_input_projection_weight", ("fsdp", "tensor")),
    (r".*\.(embed_tokens|position_embedding)\.embedding", ("tensor", "fsdp")),
    (r".*lm_head\.kernel", ("fsdp", "tensor")),
    (r"(.*\.)?(fc|img_fc|convolution\.(embeds|features))\.kernel", ("fsdp", None)),
)


def parameter_sharding(mesh: jax.sharding.Mesh, path: str, shape: Sequence[int]) -> NamedSharding:
    """The sharding of the parameter at a dotted path."""
    for pattern, axes in RULES:
        if re.fullmatch(pattern, path):
            spec = [
                axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            return NamedSharding(mesh, PartitionSpec(*spec))
    return NamedSharding(mesh, PartitionSpec())
