"""`python -m jaxspec export`: files in the published layout, bit for bit, from folders and from runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxspec
from jaxspec.checkpoints.tensors import read_folder
from jaxspec.cli import main
from jaxspec.training import ViSpecRecipe
from jaxspec.training.checkpoints import Checkpoints
from jaxspec.training.drafter import split_draft_model
from jaxspec.training.member import initial_state
from jaxspec.training.recipe import write_recipe

REFERENCE = Path(__file__).parents[1] / "reference"


def published(name: str, folder: Path, dtype, without=()) -> Path:
    """A reference folder in another dtype, as authors publish it: no `jaxspec` entry."""
    folder.mkdir()
    shutil.copy(REFERENCE / name / "config.json", folder)
    tensors = load_file(REFERENCE / name / "model.safetensors")
    save_file({key: v.astype(dtype) for key, v in tensors.items() if key not in without}, folder / "model.safetensors")
    return folder


def check_same(ours: Path, theirs: Path) -> None:
    ours, theirs = read_folder(ours), read_folder(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("name", ["eagle2", "vispec"])
def test_published_folders_round_trip(tmp_path, name, dtype, capsys):
    source = published(name, tmp_path / "source", dtype)
    assert main(["export", str(source), str(tmp_path / "out")]) == 0
    check_same(tmp_path / "out", source)
    assert np.dtype(dtype).name in capsys.readouterr().out
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "out")]) == 0  # onto itself
    check_same(tmp_path / "out", source)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "rms_norm_eps")
    assert {field: after[field] for field in fields} == {field: before[field] for field in fields}


def test_another_dtype(tmp_path):
    source = published("vispec", tmp_path / "source", np.float32)
    assert main(["export", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    check_same(tmp_path / "out", published("vispec", tmp_path / "expected", ml_dtypes.bfloat16))


def test_what_a_folder_says_of_itself_stays(models, tmp_path):
    target, drafter = models
    assert main(["export", str(drafter), str(tmp_path / "out"), "--target", str(target)]) == 0
    check_same(tmp_path / "out", drafter)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (drafter, tmp_path / "out"))
    assert after == before


def test_a_missing_copy_of_the_embedding_comes_from_the_target(models, tmp_path, capsys):
    target, drafter = models
    shutil.copytree(drafter, tmp_path / "bare")
    tensors = load_file(drafter / "model.safetensors")
    tensors.pop("embed_tokens.weight")
    save_file(tensors, tmp_path / "bare/model.safetensors")
    arguments = ["export", str(tmp_path / "bare"), str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "has no embed_tokens.weight: name its target with --target" in capsys.readouterr().err
    assert main([*arguments, "--target", str(target)]) == 0
    check_same(tmp_path / "out", drafter)


def test_what_is_no_drafter_is_not_replaced(models, tmp_path, capsys):
    target, drafter = models
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/config.json").write_text("{}")
    for output in (target, tmp_path / "notes", tmp_path / "notes/config.json"):
        assert main(["export", str(drafter), str(output)]) == 2
        assert "exists and is no drafter folder: it is not replaced" in capsys.readouterr().err
    assert (tmp_path / "notes/config.json").read_text() == "{}"
    (tmp_path / "empty").mkdir()
    assert main(["export", str(drafter), str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize(
    ("source", "arguments", "sentence"),
    [
        ("vispec", ["--dtype", "int8"], "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ("vispec", ["--target", "TARGET"], "was made for another target: hidden_size 64 (target: 32)"),
        ("..", [], "is neither a drafter folder (config.json) nor a run (recipe.json)"),
        ("/nowhere/run", [], "no folder /nowhere/run"),
    ],
)
def test_refusals(models, tmp_path, capsys, source, arguments, sentence):
    given = [str(models[0]) if each == "TARGET" else each for each in arguments]
    assert main(["export", str(REFERENCE / source), str(tmp_path / "out"), *given]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("choice", "step"), [("best", 4), ("last", 6)])
def test_a_run_exports_its_chosen_checkpoint(models, tmp_path, monkeypatch, capsys, choice, step):
    recipe = ViSpecRecipe(name="head", run_dir=str(tmp_path), target=str(models[0]), save_dtype="float32")
    recipe = dataclasses.replace(recipe, export_checkpoint=choice)
    recipe.folder.mkdir()
    write_recipe(recipe, resuming=False)
    graph, params, rest = split_draft_model(recipe, jaxspec.load_target(models[0]))
    with Checkpoints(recipe.folder, keep_best=True) as checkpoints:
        for at, length in ((2, 1.5), (4, 2.5), (6, 2.0)):
            moved = jax.tree.map(lambda leaf, at=at: leaf + at, params)
            checkpoints.offer(at, moved, {"step": at, "mean_acceptance_length": length})
            checkpoints.save(at, initial_state(recipe, moved))
    monkeypatch.chdir(tmp_path)
    assert main(["export", "head", "out"]) == 0
    (tmp_path / "plain").touch()
    assert (tmp_path / "out/model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert f"ViSpec drafter of step {step}, float32" in capsys.readouterr().out
    target = jaxspec.load_target(models[0])
    drafter = jaxspec.load_drafter(tmp_path / "out", target)
    expected = jax.tree.map(lambda leaf: leaf + step, params)
    for a, b in zip(jax.tree.leaves(nnx.state(drafter.model)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert drafter.tree == recipe.tree and drafter.about["step"] == step
    assert drafter.about["target_fingerprint"] == target.fingerprint()
    assert drafter.about.get("mean_acceptance_length") == (2.5 if choice == "best" else None)
