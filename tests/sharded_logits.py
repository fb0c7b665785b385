"""Run by test_sharding.py in a process of its own, since JAX must learn of its devices before it first uses one.

Prints one JSON object about every family, written to and loaded from the folder argv[1], on a mesh of 8 CPU devices.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxspec import Target
from jaxspec.checkpoints.names import parameter_paths
from jaxspec.demo.processor import build_processor
from jaxspec.prompting import encode_prompt
from jaxspec.targets.images import Images, stack_positions
from jaxspec.targets.registry import config_from, load_model
from jaxspec.targets.target import full_logits
from tests.families import FAMILIES, TEXT
from tests.folders import relative_error, write_random
from tests.helpers import config_for

jax.config.update("jax_num_cpu_devices", 8)
MESH = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
WHOLE, ROWS, SECOND = (NamedSharding(MESH, PartitionSpec(*axes)) for axes in ((), ("data",), (None, "data")))
PICTURES = [np.random.default_rng(7).integers(0, 256, shape, np.uint8) for shape in ((40, 60, 3), (60, 40, 3))]


def llava(folder: Path):
    processor = build_processor(folder / "llava_processor_files", scenes=300)
    config = config_for(processor, **TEXT, attention_bias=True)
    config.text_config.vocab_size = len(processor.tokenizer) | 1  # odd: the vocabulary cannot be split by 2
    return config, processor


def batch(target: Target):
    """Arguments of `full_logits` after the model: two prompts, the second with a picture more."""
    images = [PICTURES[:1], PICTURES] if target.adapter.image_token_ids else [(), ()]
    questions = ("How many shapes are there in it?", "Compare.")
    prompts = [encode_prompt(target, *row) for row in zip(questions, images, strict=True)]
    lengths = np.array([len(prompt.input_ids) for prompt in prompts])
    ids = np.full((2, lengths.max()), -1, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt.input_ids)] = prompt.input_ids
    placed = target.adapter.place([layout for prompt in prompts for layout in prompt.images], ids)
    positions = stack_positions([prompt.position_ids for prompt in prompts], ids.shape[1])
    return np.maximum(ids, 0), lengths, placed, positions


def report(folder: Path, config, processor) -> dict:
    write_random(folder, config)
    single, sharded = load_model(folder), load_model(folder, mesh=MESH)
    adapter = config_from(folder)[0].adapter(single.config)
    ids, lengths, images, positions = batch(Target(single, adapter, processor, folder, ()))
    expected = full_logits(single, ids, lengths, images, positions)
    places = (ROWS, ROWS, images and Images(pixels=WHOLE, index=ROWS, ids=ROWS), None if positions is None else SECOND)
    logits = full_logits(sharded, *jax.device_put((ids, lengths, images, positions), places))
    real = np.arange(ids.shape[1]) < lengths[:, None]
    singles, shards = parameter_paths(single), parameter_paths(sharded)
    return {
        "images": images is not None,
        "relative_error": relative_error(np.asarray(logits)[real], np.asarray(expected)[real]),
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


if __name__ == "__main__":
    root = Path(sys.argv[1])
    models = {"llava": llava(root), **{name: build() for name, build in FAMILIES.items()}}
    families = {name: report(root / name, *model) for name, model in models.items()}
    print(json.dumps({"devices": jax.device_count(), "families": families}))
