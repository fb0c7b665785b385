"""Where a checkpoint is: names of the embedded model, folders, repo ids."""

from pathlib import Path

import pytest
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
def test_what_the_hub_does_not_give(name, monkeypatch):
    """Its errors have several lines."""

    def refuse(name, **options):
        validate_repo_id(name)
        raise OSError("404 Client Error\n\nRepository not found.")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=f"no folder {name}, and the hub does not give it: ") as told:
        resolve_folder(name)
    assert "\n" not in str(told.value)


def test_the_embedded_model_stands_wherever_a_folder_can():
    target = jaxspec.load_target("demo")
    assert jaxspec.load_drafter("demo:vispec", target).method == "vispec"
    for recipe in (ViSpecRecipe, MassvRecipe, SmallLanguageModelRecipe):
        assert recipe(name="new").target == "demo"
    head = ViSpecRecipe(name="head", num_q=10).new_drafter(target)
    start_from(head, "demo:vispec", target)
    MassvRecipe(name="massv", lm="demo:massv").new_drafter(target)
    with pytest.raises(ValueError, match="init_from demo:vispec does not fit"):
        start_from(ViSpecRecipe(name="head", num_q=3).new_drafter(target), "demo:vispec", target)
