"""Times of one round at published shapes, with random weights: what the implementation keeps of what a drafter earns.

    python benchmarks/gpu.py --output docs/results/h200                # 7B shapes on an accelerator, bfloat16
    python benchmarks/gpu.py --shapes tiny --dtype float32 --output runs/gpu    # the same code on any machine

A drafter that earns `a` tokens a round speeds decoding up by `a * t_step / t_round`, so `efficiency` (speed-up divided
by mean acceptance length) is `t_step / t_round`, whatever the weights: times of an autoregressive step and of a round
of proposing, verifying and committing say it all. `bandwidth_share` compares the step with the time in which the
device's memory yields every weight once. Medians over runs that take turns.
"""

import dataclasses
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.eagle import EagleConfig
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.vispec import ViSpecConfig
from jaxspec.layers import TextConfig
from jaxspec.programs import Programs
from jaxspec.rope import RopeConfig
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.state import Request
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig
from jaxspec.targets.prompts import EncodedPrompt

CLIP = ClipVisionConfig(1024, 4096, 24, 16, 336, 14)
SMALL_CLIP = ClipVisionConfig(32, 64, 2, 2, 28, 14)
SHAPES = {  # config.json of llava-hf/llava-1.5-7b-hf; the text model of Qwen2.5-VL-7B-Instruct; a toy
    "llava-7b": LlavaConfig(TextConfig(32064, 4096, 11008, 32, 32, 32, 128), CLIP, 32000),
    "qwen-7b-text": LlavaConfig(
        TextConfig(152064, 3584, 18944, 28, 28, 4, 128, rope=RopeConfig(1e6), qkv_bias=True), CLIP, 151655
    ),
    "tiny": LlavaConfig(TextConfig(320, 64, 128, 2, 4, 2, 16), SMALL_CLIP, 319),
}
HEADS = {
    "eagle2": ("eagle2", lambda text: EagleConfig(text, qkv_bias=text.qkv_bias)),
    "vispec": ("vispec", lambda text: ViSpecConfig(text, qkv_bias=text.qkv_bias)),
    "vispec-eighth": (
        "vispec",
        lambda text: ViSpecConfig(text, qkv_bias=text.qkv_bias, draft_vocab_size=text.vocab_size // 8),
    ),
}
"""Name -> method and config; "vispec-eighth" drafts an eighth of the vocabulary."""
TREES = {"published": None, "3/8/30": TreeConfig(3, 8, 30), "chain of 5": TreeConfig.chain(5)}
MEMORY = {"H200": 4.8e12, "H100": 3.35e12, "A100": 2.0e12, "TPU v5e": 8.2e11, "TPU v5p": 2.77e12, "TPU v6e": 1.64e12}
"""Bytes a second, from the makers' data sheets."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What to time."""

    output: Path
    shapes: tuple[Literal["llava-7b", "qwen-7b-text", "tiny"], ...] = ("llava-7b", "qwen-7b-text")
    heads: tuple[Literal["eagle2", "vispec", "vispec-eighth"], ...] = ("eagle2", "vispec", "vispec-eighth")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_sizes: tuple[int, ...] = (1, 8)
    rounds: int = 64
    """In one timed run."""
    runs: int = 5

    def write(self) -> None:
        rows = [row for shape in self.shapes for batch in self.batch_sizes for row in self.measure(shape, batch)]
        device = jax.devices()[0]
        about = {"device": device.device_kind, "jax": jax.__version__, **dataclasses.asdict(self), "rows": rows}
        self.output.mkdir(parents=True, exist_ok=True)
        temporary = self.output / "rounds.json.tmp"
        temporary.write_text(json.dumps(about, indent=2, default=str) + "\n")
        temporary.replace(self.output / "rounds.json")

    def measure(self, shape: str, batch: int):
        """A row per arm."""
        config = SHAPES[shape]
        model = random_module(partial(Llava, config), self.dtype)
        arms = {"autoregressive": (None, TreeConfig.autoregressive())}
        for name in self.heads:
            method, config_of = HEADS[name]
            head = config_of(config.text.plain())
            draft_model = random_module(partial(METHODS[method].module, head), self.dtype)
            for label, tree in TREES.items():
                arms[f"{name}, {label}"] = draft_model, tree or METHODS[method].tree
        runners = {name: Runner(config, model, *arm, batch, self.rounds) for name, arm in arms.items()}
        times = {name: [] for name in runners}
        for _ in range(self.runs):
            for name, runner in runners.items():
                times[name].append(runner())
        prefill, step = (statistics.median(pair[i] for pair in times["autoregressive"]) for i in (0, 1))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model.language_model)))
        speed = next((value for kind, value in MEMORY.items() if kind in jax.devices()[0].device_kind), None)
        for name, (_, tree) in arms.items():
            seconds = statistics.median(pair[1] for pair in times[name])
            yield {
                "shape": shape, "batch": batch, "arm": name, "nodes": tree.total_tokens,
                "round_ms": 1e3 * seconds, "efficiency": step / seconds, "prefill_ms": 1e3 * prefill,
                "bandwidth_share": None if speed is None else weights / speed / step,
            }  # fmt: skip
            share = "" if speed is None else f", {weights / speed / step:.2f} of memory speed in a step"
            print(
                f"{shape} batch {batch} {name}: {1e3 * seconds:.2f} ms, efficiency {step / seconds:.2f}{share}",
                flush=True,
            )


