"""The training loop on tasks of a few numbers: acceptance on the way, what is kept and exported, what stops a run."""

import dataclasses
import errno
import json
import re
import resource
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.devices import PEAKS, Peaks, peaks_of
from jaxspec.metrics import Acceptance
from jaxspec.training import Recipe, Task, train
from jaxspec.training.acceptance import Measurement
from jaxspec.training.checkpoints import LATEST, Checkpoints, manager

WIDTH = 4


def small_recipe(folder, **changes) -> Recipe:
    recipe = Recipe(name="small", run_dir=str(folder), steps=8, batch_size=2, warmup_steps=0, log_every=1, eval_every=4)
    return dataclasses.replace(recipe, **changes)


def small_task(exported: list, width: int = WIDTH, killed_at: int | None = None, bad_at: int | None = None) -> Task:
    """Least squares; the loss of step `bad_at` (from 0) is not finite, the data ends in an error at `killed_at`."""

    def batches(start):
        for step in range(start, 100):
            if step == killed_at:
                raise RuntimeError("killed")
            x = np.random.default_rng(step).normal(size=(2, width)).astype(np.float32)
            yield {
                "x": x * (np.inf if step == bad_at else 1.0),
                "ids": [f"record-{2 * step}", f"record-{2 * step + 1}"],
            }

    def loss(params, constants, batch, key):
        noise = jax.random.normal(key, (width,))
        return jnp.mean((params["w"] - batch["x"] - 0.01 * noise) ** 2), {}

    return Task(
        params={"w": jnp.zeros((width,))},
        constants=None,
        loss=loss,
        batches=batches,
        validation=lambda: iter([{"x": np.ones((2, width), np.float32), "ids": ["a", "b"]}]),
        export=lambda params, folder, about: exported.append((jax.device_get(params), about)),
    )


def accepting(task: Task, lengths: dict[int, float], asked: list, **changes) -> Task:
    """The task with an acceptance that is `lengths[n]` at its n-th measurement; `asked` gets the parameters."""

    def measure(params):
        asked.append(np.array(params["w"]))
        # Of four rounds, all emit 1 token or more; some emit 2.
        two = round(4 * (lengths[len(asked)] - 1))
        return {0.0: Acceptance.from_histogram([4 - two, two])}

    return dataclasses.replace(task, acceptance=Measurement(measure, **changes))


def log_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "small/log.jsonl").read_text().splitlines()]


def saved_state(folder) -> dict:
    """The latest checkpoint with its optimizer state, as saved."""
    with manager(folder / "small" / LATEST, read_only=True) as source:
        return source.restore(source.latest_step())


# -- acceptance and the best checkpoint ------------------------------------------------------------------------------


