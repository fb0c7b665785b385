"""Where a checkpoint is: names of the embedded model, folders, repo ids."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

import jaxspec
from jaxspec import demo
from jaxspec.checkpoints import hub
from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.demo import EMBEDDED_DRAFTERS
from jaxspec.training import MassvRecipe, SmallLanguageModelRecipe, ViSpecRecipe
from jaxspec.training.drafter import start_from


def test_names_of_the_embedded_model():
    assert resolve_folder("demo") == demo.target_path()
    for method in EMBEDDED_DRAFTERS:
        assert resolve_folder(f"demo:{method}") == demo.drafter_path(method)


@pytest.mark.parametrize("name", ["demo:", "demo:hydra", "demo:target", "demo:../target"])
def test_other_drafters_of_the_embedded_model_are_refused(name):
    with pytest.raises(FileNotFoundError, match="there are demo:eagle2, .*demo:vispec") as told:
        resolve_folder(name)
    assert repr(name.removeprefix("demo:")) in str(told.value) and "\n" not in str(told.value)


def test_a_folder_called_demo_is_reached_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("demo") == demo.target_path()
    for path in ("./demo", Path("demo"), tmp_path / "demo"):
        assert resolve_folder(path).samefile(tmp_path / "demo")


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "./nothing", "nothing", "demo2"])
def test_what_is_no_folder_and_no_repo_id(name):
    with pytest.raises(FileNotFoundError, match=f"no folder {name} "):
        resolve_folder(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model-Q4_K_M.gguf", " (GGUF, llama.cpp's format)"),
        ("pytorch_model.bin", " (PyTorch's format)"),
        ("medusa_lm_head.pt", " (PyTorch's format)"),
        ("model.safetensors", ""),
        ("consolidated.safetensors", ""),
    ],
)
def test_a_file_is_no_folder(name, said, tmp_path, monkeypatch):
    """Not even where its path looks like a repo id."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "models" / name, f"models/{name}"):
        with pytest.raises(ValueError) as told:
            resolve_folder(path)
        assert str(told.value) == f"{path} is a file{said}; what is read is " + (
            "a folder with config.json and model.safetensors or its shards"
        )


def test_what_the_hub_does_not_give(monkeypatch):
    """A mistyped folder looks like a repo id: the sentence says which, whatever the hub's client says."""

    def unreachable(*args, **options):
        raise LocalEntryNotFoundError("Got: ConnectError: [Errno -2]\nAn error happened.")

    monkeypatch.setattr("jaxspec.checkpoints.hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match="^no folder runs/hed, and the hub .*: Got: ConnectError: .*happened.$"):
        resolve_folder("runs/hed")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "medusa_lm_head.pt", "model-Q4_K_M.gguf"])
def test_weights_that_the_hub_has_in_another_format(name, tmp_path, monkeypatch):
    """Most published heads: they are named without being downloaded."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("jaxspec.checkpoints.hub.snapshot_download", lambda repo, allow_patterns: tmp_path)
    listed = ["config.json", "onnx/model.onnx", name, "training_args.bin"]
    monkeypatch.setattr("jaxspec.checkpoints.hub.list_repo_files", lambda repo: listed)
    with pytest.raises(ValueError, match=f"^repository owner/head holds its weights as {name} \\(.*safetensors$"):
        resolve_folder("owner/head")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_folder("owner/head") == tmp_path


@pytest.mark.parametrize("name", [None, 5, b"demo", ["demo"], True])
def test_what_is_no_path(name):
    with pytest.raises(ValueError, match="a folder must be a path or a repo id, got"):
        resolve_folder(name)


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b", "\ud800"])
def test_what_no_system_takes_for_a_path(name):
    with pytest.raises(FileNotFoundError, match="no folder ") as told:
        resolve_folder(name)
    assert len(str(told.value)) < 500


@pytest.mark.parametrize("name", ["owner/no--name", "owner/missing"])
def test_errors_of_the_hub_are_one_line(name, monkeypatch):
    """Its errors have several lines."""

    def refuse(name, **options):
        validate_repo_id(name)
        raise OSError("404 Client Error\n\nRepository not found.")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(
        FileNotFoundError, match=f"no folder {name}, and the hub does not give it as a repository: "
    ) as told:
        resolve_folder(name)
    assert "\n" not in str(told.value)


def test_the_embedded_model_stands_wherever_a_folder_can():
    target = jaxspec.load_target("demo")
    assert jaxspec.load_drafter("demo:vispec", target).method == "vispec"
    for recipe in (ViSpecRecipe, MassvRecipe, SmallLanguageModelRecipe):
        assert recipe(name="new").target == "demo"
    head = ViSpecRecipe(name="head", num_q=10).new_draft_model(target)
    start_from(head, "demo:vispec", target)
    MassvRecipe(name="massv", lm="demo:massv").new_draft_model(target)
    with pytest.raises(ValueError, match="init_from demo:vispec does not fit"):
        start_from(ViSpecRecipe(name="head", num_q=3).new_draft_model(target), "demo:vispec", target)