class Runner:
    """Prefill once more and decode `rounds` rounds; seconds of the prefill and of one round."""

    def __init__(self, config: LlavaConfig, model, draft_model, tree: TreeConfig, batch: int, rounds: int):
        rng = np.random.default_rng(0)
        ids = rng.integers(0, config.image_token_id, 32 + config.tokens_per_image + 16)
        ids[32 : 32 + config.tokens_per_image] = config.image_token_id
        pixels = rng.standard_normal((1, 3, config.vision.image_size, config.vision.image_size), np.float32)
        adapter = LlavaAdapter(config)
        images = adapter.lay_out({"pixel_values": pixels})
        self.prompts = [EncodedPrompt(ids, images)] * batch
        limit = rounds * (tree.max_depth + 1) + 1
        params, lengths = [SamplingParams()] * batch, [limit] * batch
        self.request = Request.of(params, [ids] * batch, lengths, (), config.text.vocab_size)
        self.rounds, self.capacity = rounds, len(ids) + limit
        self.programs = Programs(model, adapter, draft_model, tree)
        self.params = self.programs.params_of(model, draft_model)
        self()

    def __call__(self) -> tuple[float, float]:
        programs, params = self.programs, self.params
        started = time.perf_counter()
        read = programs.read(params, self.prompts, self.capacity)
        state = jax.block_until_ready(programs.begin(params, read, self.request, self.prompts, self.capacity))
        prefilled = time.perf_counter()
        state = jax.block_until_ready(programs.decode(params, state, jnp.int32(self.rounds)))
        ended = time.perf_counter()
        done = int(np.asarray(state.rounds).min())
        if done != self.rounds:
            raise RuntimeError(f"{done} rounds were run instead of {self.rounds}")
        return prefilled - started, (ended - prefilled) / self.rounds


def random_module(build, dtype: str) -> nnx.Module:
    """The module that `build(rngs=)` makes, with random weights at fan-in scale, drawn on the device in `dtype`;
    integers count up."""
    graph, state = nnx.split(abstract(lambda rngs: build(rngs=rngs)))
    leaves, tree = jax.tree.flatten(state)

    @jax.jit
    def draw():
        keys = jax.random.split(jax.random.key(0), len(leaves))
        scale = [1.0 if leaf.ndim < 2 else leaf.shape[0] ** -0.5 for leaf in leaves]
        return [
            (s * jax.random.normal(key, leaf.shape)).astype(dtype)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)
            for key, leaf, s in zip(keys, leaves, scale, strict=True)
        ]

    return nnx.merge(graph, jax.tree.unflatten(tree, draw()))


if __name__ == "__main__":
    tyro.cli(Rounds, description=__doc__).write()
