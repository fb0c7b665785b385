"""Run by test_ray.py with two devices: what a tensor-parallel replica's engine answers, and how its parameters lie."""

import dataclasses
import json

import jax
from flax import nnx

from deploy.ray_serve import RayServe
from jaxspec import Generator, SamplingParams, load_drafter, load_target
from jaxspec.cli.options import ModelOptions
from jaxspec.prompting import encode_prompt
from jaxspec.serving.requests import EngineSettings
from tests.serving.asking import ONE, TEXT

ASKED = [(messages, each) for messages in (TEXT, ONE) for each in (SamplingParams(), SamplingParams(1.0, seed=3))]
TOKENS = 24


class Quick(RayServe):
    """Compiles what is needed, and nothing beforehand."""

    def engine_settings(self, adaptive: bool) -> EngineSettings:
        return dataclasses.replace(super().engine_settings(adaptive), warm_up=False)


def main() -> None:
    options = Quick(ModelOptions(max_length=256, tensor=2), max_num_seqs=2)
    with options.load_engine() as engine:
        streams = [
            engine.submit(encode_prompt(engine.target, messages), sampling, TOKENS) for messages, sampling in ASKED
        ]
        answers = [stream.result().text for stream in streams]
        split = [
            sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(nnx.state(model)))
            for model in (engine.target.model, engine.drafter.model)
        ]
    target = load_target("demo")
    generator = Generator(target, load_drafter("demo:vispec", target), max_length=256)
    expected = [generator.generate(messages, (), sampling, TOKENS).text for messages, sampling in ASKED]
    print(json.dumps({"answers": answers, "expected": expected, "split": split}))


if __name__ == "__main__":
    main()
