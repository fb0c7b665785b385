"""The whole chain of recipes in small: vision tower, target, its answers, a head; stopped runs resume exactly."""

import dataclasses
import json
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
from jaxspec.data.conversations import ConversationEncoder
from jaxspec.data.sources import open_conversations
from jaxspec.demo.generation import numbered_scene
from jaxspec.metrics import pooled
from jaxspec.targets.llava import Llava, LlavaConfig
from jaxspec.training import (
    MassvRecipe,
    MedusaRecipe,
    Recipe,
    SmallLanguageModelRecipe,
    Stopped,
    TargetRecipe,
    Task,
    VisionRecipe,
    ViSpecRecipe,
    run,
    train,
)
from jaxspec.training.acceptance import measured_acceptance, summary
from jaxspec.training.checkpoints import LATEST, manager
from jaxspec.training.drafter import COMMON as OF_DRAFTERS
from jaxspec.training.drafter import drafter_task
from jaxspec.training.loop import COMMON
from jaxspec.training.target import grow
from tests.helpers import answer_scenes, tiny_llava

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
    answer_scenes(folder / "target/export", folder / "answers", 12)
    run(head_recipe(folder, "vispec"))
    return folder


def head_recipe(folder, name, **changes) -> ViSpecRecipe:
    recipe = ViSpecRecipe(
        name=name,
        run_dir=str(folder),
        target=str(folder / "target/export"),
        answers_dir=str(folder / "answers"),
        steps=5,
        batch_size=2,
        sequence_length=128,
        validation_records=4,
        acceptance_every=3,
        acceptance_at_temperature_1=True,
        save_dtype="float32",
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
    for a, b in zip(*(jax.tree.leaves(final_state(runs / name)) for name in ("killed", "vispec")), strict=True):
        np.testing.assert_array_equal(a, b)


def final_state(folder) -> dict:
    """Step, parameters and optimizer state, as saved last."""
    with manager(folder / LATEST, read_only=True) as source:
        return source.restore(source.latest_step())


def test_the_recorded_acceptance_is_what_decoding_earns(runs):
    recipe, target = head_recipe(runs, "vispec"), jaxspec.load_target(runs / "target/export")
    drafter = jaxspec.load_drafter(runs / "vispec/export", target)
    answers, encoder = AnswerSource(runs / "answers"), AnswerEncoder(target.processor, target.adapter)
    records = [answers[index] for index in range(recipe.validation_records)]
    prompts, limit = [encoder.encode_question(record)[0] for record in records], longest_answer(records)
    generator = jaxspec.Generator(target, drafter)
    accepted = {t: measured_acceptance(generator, prompts, limit, t) for t in (0.0, 1.0)}
    assert drafter.about.items() >= summary(drafter.about["step"], accepted).items()
    lines = [json.loads(line) for line in (runs / "vispec/log.jsonl").read_text().splitlines()]
    told = [(line["step"], line["temperature"]) for line in lines if line["split"] == "acceptance"]
    assert told == [(3, 0.0), (3, 1.0), (5, 0.0), (5, 1.0)]
    steps = [line for line in lines if line["split"] == "train"]
    assert all(line["tokens_per_second"] > 0 for line in steps[1:])


def test_drafters_trained_together_are_those_trained_alone(runs):
    heads = head_recipe(runs, "vispec_too", acceptance_every=0)
    common = {name: getattr(heads, name) for name in (*COMMON, *OF_DRAFTERS, "warmup_steps")}
    run(heads, MedusaRecipe(name="medusa_too", save_dtype="float32", acceptance_prompts=0, **common))
    leaves = [jax.tree.leaves(final_state(runs / name)) for name in ("vispec", "vispec_too")]
    for alone, ours in zip(*leaves, strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-5)
    assert jaxspec.load_drafter(runs / "medusa_too/export", jaxspec.load_target(runs / "target/export"))
    with pytest.raises(ValueError, match="must have the same max_records, got vispec_too None, medusa_too 3"):
        run(heads, MedusaRecipe(name="medusa_too", **common | {"max_records": 3}))
    with pytest.raises(ValueError, match="only recipes of drafters can be trained together, plain is none"):
        run(heads, Recipe(name="plain", run_dir=str(runs)))


def test_a_head_learns_from_conversations(runs):
    """Several turns in which the target had no part; what it would draft is measured on their first questions."""
    recipe = head_recipe(runs, "others", conversations="scenes", max_records=12, sequence_length=256)
    task = drafter_task(recipe)
    turns = (np.diff(next(task.batches(0))["loss_mask"].astype(int), axis=1) == 1).sum(axis=1)
    assert (turns > 1).any()
    run(recipe)
    target, source = jaxspec.load_target(runs / "target/export"), open_conversations("scenes")
    drafter, encoder = (
        jaxspec.load_drafter(runs / "others/export", target),
        ConversationEncoder(target.processor, target.adapter),
    )
    questions = [encoder.encode_question(source[index]) for index in range(recipe.validation_records)]
    prompts, limit = [prompt for prompt, _ in questions], max(tokens for _, tokens in questions)
    generator = jaxspec.Generator(target, drafter)
    accepted = {t: measured_acceptance(generator, prompts, limit, t) for t in (0.0, 1.0)}
    assert drafter.about.items() >= summary(drafter.about["step"], accepted).items()
    losses = [line["loss"] for line in map(json.loads, (runs / "others/log.jsonl").open()) if line["split"] == "train"]
    assert len(losses) == recipe.steps and losses[-1] < losses[0]


def test_a_run_exports_by_command_what_it_exported_itself(runs, tmp_path):
    assert main(["export", str(runs / "vispec"), str(tmp_path / "vispec")]) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "vispec" / name).read_bytes() == (runs / "vispec/export" / name).read_bytes()


