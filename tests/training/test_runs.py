"""The whole chain of recipes in small: vision tower, target, its answers, a head; stopped runs resume exactly."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import jaxspec
from jaxspec.cli import main
from jaxspec.data.answers import AnswerEncoder, AnswerSource
from jaxspec.demo.generation import numbered_scene
from jaxspec.metrics import pooled
from jaxspec.targets.llava import Llava, LlavaConfig
from jaxspec.training import EagleRecipe, Recipe, Stopped, TargetRecipe, Task, VisionRecipe, run, train
from jaxspec.training.drafter import drafter_task, measured_acceptance
from jaxspec.training.target import grow
from tests.helpers import tiny_llava

SHORT = {
    "dataset_size": 24,
    "log_every": 1,
    "eval_every": 3,
    "eval_batches": 1,
    "checkpoint_every": 2,
    "warmup_steps": 1,
}
TINY_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 2}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "vision_hidden_size": 16}
TINY |= {"vision_intermediate_size": 32, "vision_layers": 2, "vision_heads": 2, "vision_from": None}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder in which vision tower, target (grown from 1 to 2 layers), answers and a ViSpec head were trained."""
    folder = tmp_path_factory.mktemp("runs")
    where = {"run_dir": str(folder), "dataset_dir": str(folder / "data")}
    run(VisionRecipe(name="vision", steps=3, batch_size=4, **TINY_VISION, **SHORT, **where))
    target = {**TINY, "vision_from": str(folder / "vision/export"), "batch_size": 2, "sequence_length": 192}
    run(TargetRecipe(name="shallow", num_layers=1, steps=3, save_dtype="float32", **target, **SHORT, **where))
    target["init_from"] = str(folder / "shallow/export")
    run(TargetRecipe(name="target", num_layers=2, steps=3, **target, **SHORT, **where))
    answer_scenes(folder)
    run(head_recipe(folder, "vispec"))
    return folder


def answer_scenes(folder) -> None:
    """The target's answers to 12 scenes, every other one sampled."""
    files = ["--data", "scenes", "--target", str(folder / "target/export"), "--output", str(folder / "answers")]
    numbers = ["--count", "12", "--batch-size", "4", "--shard-size", "8", "--max-new-tokens", "12"]
    sampling = ["--temperature", "1", "--sampled-share", "0.5", "--compilation-cache", ""]
    cache = jax.config.jax_compilation_cache_dir
    assert main(["distill", *files, *numbers, *sampling]) == 0
    jax.config.update("jax_compilation_cache_dir", cache)


def head_recipe(folder, name, **changes) -> EagleRecipe:
    recipe = EagleRecipe(
        name=name,
        run_dir=str(folder),
        target=str(folder / "target/export"),
        answers_dir=str(folder / "answers"),
        steps=5,
        batch_size=2,
        sequence_length=128,
        validation_records=4,
        **{field: value for field, value in SHORT.items() if field != "dataset_size"},
    )
    return dataclasses.replace(recipe, **changes)


def test_the_chain_ends_in_a_drafter_that_changes_no_answer(runs):
    target = jaxspec.load_target(runs / "target/export")
    drafter = jaxspec.load_drafter(runs / "vispec/export", target)
    assert drafter.method == "vispec" and drafter.about["target_fingerprint"] == target.fingerprint()
    image = np.full((64, 64, 3), 200, np.uint8)
    expected = jaxspec.Generator(target).generate("What is this?", [image], max_new_tokens=16)
    result = jaxspec.Generator(target, drafter).generate("What is this?", [image], max_new_tokens=16)
    np.testing.assert_array_equal(result.tokens, expected.tokens)


def test_a_drafter_of_another_target_is_refused(runs):
    shallow = jaxspec.load_target(runs / "shallow/export")
    with pytest.raises(ValueError, match="was trained for the target"):
        jaxspec.load_drafter(runs / "vispec/export", shallow)


def test_resumed_training_equals_uninterrupted_training(runs):
    # The uninterrupted run stops by itself at 5 of 5; this one after 2, as a kill would leave it.
    recipe = head_recipe(runs, "killed")
    with pytest.raises(RuntimeError, match="killed"):
        train(recipe, dying(recipe, after=3))
    run(recipe)
    resumed = load_file(runs / "killed/export/model.safetensors")
    whole = load_file(runs / "vispec/export/model.safetensors")
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(resumed[name], value)


