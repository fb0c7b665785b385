"""Temporary memory of prefill and of training losses at 7B shapes, as XLA plans it: nothing is run, no weight is held.

    python -m benchmarks.memory                    # compiles for the machine at hand; minutes on 2 cores
    python -m benchmarks.memory --only train       # or prefill, or a part of a name

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

from benchmarks.published import LLAVA_7B
from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.contract import DraftModel
from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.massv import MassvConfig, MassvDrafter
from jaxspec.drafters.specvlm import SpecVLMConfig, SpecVLMHead
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.layers import TextConfig
from jaxspec.programs import CHUNK
from jaxspec.speculation import loop, prefill
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.state import Request
from jaxspec.targets.chunks import steps_of
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig
from jaxspec.targets.prompts import EncodedPrompt, PromptBatch, stack_prompts
from jaxspec.training.drafter import DrafterRecipe, teach
from jaxspec.training.eagle import EagleRecipe
from jaxspec.training.massv import MassvRecipe
from jaxspec.training.specvlm import SpecVLMRecipe
from jaxspec.training.vispec import ViSpecRecipe

LLAMA_1B = TextConfig(32064, 2048, 5632, 22, 32, 4, 64)  # TinyLlama's sizes
HEAD = dataclasses.replace(LLAVA_7B.text, num_layers=1)
DRAFTERS: dict[str, Callable[..., DraftModel] | None] = {
    "no drafter": None,
    "EAGLE-2": partial(EagleHead, EagleConfig(HEAD)),
    "ViSpec": partial(ViSpecHead, ViSpecConfig(HEAD)),
    "SpecVLM": partial(SpecVLMHead, SpecVLMConfig(HEAD)),
    "MASSV": partial(MassvDrafter, MassvConfig(LLAMA_1B, vision_width=LLAVA_7B.vision_width)),
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
    """Tokens of a prompt."""
    chunk: int = CHUNK
    """Tokens that are read at a time, beside all at once. Reported is the last chunk and what comes before a round."""
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
        model = in_dtype(abstract(lambda rngs: Llava(config, rngs=rngs)), dtype)
        for name, build in DRAFTERS.items():
            draft_model = build and abstract(partial(self.shallow, build))
            head = draft_model and in_dtype(draft_model, dtype)
            for chunk in (self.rows, self.chunk):
                program = partial(self.prefill, config, model, head, chunk)
                self.report(f"prefill, {name}, 1 x {self.rows} in chunks of {chunk}", program)
            if name in RECIPES:
                training = partial(self.training, config, model, draft_model, RECIPES[name])
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

    def prefill(
        self, config: LlavaConfig, model: nnx.Module, draft_model: nnx.Module | None, chunk: int
    ) -> jax.stages.Lowered:
        capacity = self.rows + 256
        request = Request.of([SamplingParams()], [np.zeros(0, np.int32)], [256], (), config.text.vocab_size)
        step = steps_of(LlavaAdapter(config), [encoded(config, self.rows)], chunk, capacity)[-1]
        tokens = step.chunk
        shape = tokens.input_ids.shape
        vision = jnp.zeros((*shape, config.vision_width), model.dtype) if prefill.reads_vision(draft_model) else None
        images = prefill.ImageFeatures(jnp.zeros((*shape, config.text.hidden_size), model.dtype), vision)

        @jax.jit
        def run(model, draft_model, before, tokens, images, request):
            read = prefill.read_chunk(model, draft_model, before, tokens, images)
            return loop.begin(model, draft_model, read, request, jnp.zeros(1, jnp.int32), capacity, 1)

        before = None
        if chunk < self.rows:
            before = jax.eval_shape(lambda: prefill.nothing_read(model, draft_model, 1, capacity))
        return run.lower(model, draft_model, before, tokens, images, request)

    def training(
        self, config: LlavaConfig, model: nnx.Module, draft_model: nnx.Module, recipe: DrafterRecipe
    ) -> jax.stages.Lowered:
        batch = {
            "prompts": prompts(config, self.batch, self.sequence_length),
            "loss_mask": np.ones((self.batch, self.sequence_length), bool),
        }
        graph, params = nnx.split(draft_model)

        @jax.jit
        def run(params, model, batch, key):
            def loss(params):
                draft_model = nnx.merge(graph, params)
                return recipe.loss(draft_model, model, teach(model, batch, key, prefill.taps_of(draft_model)), key)

            return jax.value_and_grad(loss, has_aux=True)(params)

        return run.lower(params, model, batch, jax.random.key(0))


def encoded(config: LlavaConfig, length: int) -> EncodedPrompt:
    """One image and text."""
    ids = np.full(length, 5, np.int32)
    ids[8 : 8 + config.tokens_per_image] = config.image_token_id
    pixels = np.zeros((1, *config.vision.pixel_shape), np.float32)
    return EncodedPrompt(ids, LlavaAdapter(config).lay_out({"pixel_values": pixels}))


def prompts(config: LlavaConfig, batch: int, length: int) -> PromptBatch[np.ndarray]:
    return stack_prompts(LlavaAdapter(config), [encoded(config, length)] * batch, length)


def in_dtype(module: Any, dtype: str) -> Any:
    """An abstract module with its parameters in `dtype`."""

    def cast(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)

    return jax.tree.map(cast, module)


if __name__ == "__main__":
    tyro.cli(Memory, description=__doc__).write()