@pytest.mark.parametrize(("export", "step"), [("best", 4), ("last", 8)])
def test_the_chosen_checkpoint_is_exported_with_its_acceptance(tmp_path, export, step):
    exported, asked = [], []
    lengths = {1: 1.25, 2: 1.75, 3: 1.75, 4: 1.5}  # at steps 2, 4, 6, 8; of equals the earlier one is kept
    task = accepting(small_task(exported), lengths, asked, every=2, export=export)
    final = train(small_recipe(tmp_path, eval_every=2), task)
    ((params, about),) = exported
    assert len(asked) == 4
    np.testing.assert_array_equal(params["w"], asked[step // 2 - 1])
    assert about["step"] == step and about["mean_acceptance_length"] == lengths[step // 2]
    assert about["mean_accepted_draft_tokens"] == lengths[step // 2] - 1
    assert about["acceptance_at_position"] == about["conditional_acceptance"] == [lengths[step // 2] - 1]
    np.testing.assert_array_equal(final["w"], asked[-1])
    shown = [line for line in log_lines(tmp_path) if line["split"] == "acceptance"]
    assert [(line["step"], line["mean_acceptance_length"]) for line in shown] == [
        (2, 1.25),
        (4, 1.75),
        (6, 1.75),
        (8, 1.5),
    ]
    assert all(line["temperature"] == 0 for line in shown)


def test_acceptance_only_at_the_end_and_a_finished_run_exports_again(tmp_path):
    exported, asked = [], []
    task = accepting(small_task(exported), {1: 1.5}, asked)
    train(small_recipe(tmp_path), task)
    train(small_recipe(tmp_path), task)
    assert len(asked) == 1 and exported[0][1] == exported[1][1]
    np.testing.assert_array_equal(exported[0][0]["w"], exported[1][0]["w"])


def test_a_drafter_that_never_drafts_is_exported_too(tmp_path):
    exported = []
    nothing = Measurement(lambda params: {0.0: Acceptance.from_histogram([0, 0])}, every=4)
    train(small_recipe(tmp_path), dataclasses.replace(small_task(exported), acceptance=nothing))
    assert exported[0][1]["mean_acceptance_length"] is None
    assert "NaN" not in (tmp_path / "small/log.jsonl").read_text()


def test_the_best_is_the_best_whatever_step_comes_when(tmp_path):
    def about(step, length):
        return {"step": step, "mean_acceptance_length": length}

    with Checkpoints(tmp_path, keep_best=True) as checkpoints:
        for step, length, best in ((6, 1.5, 6), (4, 1.4, 6), (6, 1.6, 6), (4, 1.7, 4), (8, 1.7, 4), (8, None, 4)):
            checkpoints.offer(step, {"w": jnp.full((2,), step)}, about(step, length))
            assert checkpoints.best_about()["step"] == best
            np.testing.assert_array_equal(checkpoints.best_params({"w": jnp.zeros((2,), jnp.int32)})["w"], best)


# -- runs that are stopped -------------------------------------------------------------------------------------------


def test_resumed_state_is_bit_identical_with_measurements_in_between(tmp_path):
    lengths = dict.fromkeys(range(1, 9), 1.5)
    recipe = {"checkpoint_every": 3, "eval_every": 2, "weight_decay": 0.1}  # resumes at 3, where nothing is evaluated
    whole, resumed = [], []
    train(small_recipe(tmp_path / "whole", **recipe), small_task(whole))
    with pytest.raises(RuntimeError, match="killed"):
        train(small_recipe(tmp_path / "cut", **recipe), accepting(small_task([], killed_at=5), lengths, [], every=2))
    train(small_recipe(tmp_path / "cut", **recipe), accepting(small_task(resumed), lengths, [], every=2, export="last"))
    np.testing.assert_array_equal(resumed[0][0]["w"], whole[0][0]["w"])
    ours, theirs = jax.tree.leaves(saved_state(tmp_path / "cut")), jax.tree.leaves(saved_state(tmp_path / "whole"))
    assert len(ours) == len(theirs) > 3  # step, parameters, both moments
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("checkpoint_every", [1, 2])
def test_a_bad_step_is_named_and_never_saved(tmp_path, log_every, checkpoint_every):
    recipe = small_recipe(tmp_path, checkpoint_every=checkpoint_every, log_every=log_every)
    with pytest.raises(
        FloatingPointError, match=r"not finite at step 5 \(records record-8, record-9\).* step 4 is kept"
    ):
        train(recipe, small_task([], bad_at=4))
    state = jax.tree.leaves(saved_state(tmp_path))
    assert all(np.isfinite(leaf).all() for leaf in state)
    exported = []
    train(recipe, small_task(exported))  # the data is mended: the run goes on
    assert np.isfinite(exported[0][0]["w"]).all()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    width, exported = 40_000, []
    recipe = small_recipe(tmp_path, checkpoint_every=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batches(start, task=small_task([], width)):
        for step, batch in enumerate(task.batches(start), start):
            if step == 5:  # while step 4 may still be written
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
            yield batch

    try:
        with pytest.raises(OSError) as caught:
            train(recipe, dataclasses.replace(small_task([], width), batches=batches))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    pattern = (
        r"the checkpoint of step (\d) could not be written .*: File too large; the checkpoint of step (\d) is intact"
    )
    failed, intact = map(int, re.match(pattern, str(caught.value)).groups())
    assert (failed, intact) in ((4, 2), (6, 4))
    whole = []
    train(recipe, small_task(exported, width))
    train(small_recipe(tmp_path / "whole"), small_task(whole, width))
    np.testing.assert_array_equal(exported[0][0]["w"], whole[0][0]["w"])


def test_an_export_that_cannot_be_written_can_be_repeated(tmp_path):
    def full(params, folder, about):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        OSError, match="the export could not be written .*: No space left on device; .* step 8 is intact"
    ):
        train(small_recipe(tmp_path), dataclasses.replace(small_task([]), export=full))
    exported = []
    train(small_recipe(tmp_path), small_task(exported))
    assert exported[0][1] == {"step": 8}


def test_a_run_without_any_gradient_is_not_exported(tmp_path, capsys):
    """Nor when it goes on; one step that teaches is enough, in whichever run it was."""

    def task(exported, teaching=()):
        def batches(start):
            for step in range(start, 100):
                yield {"x": np.float32([step in teaching]), "ids": [f"record-{step}"]}

        def loss(params, constants, batch, key):
            return jnp.sum(params["w"] * batch["x"]), {}

        return dataclasses.replace(small_task(exported), batches=batches, loss=loss)

    exported, recipe = [], small_recipe(tmp_path, checkpoint_every=2)
    validated = {"validation": lambda: iter([{"x": np.zeros(1, np.float32)}])}
    for _ in range(2):
        with pytest.raises(ValueError, match="small: the gradient was 0 in every step, nothing was learned"):
            train(recipe, dataclasses.replace(task(exported), **validated))
    assert "small: the gradient of step 1 (records record-0) is 0" in capsys.readouterr().out
    assert exported == [] and not recipe.export_folder.exists()
    for number, teaching in enumerate([(0,), (7,)]):
        each = small_recipe(tmp_path / str(number), checkpoint_every=2, accumulate=2)
        train(each, dataclasses.replace(task(exported, teaching), **validated))
    assert len(exported) == 2


# -- recipes ---------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_only_with_its_own_recipe(tmp_path, capsys):
    train(small_recipe(tmp_path), small_task([]))
    with pytest.raises(ValueError, match=r"another recipe \(seed 0 -> 1, learning_rate 0.001 -> 0.1\)"):
        train(small_recipe(tmp_path, learning_rate=0.1, seed=1), small_task([]))
    path = tmp_path / "small/recipe.json"
    recorded = json.loads(path.read_text())
    assert recorded["seed"] == 0
    path.write_text(
        json.dumps({name: value for name, value in recorded.items() if name != "accumulate"})
    )  # an older one
    with pytest.raises(ValueError, match=r"another recipe \(accumulate 1 -> 2\)"):
        train(small_recipe(tmp_path, accumulate=2), small_task([]))
    with pytest.raises(ValueError, match="has run 8 steps already, steps is 6"):
        train(small_recipe(tmp_path, steps=6), small_task([]))
    capsys.readouterr()
    train(small_recipe(tmp_path, steps=10, log_every=5), small_task([]))
    assert "another learning rate schedule: steps 8 -> 10" in capsys.readouterr().out


def test_a_batch_in_parts_teaches_what_it_teaches_whole(tmp_path):
    """Parts of equal weight, without noise: the same parameters, schedule and number of steps."""

    def task(rows, killed_at=None):
        def batches(start):
            for step in range(start, 100):
                if step == killed_at:
                    raise RuntimeError("killed")
                x = np.random.default_rng(step * rows // 4).normal(size=(4, WIDTH)).astype(np.float32)
                part = step % (4 // rows) * rows
                yield {"x": x[part : part + rows], "ids": [f"{step}-{row}" for row in range(rows)]}

        def loss(params, constants, batch, key):
            return jnp.mean((params["w"] - batch["x"]) ** 2), {"rows": jnp.float32(len(batch["x"]))}

        return dataclasses.replace(small_task([]), batches=batches, loss=loss)

    common = {"batch_size": 4, "weight_decay": 0.1, "clip_value": 0.05, "checkpoint_every": 3}
    whole = train(small_recipe(tmp_path / "whole", **common), task(4))
    parts = small_recipe(tmp_path / "parts", **common, accumulate=2)
    with pytest.raises(RuntimeError, match="killed"):
        train(parts, task(2, killed_at=9))
    np.testing.assert_allclose(train(parts, task(2))["w"], whole["w"], rtol=1e-5)
    lines = [line for line in log_lines(tmp_path / "parts") if line["split"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 9)) and {line["rows"] for line in lines} == {2.0}


def test_a_run_that_goes_on_tells_no_step_twice(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        train(small_recipe(tmp_path, checkpoint_every=3), small_task([], killed_at=5))
    with (tmp_path / "small/log.jsonl").open("a") as log:
        log.write('{"split": "train", "st')  # all that a kill let through
    train(small_recipe(tmp_path, checkpoint_every=3), small_task([]))
    assert [line["step"] for line in log_lines(tmp_path) if line["split"] == "train"] == list(range(1, 9))


def test_what_the_data_lacked_is_told(tmp_path, capsys):
    lacking = iter([{"truncated": 0, "skipped": 0}, {"truncated": 3, "skipped": 1}])
    train(small_recipe(tmp_path), dataclasses.replace(small_task([]), shortfall=lambda: next(lacking)))
    (line,) = [line for line in log_lines(tmp_path) if line["split"] == "data"]
    assert (line["step"], line["truncated"], line["skipped"]) == (8, 3, 1)
    assert "so far: 3 truncated, 1 skipped" in capsys.readouterr().out


def test_a_disk_too_full_for_the_log_is_told_like_one_too_full_for_a_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def batches(start, task=small_task([])):
        for step, batch in enumerate(task.batches(start), start):
            while step == 5 and not (tmp_path / "small" / LATEST / "4").exists():
                time.sleep(0.01)
            if step == 5:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
            yield batch

    message = "log.jsonl could not be written to .*: File too large; the checkpoint of step 4 is intact"
    try:
        with pytest.raises(OSError, match=message):
            train(small_recipe(tmp_path, checkpoint_every=4), dataclasses.replace(small_task([]), batches=batches))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(small_recipe(tmp_path, checkpoint_every=4), small_task([]))
    assert [line["step"] for line in log_lines(tmp_path) if line["split"] == "train"] == list(range(1, 9))


# -- logs ------------------------------------------------------------------------------------------------------------


def test_lines_tell_the_work_of_a_step_and_its_time(tmp_path, monkeypatch):
    monkeypatch.setitem(PEAKS, jax.devices()[0].device_kind, Peaks(flops=1e9, bandwidth=1e9))
    train(small_recipe(tmp_path), small_task([]))
    lines = log_lines(tmp_path)
    (run,) = [line for line in lines if line["split"] == "run"]
    assert run["model_flops_per_step"] > WIDTH and run["devices"] == 1
    steps = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in steps] == list(range(1, 9))
    for line in steps[1:]:  # the first one's time is that of compiling
        expected = run["model_flops_per_step"] / (line["seconds_per_step"] * 1e9)
        assert line["model_flop_utilisation"] == pytest.approx(expected)


def test_peaks_are_found_by_the_longest_name():
    device = dataclasses.make_dataclass("Device", ["device_kind"])
    assert peaks_of(device("NVIDIA H100 80GB HBM3")) == PEAKS["NVIDIA H100"]
    assert peaks_of(device("NVIDIA H100 PCIe")) == PEAKS["NVIDIA H100 PCIe"]
    assert peaks_of(device("TPU v5 lite")) == PEAKS["TPU v5e"]
    assert peaks_of(device("TPU v5")) == PEAKS["TPU v5p"]
    assert peaks_of(device("cpu")) is None


def test_tensorboard_events_hold_the_same_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    lengths = {1: 1.25, 2: 1.5}
    train(small_recipe(tmp_path, tensorboard=True), accepting(small_task([]), lengths, [], every=4))
    events = [Event.FromString(each) for each in records(next((tmp_path / "small/tensorboard").iterdir()))]
    scalars = {(v.tag, event.step): v.simple_value for event in events for v in event.summary.value}
    losses = {line["step"]: line["loss"] for line in log_lines(tmp_path) if line["split"] == "train"}
    assert {step: scalars["train/loss", step] for step in losses} == pytest.approx(losses)
    name = "acceptance/temperature_0/mean_acceptance_length"
    assert (scalars[name, 4], scalars[name, 8]) == (1.25, 1.5)
    assert scalars["acceptance/temperature_0/conditional_acceptance_1", 8] == 0.5


def records(path):
    """The records of a TFRecord file: length (8 bytes), its checksum (4), data, its checksum (4)."""
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_a_resumed_run_goes_on_under_its_wandb_id(tmp_path, monkeypatch):
    opened, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: opened.append(given) or run))
    with pytest.raises(RuntimeError, match="killed"):
        train(small_recipe(tmp_path, wandb="drafters"), small_task([], killed_at=6))
    train(small_recipe(tmp_path, wandb="drafters"), small_task([]))
    assert opened[0] == opened[1] and opened[0]["project"] == "drafters" and opened[0]["config"]["steps"] == 8
    assert [step for step, values in logged if "train/loss" in values][-1] == 8


@pytest.mark.parametrize(
    ("field", "module"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "drafters"}, "wandb")]
)
def test_a_missing_library_is_named(tmp_path, monkeypatch, field, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs {module}, which is not installed: pip install"):
        train(small_recipe(tmp_path, **field), small_task([]))