def test_a_drafter_to_start_from_must_fit_the_recipe(runs):
    recipe = head_recipe(runs, "wider", init_from=str(runs / "vispec/export"), num_q=3)
    with pytest.raises(ValueError, match=r"init_from .* does not fit the recipe: imadpt.q \(2, .* \(here \(3, "):
        run(recipe)
    assert not (runs / "wider").exists()


def longest_answer(records) -> int:
    return max(len(record["answer_ids"]) for record in records)


def dying(recipe: ViSpecRecipe, after: int) -> Task:
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
    encoder = AnswerEncoder(target.processor, target.adapter)
    questions = [numbered_scene("train", index)[1][0].question for index in range(4)]
    images = [record["images"] for record in records]
    generator, limit = jaxspec.Generator(target, drafter), longest_answer(records)
    results = generator.generate_batch(questions, images, max_new_tokens=limit)
    prompts = [encoder.encode_question(record)[0] for record in records]
    assert (
        measured_acceptance(generator, prompts, limit).emitted == pooled([result.stats for result in results]).emitted
    )


def test_a_small_language_model_becomes_a_massv_drafter(runs):
    """Text model, a projector for it, then both: every phase trains what it says and starts from the one before."""
    where = {"run_dir": str(runs), "target": str(runs / "target/export"), "answers_dir": str(runs / "answers")}
    size = {"steps": 3, "batch_size": 2, "sequence_length": 128, "validation_records": 4, "save_dtype": "float32"}
    common = {**where, **size, **{name: value for name, value in SHORT.items() if name != "dataset_size"}}
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    run(SmallLanguageModelRecipe(name="lm", **shape, **common))
    common["lm"] = str(runs / "lm/export")
    run(MassvRecipe(name="massv1", phase=1, **common))
    run(MassvRecipe(name="massv2", phase=2, init_from=str(runs / "massv1/export"), **common))
    language, first, second = (
        load_file(runs / name / "export/model.safetensors") for name in ("lm", "massv1", "massv2")
    )
    for name, value in language.items():
        np.testing.assert_array_equal(first[f"language_model.{name}"], value)
    assert first.keys() == second.keys() and len(first) == len(language) + 4
    assert not [name for name, value in second.items() if np.array_equal(value, first[name])]

    target = jaxspec.load_target(runs / "target/export")
    image = np.full((64, 64, 3), 200, np.uint8)
    expected = jaxspec.Generator(target).generate("What is this?", [image], max_new_tokens=16)
    for name in ("lm", "massv2"):
        drafter = jaxspec.load_drafter(runs / name / "export", target)
        assert (drafter.method, drafter.tree) == ("massv", jaxspec.TreeConfig.chain(5))
        result = jaxspec.Generator(target, drafter).generate("What is this?", [image], max_new_tokens=16)
        np.testing.assert_array_equal(result.tokens, expected.tokens)


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
        export=lambda params, folder, about: None,
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
