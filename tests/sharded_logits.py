"""Run by test_sharding.py in a process of its own, since JAX must learn of its devices before it first uses one.

Prints one JSON object about the LLaVA folder in argv[1] on a mesh of 8 CPU devices.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxspec.checkpoints.names import parameter_paths
from jaxspec.targets.images import Images, place
from jaxspec.targets.registry import load_model
from jaxspec.targets.target import full_logits
from tests.folders import batch_of, relative_error

jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
folder = Path(sys.argv[1])
single, sharded = load_model(folder), load_model(folder, mesh=mesh)

inputs = batch_of([2, "i", 3], [1, "i", "i", 2])
arrays = (
    jnp.asarray(inputs["input_ids"], jnp.int32),
    jnp.asarray(inputs["attention_mask"].sum(axis=1)),
    place(single.config.lay_out(inputs), inputs["input_ids"] == single.config.image_token_id),
)
rows = NamedSharding(mesh, PartitionSpec("data"))
whole = NamedSharding(mesh, PartitionSpec())
expected = full_logits(single, *arrays)
places = (rows, rows, Images(pixels=whole, rows=rows, ids=rows))
logits = full_logits(sharded, *jax.device_put(arrays, places))

singles, shards = parameter_paths(single), parameter_paths(sharded)
print(
    json.dumps(
        {
            "devices": jax.device_count(),
            "relative_error": relative_error(logits, jax.device_get(expected)),
            "logits_devices": len(logits.sharding.device_set),
            "equal": all(np.array_equal(shards[path][...], singles[path][...]) for path in singles),
            "shards": {
                path: {
                    "shape": leaf[...].shape,
                    "shard": leaf[...].addressable_shards[0].data.shape,
                    "spec": list(leaf[...].sharding.spec),
                }
                for path, leaf in shards.items()
            },
        }
    )
)
