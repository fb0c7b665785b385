"""Run by test_sharded_decoding.py in a process of its own, since JAX must learn of its devices before it uses one.

Decodes with the drafters argv[3:] and the target of folder argv[2] on the mesh argv[1], "data x fsdp x tensor" of 8
CPU devices, and prints one JSON object: what they answer, beside one device's autoregressive decoding, and what moves
between the devices in a round.
"""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from jaxspec import Drafter, Generator, SamplingParams, load_target
from jaxspec.drafters.contract import DraftModel
from jaxspec.generator import Batch
from jaxspec.prompting import encode_prompt
from jaxspec.sharding import AXES, head_dims_of, place_parameters
from tests.drafting import DRAFTERS

jax.config.update("jax_num_cpu_devices", 8)
TOKENS, ROWS, MAX_LENGTH = 16, 8, 128
KINDS = {
    "0": [SamplingParams()],
    "1": [SamplingParams(1.0)],
    "top-p 0.9": [SamplingParams(1.0, top_p=0.9)],
    "mixed": [SamplingParams(0.7, top_k=20), SamplingParams(1.0, min_p=0.05), SamplingParams(), SamplingParams(1.5)],
}
PENALISED = {"penalised": [SamplingParams(1.0, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.5)]}
MOVES = r"= \(?([^=]*?)\)? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def mesh_of_8(shape: str) -> Mesh:
    sizes = tuple(map(int, shape.split("x")))
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def on_mesh(model: DraftModel, mesh: Mesh) -> DraftModel:
    """A draft model as `load_drafter` would put it there."""
    graph, params = nnx.split(model)
    return nnx.merge(graph, place_parameters(params, mesh, head_dims_of(model)))


def batch(generator: Generator, params: list[SamplingParams], number: int = ROWS) -> Batch:
    """Prompts of different lengths, some with pictures; each row has a seed of its own."""
    rng = np.random.default_rng(7)
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 60, 3), (130, 90, 3))]
    asked = [("What is a chart for?", []), ("How many shapes are there?", pictures[:1]), ("Compare.", pictures)]
    prompts = [encode_prompt(generator.target, *asked[row % 3]) for row in range(number)]
    sampling = [dataclasses.replace(params[row % len(params)], seed=row) for row in range(number)]
    return generator._batch(prompts, sampling, TOKENS)


def answers(generator: Generator, kinds: dict[str, list[SamplingParams]], number: int = ROWS) -> dict[str, list]:
    return {
        kind: [each.tokens.tolist() for each in batch(generator, params, number).run()]
        for kind, params in kinds.items()
    }


def moved(generator: Generator) -> list[str]:
    """What the decode program sends between devices: kind and shape of every collective."""
    state = batch(generator, KINDS["top-p 0.9"]).start()
    programs, params = generator.programs, generator._params
    text = programs._decode.lower(params, state, jnp.int32(1), programs.tree).compile().as_text()
    return [f"{kind} {shape}" for shape, kind in re.findall(MOVES, text)]


def main() -> None:
    shape, folder, *names = sys.argv[1:]
    mesh, kinds = mesh_of_8(shape), KINDS
    target, split = load_target(folder), load_target(folder, mesh=mesh)
    report: dict = {"expected": answers(Generator(target, max_length=MAX_LENGTH), kinds), "drafters": {}}
    for name in names:
        drafter = None
        if name != "autoregressive":
            own = DRAFTERS[name](target)
            drafter = Drafter(on_mesh(own.model, mesh), own.tree, own.method, {})
        generator = Generator(split, drafter, max_length=MAX_LENGTH)
        found = answers(generator, kinds)
        compiled = generator.compilations
        again = answers(generator, {"1": kinds["1"]})
        cache = batch(generator, kinds["0"]).start().cache.layers[0].keys
        report["drafters"][name] = {
            "answers": found,
            "the same again": again["1"] == found["1"] and generator.compilations == compiled,
            "cache": [cache.shape, cache.addressable_shards[0].data.shape],
            "moved": moved(generator),
        }
    print(json.dumps(report | {"vocabulary": target.model.vocab_size}))


if __name__ == "__main__":
    main()