def dying(recipe: EagleRecipe, after: int) -> Task:
    """The recipe's task, whose data ends in an error after some batches."""
    task = drafter_task(recipe)

    def batches(start):
        for number, batch in enumerate(task.batches(start)):
            if number == after:
                raise RuntimeError("killed")
            yield batch

    return dataclasses.replace(task, batches=batches)


def test_self_distilled_answers_are_the_targets_own(runs):
    source = AnswerSource(runs / "answers")
    assert len(source) == 12
    target = jaxspec.load_target(runs / "target/export")
    for index in (2, 3):
        record, (_, turns) = source[index], numbered_scene("train", index)
        sampling = jaxspec.SamplingParams(temperature=index % 2, seed=index)
        expected = jaxspec.Generator(target).generate(turns[0].question, record["images"], sampling, max_new_tokens=12)
        np.testing.assert_array_equal(record["answer_ids"], expected.tokens)


def test_answers_of_another_target_are_refused(runs):
    recipe = head_recipe(runs, "other", target=str(runs / "shallow/export"))
    with pytest.raises(ValueError, match="are those of the target .*, not of"):
        drafter_task(recipe)


def test_measured_acceptance_is_that_of_the_held_out_prompts(runs):
    target = jaxspec.load_target(runs / "target/export")
    drafter = jaxspec.load_drafter(runs / "vispec/export", target)
    source = AnswerSource(runs / "answers")
    records = [source[index] for index in range(4)]
    encoder = AnswerEncoder(target.processor, target.config)
    questions = [numbered_scene("train", index)[1][0].question for index in range(4)]
    images = [record["images"] for record in records]
    limit = max(len(record["answer_ids"]) for record in records)
    results = jaxspec.Generator(target, drafter).generate_batch(questions, images, max_new_tokens=limit)
    assert measured_acceptance(target, drafter, records, encoder) == pooled([result.stats for result in results])


def small_recipe(folder, **changes) -> Recipe:
    recipe = Recipe(name="small", run_dir=str(folder), steps=8, batch_size=1, warmup_steps=0, log_every=1, eval_every=8)
    return dataclasses.replace(recipe, **changes)


def small_task(on_batch=lambda step: None, loss=lambda params, batch: jnp.sum((params - batch["x"]) ** 2)) -> Task:
    def batches(start):
        for step in range(start, 100):
            on_batch(step)
            yield {"x": jnp.float32(step)}

    return Task(
        params=jnp.zeros((2,)),
        constants=None,
        loss=lambda params, constants, batch, key: (loss(params, batch), {}),
        batches=batches,
        validation=lambda: iter([{"x": jnp.float32(0)}]),
        export=lambda params, folder: None,
    )


def test_sigterm_saves_and_the_next_run_goes_on(tmp_path):
    recipe = small_recipe(tmp_path, checkpoint_every=100)

    def stop(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped, match="run the same command to resume"):
        train(recipe, small_task(stop))
    seen = []
    resumed = train(recipe, small_task(seen.append))
    assert seen[0] in (4, 5)
    np.testing.assert_array_equal(resumed, train(small_recipe(tmp_path / "whole"), small_task()))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    recipe = small_recipe(tmp_path, checkpoint_every=2)
    bad = small_task(loss=lambda params, batch: jnp.where(batch["x"] >= 5, jnp.nan, jnp.sum(params**2)))
    with pytest.raises(FloatingPointError, match="not finite at step 6"):
        train(recipe, bad)
    assert (tmp_path / "small/checkpoints").exists()


def test_grown_target_computes_what_the_shallow_one_does():
    shallow = tiny_llava(layers=2)
    deep_config = dataclasses.replace(shallow.config, text=dataclasses.replace(shallow.config.text, num_layers=6))
    deep = grow(Llava(deep_config, rngs=nnx.Rngs(0)), shallow)
    ids = jnp.arange(1, 13)[None]

    @jax.jit
    def logits(model):
        return model.unembed(model.prefill(model.embed(ids), jnp.array([12]))[0])

    assert isinstance(deep.config, LlavaConfig) and len(deep.language_model.layers) == 6
    np.testing.assert_allclose(logits(deep), logits(shallow), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup_steps": 9}, r"warmup_steps must lie in 0..steps \(8\), got 9"),
    ],
)
def test_impossible_recipes(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        small_recipe(tmp_path, **changes)
