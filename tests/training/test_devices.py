"""Runs on several devices learn what a run on one learns, and larger than their devices what they would at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxspec
from jaxspec.sharding import training_mesh
from jaxspec.training import EagleRecipe, MedusaRecipe, Recipe, SpecVLMRecipe, ViSpecRecipe, run
from jaxspec.training.checkpoints import LATEST, manager, restore
from tests.drafting import linked_target
from tests.helpers import answer_scenes

ROOT = Path(__file__).parents[2]
TRAIN = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import train
train.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    linked_target(folder)
    answer_scenes(folder / "target", folder / "answers", 16)
    return folder


def fields(folder: Path, name: str) -> dict:
    where = {"run_dir": folder, "target": folder / "target", "answers_dir": folder / "answers"}
    return {
        **{"name": name, **{field: str(path) for field, path in where.items()}},
        **{"steps": 3, "batch_size": 8, "sequence_length": 128, "warmup_steps": 0, "save_dtype": "float32"},
        **{"validation_records": 4, "acceptance_prompts": 4, "log_every": 1, "checkpoint_every": 2, "clip_norm": 0.0},
    }


@pytest.fixture(scope="module")
def one(folder):
    """A run on one device."""
    run(ViSpecRecipe(**fields(folder, "one")))
    return "one"


def train_on_8(folder: Path, name: str, *options: str) -> subprocess.CompletedProcess:
    """`train.py` in a process of its own, since JAX must learn of its devices before it first uses one."""
    config = folder / f"{name}.py"
    config.write_text(f"from jaxspec.training import ViSpecRecipe\nrecipe = ViSpecRecipe(**{fields(folder, name)!r})\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", TRAIN, str(config), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def state_of(folder: Path, name: str, like: dict | None = None) -> dict:
    """The latest checkpoint; one of other devices needs a state `like` it that lies on those that are here."""
    with manager(folder / name / LATEST, read_only=True) as source:
        step = source.latest_step()
        return source.restore(step) if like is None else restore(source, step, like)


def check_equal(folder: Path, name: str, expected: str, tolerance: float) -> None:
    """The moments of the gradients, all together, and every loss. Parameters say less: Adam divides by gradients that
    may be next to nothing."""
    state = state_of(folder, expected)
    ours, theirs = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(each["opt_state"])])
        for each in (state_of(folder, name, state), state)
    )
    assert np.linalg.norm(theirs) > 0.1
    assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
    np.testing.assert_allclose(losses_of(folder, name), losses_of(folder, expected), rtol=tolerance)


def losses_of(folder: Path, name: str) -> list[float]:
    lines = map(json.loads, (folder / name / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_eight_devices_learn_what_one_learns(folder, one):
    """Two groups along `data`, two devices along `fsdp` and `tensor`; then the last step again on one device."""
    done = train_on_8(folder, "eight", "--fsdp", "2", "--tensor", "2")
    assert done.returncode == 0, done.stderr
    assert "on 8 x cpu" in done.stdout
    check_equal(folder, "eight", one, 1e-3)
    target = jaxspec.load_target(folder / "target")
    assert jaxspec.load_drafter(folder / "eight/export", target).about["rounds"] > 0
    for made in (f"{LATEST}/3", "best", "export"):
        shutil.rmtree(folder / "eight" / made)
    run(ViSpecRecipe(**fields(folder, "eight")))
    check_equal(folder, "eight", one, 1e-3)
    assert jaxspec.load_drafter(folder / "eight/export", target).about["rounds"] > 0


def test_what_does_not_divide_is_refused(folder):
    done = train_on_8(folder, "odd", "--batch-size", "6")
    assert done.returncode == 2
    assert "batch_size / accumulate (6) must be a multiple of the 8 groups of devices" in done.stderr
    with pytest.raises(ValueError, match=r"fsdp \(3\) x tensor \(1\) must divide the number of devices, 1"):
        training_mesh(3, 1)
    with pytest.raises(ValueError, match=r"batch_size \(8\) must be a multiple of accumulate \(3\)"):
        Recipe(name="parts", accumulate=3)


def test_a_bfloat16_target_teaches_what_a_float32_one_teaches(folder, one):
    """The parameters that learn stay float32."""
    run(ViSpecRecipe(**fields(folder, "bfloat16"), target_dtype="bfloat16"))
    check_equal(folder, "bfloat16", one, 0.05)
    target = jaxspec.load_target(folder / "target", "bfloat16")
    assert jaxspec.load_drafter(folder / "bfloat16/export", target).about["rounds"] > 0


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (EagleRecipe, {"tap_layers": (1,), "draft_vocab_size": 64, "mtp_steps": 1, "acceptance_weight": 1.0}),
        (SpecVLMRecipe, {}),
        (MedusaRecipe, {"top_k": 2}),
    ],
)
def test_every_head_learns_from_a_bfloat16_target(folder, recipe, changes):
    given = fields(folder, recipe.__name__) | {"steps": 1, "acceptance_prompts": 2}
    run(recipe(**given, target_dtype="bfloat16", **changes))
    params = jax.tree.leaves(state_of(folder, recipe.__name__)["params"])
    assert {leaf.dtype for leaf in params} == {np.dtype(np.float32)}
    target = jaxspec.load_target(folder / "target", "bfloat16")
    assert jaxspec.load_drafter(folder / recipe.__name__ / "export", target).about["rounds"] > 0


def test_heads_learn_from_an_int8_target(folder, one):
    """On one device and on eight; the head and its optimizer stay float32, and it drafts for that target."""
    run(ViSpecRecipe(**fields(folder, "int8"), quantize="int8"))
    check_equal(folder, "int8", one, 0.1)
    done = train_on_8(folder, "int8_eight", "--fsdp", "2", "--tensor", "2", "--quantize", "int8")
    assert done.returncode == 0, done.stderr
    check_equal(folder, "int8_eight", "int8", 1e-3)
    narrow = {"draft_vocab_size": 64, "mtp_steps": 1, "acceptance_weight": 1.0, "steps": 1}
    run(EagleRecipe(**fields(folder, "int8_narrow") | narrow, quantize="int8"))
    target = jaxspec.load_target(folder / "target", quantize="int8")
    for name in ("int8", "int8_narrow"):
        params = jax.tree.leaves(state_of(folder, name)["params"])
        assert {leaf.dtype for leaf in params} == {np.dtype(np.float32)}
        assert jaxspec.load_drafter(folder / name / "export", target).about["rounds"] > 0
