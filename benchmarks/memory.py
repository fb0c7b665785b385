"""Temporary memory of prefill and of training losses at 7B shapes, as XLA plans it: nothing is run, no weight is held.

    python benchmarks/memory.py                    # compiles for the machine at hand; minutes on 2 cores
    python benchmarks/memory.py --only train       # or prefill, or a part of a name

Programs are compiled with abstract parameters in float32 on a CPU and in bfloat16 elsewhere (the drafter that learns is
float32 as in training). Temporaries of a pass forward do not grow with its layers, so the target has only a few.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.contract import DraftModel
from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.massv import MassvConfig, MassvDrafter
from jaxspec.drafters.specvlm import SpecVLMConfig, SpecVLMHead
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.layers import TextConfig
from jaxspec.speculation import loop
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.llava import Llava, LlavaConfig
from jaxspec.targets.prompts import EncodedPrompt, PromptBatch, stack_prompts
from jaxspec.training.drafter import DrafterRecipe, teach
from jaxspec.training.eagle import EagleRecipe
from jaxspec.training.massv import MassvRecipe
from jaxspec.training.specvlm import SpecVLMRecipe
from jaxspec.training.vispec import ViSpecRecipe

CLIP = ClipVisionConfig(1024, 4096, 24, 16, 336, 14)
LLAVA_7B = LlavaConfig(TextConfig(32064, 4096, 11008, 32, 32, 32, 128), CLIP, 32000)
LLAMA_1B = TextConfig(32064, 2048, 5632, 22, 32, 4, 64)  # TinyLlama's sizes
HEAD = dataclasses.replace(LLAVA_7B.text, num_layers=1)
DRAFTERS: dict[str, Callable[..., DraftModel] | None] = {
    "no drafter": None,
    "EAGLE-2": partial(EagleHead, EagleConfig(HEAD)),
    "ViSpec": partial(ViSpecHead, ViSpecConfig(HEAD)),
    "SpecVLM": partial(SpecVLMHead, SpecVLMConfig(HEAD)),
    "MASSV": partial(MassvDrafter, MassvConfig(LLAMA_1B, vision_width=CLIP.hidden_size)),
}
RECIPES: dict[str, DrafterRecipe] = {
    "EAGLE-2": EagleRecipe("memory"),
    "ViSpec": ViSpecRecipe("memory"),
    "SpecVLM": SpecVLMRecipe("memory"),
    "MASSV": MassvRecipe("memory"),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """What to compile."""

    layers: int = 2
    """Of the target and of MASSV's text model."""
    rows: int = 2048
    """Of a prompt."""
    sequence_length: int = 3584
    """Of a sequence in training."""
    batch: int = 16
    """In training."""
    only: str = ""
    """Programs whose name has this in it."""

    def write(self) -> None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {dtype}, {self.layers} layers in the target\n")
        print("| program | temporaries, GB | compiled in, s |\n|---|---|---|")
        config = dataclasses.replace(LLAVA_7B, text=dataclasses.replace(LLAVA_7B.text, num_layers=self.layers))
        target = in_dtype(abstract(lambda rngs: Llava(config, rngs=rngs)), dtype)
        for name, build in DRAFTERS.items():
            drafter = build and abstract(partial(self.shallow, build))
            prefill = partial(self.prefill, config, target, drafter and in_dtype(drafter, dtype))
            self.report(f"prefill, {name}, 1 x {self.rows}", prefill)
            if name in RECIPES:
                training = partial(self.training, config, target, drafter, RECIPES[name])
                self.report(f"train, {name}, {self.batch} x {self.sequence_length}", training)

    def shallow(self, build: Callable[..., DraftModel], rngs: nnx.Rngs) -> DraftModel:
        if build.func is MassvDrafter:
            text = dataclasses.replace(build.args[0].text, num_layers=self.layers)
            return MassvDrafter(dataclasses.replace(build.args[0], text=text), rngs=rngs)
        return build(rngs=rngs)

    def report(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> None:
        if self.only not in name:
            return
        started = time.perf_counter()
        analysis = lower().compile().memory_analysis()
        seconds = time.perf_counter() - started
        print(f"| {name} | {analysis.temp_size_in_bytes / 1e9:.2f} | {seconds:.0f} |", flush=True)

    def prefill(self, config: LlavaConfig, target: nnx.Module, drafter: nnx.Module | None) -> jax.stages.Lowered:
        prompt, new = prompts(config, 1, self.rows), 256
        request = loop.Request(BatchSampling.from_params([SamplingParams()]), np.full(1, new), np.full((1, 1), -1))

        @jax.jit
        def run(target, drafter, prompt, request):
            return loop.prefill(target, drafter, TreeConfig.chain(4), prompt, request, self.rows + new, new)

        return run.lower(target, drafter, prompt, request)

    def training(
        self, config: LlavaConfig, target: nnx.Module, drafter: nnx.Module, recipe: DrafterRecipe
    ) -> jax.stages.Lowered:
        batch = {
            "prompts": prompts(config, self.batch, self.sequence_length),
            "loss_mask": np.ones((self.batch, self.sequence_length), bool),
        }
        graph, params = nnx.split(drafter)

        @jax.jit
        def run(params, target, batch, key):
            def loss(params):
                drafter = nnx.merge(graph, params)
                return recipe.loss(drafter, target, teach(target, batch, key, loop.taps_of(drafter)), key)

            return jax.value_and_grad(loss, has_aux=True)(params)

        return run.lower(params, target, batch, jax.random.key(0))


def prompts(config: LlavaConfig, batch: int, length: int) -> PromptBatch[np.ndarray]:
    """One image and text in every row."""
    ids = np.full(length, 5, np.int32)
    ids[8 : 8 + config.tokens_per_image] = config.image_token_id
    pixels = np.zeros((1, *config.vision.pixel_shape), np.float32)
    return stack_prompts(config, [EncodedPrompt(ids, config.lay_out({"pixel_values": pixels}))] * batch, length)


def in_dtype(module: Any, dtype: str) -> Any:
    """An abstract module with its parameters in `dtype`."""

    def cast(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)

    return jax.tree.map(cast, module)


if __name__ == "__main__":
    tyro.cli(Memory, description=__doc__).write()
