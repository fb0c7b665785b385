"""No program holds an array over all pairs of a long sequence's tokens: not in prefill, nor in a loss and its gradient.

The programs are traced, not compiled. What has two long axes, or as many numbers as there are pairs, would be scores or
masks of all pairs; widths, vocabulary and blocks are smaller than that.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec import SamplingParams
from jaxspec.kernels import plain
from jaxspec.prompting import encode_prompt
from jaxspec.speculation import loop, prefill
from jaxspec.speculation.prefill import ImageFeatures
from jaxspec.speculation.state import Request
from jaxspec.targets.chunks import Chunk
from jaxspec.targets.prompts import stack_prompts
from jaxspec.targets.reading import read_prompts
from jaxspec.training.drafter import DrafterRecipe, teach
from jaxspec.training.eagle import EagleRecipe
from jaxspec.training.losses import next_token_loss
from jaxspec.training.massv import MassvRecipe
from jaxspec.training.specvlm import SpecVLMRecipe
from jaxspec.training.vispec import ViSpecRecipe
from tests.drafting import fresh_head, linked_lm
from tests.families import family_target
from tests.test_dtypes import equations

BATCH, LENGTH, LONG = 2, 2048, 700
MORE = 512
ROOM = LENGTH + MORE + 24
RECIPES: dict[str, DrafterRecipe] = {
    "eagle2": EagleRecipe("long"),
    "vispec": ViSpecRecipe("long"),
    "specvlm": SpecVLMRecipe("long"),
    "concat": SpecVLMRecipe("long"),
    "massv": MassvRecipe("long"),
}


def pairs(jaxpr) -> list[str]:
    """Of a program and those inside it, what has two axes of at least `LONG` or is as large as all pairs."""
    found = (
        (scope, equation.primitive, variable.aval.shape)
        for scope, equation in equations(jaxpr)
        for variable in equation.outvars
    )
    return [
        f"{scope} {primitive} {shape}"
        for scope, primitive, shape in found
        if sum(n >= LONG for n in shape) > 1 or np.prod(shape, dtype=np.int64) >= BATCH * LENGTH**2
    ]


def draft_model_of(target, name: str):
    return linked_lm(target, True, 643) if name == "massv" else fresh_head(target, name, 1)


def prompts(target, pictures):
    encoded = [encode_prompt(target, "What is that?", pictures[:count]) for count in (1, 2)]
    return stack_prompts(target.adapter, encoded, LENGTH)


def prefill_program(target, draft_model, pictures):
    """A first chunk of `LENGTH` tokens, another one behind it, and what comes before the first round."""
    prompt = prompts(target, pictures)
    chunk = Chunk(prompt.input_ids, prompt.lengths, prompt.image_ids, prompt.position_ids)
    params = [SamplingParams(temperature=0.7)] * BATCH
    request = Request.of(params, prompt.input_ids, [16] * BATCH, (), target.model.vocab_size)

    def run(model, draft_model, prompt):
        vision = None
        if prefill.reads_vision(draft_model):
            vision = jnp.zeros((BATCH, LENGTH, model.config.vision_width))
        images = ImageFeatures(model.embed(prompt.input_ids, prompt.images), vision)
        read = prefill.read_chunk(model, draft_model, None, chunk, images)
        second = Chunk(prompt.input_ids[:, :MORE], jnp.full(BATCH, MORE), -jnp.ones((BATCH, MORE), jnp.int32))
        if prompt.position_ids is not None:
            second = dataclasses.replace(second, position_ids=prompt.position_ids[:, :, :MORE])
        read = prefill.read_chunk(model, draft_model, prefill.with_room(read, ROOM), second, images)
        return loop.begin(model, draft_model, read, request, jnp.zeros(BATCH, jnp.int32), ROOM, 2)

    return jax.make_jaxpr(run)(target.model, draft_model, prompt).jaxpr


def training_program(target, draft_model, recipe, pictures):
    batch = {"prompts": prompts(target, pictures), "loss_mask": np.ones((BATCH, LENGTH), bool)}
    graph, params = nnx.split(draft_model)

    def loss(params, model, key):
        draft_model = nnx.merge(graph, params)
        return recipe.loss(draft_model, model, teach(model, batch, key, prefill.taps_of(draft_model)), key)

    gradient = jax.grad(loss, has_aux=True)
    return jax.make_jaxpr(gradient)(params, target.model, jax.random.key(0)).jaxpr


@pytest.mark.parametrize("name", RECIPES)
def test_prefill_and_losses(name, target, pictures):
    draft_model = draft_model_of(target, name)
    assert not pairs(prefill_program(target, draft_model, pictures))
    assert not pairs(training_program(target, draft_model, RECIPES[name], pictures))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_prefill_of_other_families(family, pictures):
    assert not pairs(prefill_program(family_target(family), None, pictures))


def test_training_a_text_model(target, pictures):
    prompt, mask = prompts(target, pictures), jnp.ones((BATCH, LENGTH), bool)

    def loss(model):
        features = read_prompts(model, prompt).features
        return next_token_loss(model.language_model, features, prompt.input_ids, mask)[0]

    graph, params = nnx.split(target.model)
    program = jax.make_jaxpr(jax.grad(lambda params: loss(nnx.merge(graph, params))))(params)
    assert not pairs(program.jaxpr)


def test_the_walk_sees_attention_that_is_not_in_blocks(target, pictures, monkeypatch):
    monkeypatch.setattr(plain, "LONG", LENGTH + 1)
    draft_model = draft_model_of(target, "eagle2")
    assert any("attention" in each for each in pairs(prefill_program(target, draft_model, pictures)))
    assert any(
        "attention" in each for each in pairs(training_program(target, draft_model, RECIPES["eagle2"], pictures))
    )


def test_the_walk_sees_what_a_backward_pass_keeps(target, pictures, monkeypatch):
    """Blocks whose scores are kept for the gradient are all pairs again, one block after another."""
    monkeypatch.setattr(plain.jax, "checkpoint", lambda function: function)
    program = training_program(target, draft_model_of(target, "eagle2"), RECIPES["eagle2"], pictures)
    assert any("attention" in each for each in pairs(program))
