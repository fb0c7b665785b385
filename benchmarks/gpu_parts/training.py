"""A step that trains a ViSpec head for LLaVA-7B, as `train.py` makes it: tokens a second, and how much of the card's
bfloat16 products its mathematics needs."""

import dataclasses
from functools import partial

import jax
import numpy as np
from flax import nnx

from benchmarks.gpu_parts.part import BEFORE, Part, timed
from benchmarks.gpu_parts.runner import nbytes, prompts_of
from benchmarks.published import LLAVA_7B, TOY
from benchmarks.random_models import random_module
from jaxspec.devices import peaks_of
from jaxspec.drafters.vispec import ViSpecHead
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig
from jaxspec.targets.prompts import stack_prompts
from jaxspec.training.drafter import loss_of
from jaxspec.training.flops import flops_of
from jaxspec.training.loop import Constants, make_step
from jaxspec.training.member import initial_state
from jaxspec.training.recipe import Task
from jaxspec.training.vispec import ViSpecRecipe


def measure(part: Part) -> None:
    cost = 0.0
    for rows, length in ((2, 64),) if part.tiny else ((8, 1024), (16, 1024)):
        before = part.passed
        part.trying(f"{rows} x {length}", cost, partial(steps, part, rows, length))
        cost = 1.2 * (part.passed - before)


def steps(part: Part, rows: int, length: int) -> None:
    config = TOY if part.tiny else LLAVA_7B
    recipe = ViSpecRecipe(
        "gpu", target_dtype="float32" if part.tiny else "bfloat16", batch_size=rows, sequence_length=length
    )
    model = random_module(partial(Llava, config), recipe.target_dtype)
    text = dataclasses.replace(config.text.plain(), tie_word_embeddings=False)
    draft_model = random_module(partial(ViSpecHead, recipe.head_config(text)), "float32")
    graph, params, rest = nnx.split(draft_model, lambda path, _: recipe.trains(path), ...)
    model_graph, model_params = nnx.split(model)
    loss = loss_of(recipe, graph, model_graph)
    task = Task(params, (rest, model_params), loss, batches=None, validation=None, export=None)
    constants, state = Constants([task]), [initial_state(recipe, params)]
    step, batch = make_step([recipe], [task], constants), batch_of(config, rows, length)
    counted = flops_of(step, state, constants.arrays, batch)
    metrics = []

    def run() -> None:
        nonlocal state
        state, told = step(state, constants.arrays, batch)
        metrics.append(float(told[0]["loss"]))

    compiling = timed(run, 1)[0]
    seconds = float(np.median(timed(run, 2 if part.tiny else 5)))
    needed, peaks = needed_flops(model, draft_model, recipe, rows, length), peaks_of(jax.devices()[0])
    part.add(
        "training step",
        rows=rows,
        length=length,
        dtype=recipe.target_dtype,
        milliseconds=1e3 * seconds,
        tokens_per_second=rows * length / seconds,
        teraflops_needed=needed / 1e12,
        mfu=needed / seconds / peaks.flops if peaks else None,
        teraflops_counted_by_xla=counted / 1e12,
        first_step_seconds=compiling,
        target_gigabytes=nbytes(model) / 1e9,
        losses=metrics,
    )


def batch_of(config: LlavaConfig, rows: int, length: int) -> dict:
    """An image and text in every row, of which the last two thirds of the text are the answer."""
    prompts = stack_prompts(LlavaAdapter(config), prompts_of(config, rows, length), length)
    asked = BEFORE + config.tokens_per_image + (length - BEFORE - config.tokens_per_image) // 3
    return {"prompts": prompts, "loss_mask": np.broadcast_to(np.arange(length) >= asked, (rows, length))}


def needed_flops(model: Llava, draft_model: ViSpecHead, recipe: ViSpecRecipe, rows: int, length: int) -> float:
    """What the mathematics of a step needs, computed once: the target forward, the head forward and backward in each of
    its runs, logits of both. Two operations for every weight of a matrix and token, attention of a causal sequence."""
    config, tokens, runs = model.config, rows * length, recipe.mtp_steps + 1
    text, vision = config.text, config.vision

    def weights(module: nnx.Module) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module)) if leaf.ndim > 1)

    attention = 2 * text.num_heads * text.head_dim * length * tokens  # half of the pairs, scores and values
    target = 2 * weights(model.language_model.layers) * tokens + text.num_layers * attention
    places = rows * vision.num_patches
    tower = 2 * (weights(model.vision_tower) + weights(model.multi_modal_projector)) * places
    tower += 4 * vision.num_layers * vision.hidden_size * vision.num_patches * places
    entries = rows * (length - config.tokens_per_image)  # the head sees an image as a few
    head = 3 * runs * (2 * (weights(draft_model.layers) + weights(draft_model.fc)) * entries + attention)
    logits = 2 * text.hidden_size * text.vocab_size * entries
    return float(target + tower + head + logits * (1 + 2 * runs))  # no gradient of the frozen LM head
