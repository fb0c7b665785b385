"""Run by test_quantization.py in a process of its own, since JAX must learn of its devices before it first uses one.

Prints JSON: what an int8 target written to the folder argv[1] is on a mesh of 8 CPU devices, and what it and a drafter
over it say there and on one device.
"""

import json
import sys
from pathlib import Path

import jax
from jax.sharding import AxisType

from jaxspec import Drafter, Generator, SamplingParams, load_target
from jaxspec.checkpoints.names import parameter_paths
from jaxspec.quantization import quantized
from tests.drafting import TREE, linked_head, linked_target
from tests.quantizing import relative_error

jax.config.update("jax_num_cpu_devices", 8)
MESH = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
SETTINGS = [SamplingParams(temperature=0), SamplingParams(temperature=1.0, top_p=0.9, seed=3)]


def answers(target, head) -> list:
    """Autoregressive and drafted."""
    drafters = (None, Drafter(head, TREE, "vispec", {}))
    generators = [Generator(target, drafter, max_length=256) for drafter in drafters]
    prompts = ["What is a chart for?"] * len(SETTINGS)
    return [[each.tokens.tolist() for each in made.generate_batch(prompts, None, SETTINGS, 24)] for made in generators]


if __name__ == "__main__":
    target = linked_target(Path(sys.argv[1]))
    head = linked_head(target, "vispec")
    single, sharded = (load_target(target.path, mesh=mesh, quantize="int8") for mesh in (None, MESH))
    ours, theirs = parameter_paths(sharded.model), parameter_paths(single.model)
    inputs = {"input_ids": [list(range(5, 45))]}
    print(
        json.dumps(
            {
                "equal": all((ours[path][...] == theirs[path][...]).all().item() for path in theirs),
                "error": relative_error(sharded.logits(inputs), single.logits(inputs)),
                "layout": {
                    path: [leaf.dtype.name, leaf.shape, list(leaf[...].sharding.spec)] for path, leaf in ours.items()
                },
                "single": answers(single, quantized(head)),
                "sharded": answers(sharded, quantized(head)),
            }
        )
    )
