"""Recipes that are trained together: each ends as it would alone, and what they share is computed once."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.training import Recipe, Task
from jaxspec.training.checkpoints import LATEST, manager
from jaxspec.training.loop import Constants, arrays, make_step, train, train_together
from jaxspec.training.member import initial_state

WIDTH = 64
TEACHER = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32) / 8


def recipe(folder, name: str, **changes) -> Recipe:
    sizes = {"steps": 6, "batch_size": 2, "warmup_steps": 0, "log_every": 1, "eval_every": 3, "checkpoint_every": 2}
    return Recipe(name=name, run_dir=str(folder), **{**sizes, **changes})


def batches(start, killed_at=None):
    for step in range(start, 100):
        if step == killed_at:
            raise RuntimeError("killed")
        yield {"x": np.random.default_rng(step).normal(size=(32, WIDTH)).astype(np.float32), "ids": [str(step)]}


def task(power: int, teacher: jax.Array, killed_at: int | None = None, exported: list | None = None) -> Task:
    """Learn a power of what the teacher says."""

    def loss(params, constants, batch, key):
        said = jnp.tanh(batch["x"] @ constants["teacher"])
        return jnp.mean((batch["x"] @ params["w"] - said**power + constants["own"]) ** 2), {"said": said.mean()}

    return Task(
        params={"w": jnp.zeros((WIDTH, WIDTH))},
        constants={"teacher": teacher, "own": jnp.float32(power)},
        loss=loss,
        batches=partial(batches, killed_at=killed_at),
        validation=lambda: (batch for batch, _ in zip(batches(50), range(2), strict=False)),
        export=lambda params, folder, about: None if exported is None else exported.append(np.array(params["w"])),
    )


def pair(folder, **changes) -> list[Recipe]:
    return [recipe(folder, "one", **changes), recipe(folder, "two", learning_rate=1e-2, **changes)]


def saved(folder, name: str) -> dict:
    with manager(folder / name / LATEST, read_only=True) as source:
        return source.restore(source.latest_step())


def test_each_ends_as_it_would_alone(tmp_path):
    teacher, exported = jnp.asarray(TEACHER), []
    together = train_together(pair(tmp_path), [task(power, teacher, exported=exported) for power in (1, 2)])
    for power, ours, each in zip((1, 2), together, pair(tmp_path / "alone"), strict=True):
        alone = train(each, task(power, teacher))
        np.testing.assert_allclose(ours["w"], alone["w"], rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(exported[power - 1], ours["w"])
        assert np.abs(alone["w"]).max() > 1e-3
        names = {path.name for path in (tmp_path / each.name).iterdir()}
        assert names == {path.name for path in (tmp_path / "alone" / each.name).iterdir()}
        lines = (tmp_path / each.name / "log.jsonl").read_text()
        assert lines.count('"train"') == 6 and lines.count('"validation"') == 2


def test_the_teacher_is_computed_once(tmp_path):
    """Nearly all of this step is products of [32, 64] with [64, 64]: the teacher's, and per task one forwards and one
    backwards."""

    def flops(count: int) -> float:
        recipes, teacher = pair(tmp_path)[:count], jnp.asarray(TEACHER)
        tasks = [task(power, teacher) for power in (1, 2)[:count]]
        constants = Constants(tasks)
        states = [initial_state(*each) for each in zip(recipes, [task.params for task in tasks], strict=True)]
        step = make_step(recipes, tasks, constants)
        program = step.lower(states, constants.arrays, arrays(next(batches(0)))).compile()
        return program.cost_analysis()["flops"] / (2 * 32 * WIDTH * WIDTH)

    alone, both = flops(1), flops(2)
    assert 3 < alone < 4
    assert both == pytest.approx(2 * alone - 1, abs=0.1)


def test_arrays_of_several_tasks_are_passed_once():
    teacher = jnp.asarray(TEACHER)
    tasks = [task(power, teacher) for power in (1, 2, 3)]
    constants = Constants(tasks)
    assert len(constants.arrays) == 4
    for ours, each in zip(constants.of_tasks(constants.arrays), tasks, strict=True):
        assert ours["teacher"] is teacher and ours["own"] is each.constants["own"]


def test_a_stopped_run_goes_on_from_the_last_common_step(tmp_path):
    """One of them was killed before its checkpoint of step 4 was there."""
    teacher = jnp.asarray(TEACHER)
    train_together(pair(tmp_path / "whole"), [task(1, teacher), task(2, teacher)])
    with pytest.raises(RuntimeError, match="killed"):
        train_together(pair(tmp_path / "cut"), [task(1, teacher, killed_at=5), task(2, teacher)])
    with manager(tmp_path / "cut/two" / LATEST) as source:
        source.delete(4)
    train_together(pair(tmp_path / "cut"), [task(1, teacher), task(2, teacher)])
    for name in ("one", "two"):
        leaves = [jax.tree.leaves(saved(tmp_path / run, name)) for run in ("whole", "cut")]
        assert len(leaves[0]) > 3
        for a, b in zip(*leaves, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_run_without_the_others_is_not_begun_again(tmp_path):
    teacher = jnp.asarray(TEACHER)
    train(pair(tmp_path)[0], task(1, teacher))
    with pytest.raises(ValueError, match=r"no common step to go on from \(latest: one 6, two 0\): train them apart"):
        train_together(pair(tmp_path), [task(1, teacher), task(2, teacher)])
    assert saved(tmp_path, "one")["step"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "one"}, "need folders of their own, got .*one, .*one"),
        ({"steps": 7}, "must have the same steps, got one 6, two 7"),
        ({"seed": 1}, "must have the same seed, got one 0, two 1"),
    ],
)
def test_recipes_that_do_not_go_together(tmp_path, changes, message):
    one, two = pair(tmp_path)
    teacher = jnp.asarray(TEACHER)
    with pytest.raises(ValueError, match=message):
        train_together([one, dataclasses.replace(two, **changes)], [task(1, teacher), task(2, teacher)])
    assert not (tmp_path / "one").exists()
