"""The package as it is installed and imported: what the wheel holds, what an import loads, whose name it has."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import jaxspec
from jaxspec import distribution
from jaxspec.cli import main
from jaxspec.demo import EMBEDDED_DRAFTERS
from jaxspec.recipe_files import packaged_recipes

ROOT = Path(__file__).parents[1]
HEAVY = ["transformers", "torch", "PIL", "tokenizers", "safetensors", "orbax", "grain", "tensorflow_datasets", "flax"]


def files_of(builder) -> set[str]:
    return {file.distribution_path for file in builder(str(ROOT)).recurse_included_files()}


def test_the_wheel_holds_code_recipes_models_and_nothing_else():
    files = files_of(WheelBuilder)
    assert all(file.startswith("jaxspec/") for file in files)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "jaxspec").rglob("*.py")}
    weights = {f"jaxspec/demo/weights/{name}/model.safetensors" for name in ("target", *EMBEDDED_DRAFTERS)}
    assert modules | weights | {"jaxspec/py.typed", "jaxspec/demo/pictures/scene.png"} <= files
    assert {f"jaxspec/recipes/{name}.py" for name in packaged_recipes()} <= files
    assert not [file for file in files if "__pycache__" in file or file.endswith(".tmp")]


def test_a_wheel_can_be_made_from_the_sdist():
    """Both hold the same package, though a checkout shows the recipes twice."""
    sdist = files_of(SdistBuilder)
    assert {file for file in sdist if file.startswith("jaxspec/")} == files_of(WheelBuilder)
    assert {"pyproject.toml", "README.md", "LICENSE", "train.py"} <= sdist


def test_name_command_and_summary():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["scripts"]) == (distribution.NAME, {"jaxspec": "jaxspec.cli:main"})
    assert project["description"] == distribution.SUMMARY


@pytest.mark.parametrize("where", ["jaxspec", "docs", "README.md", "CONTRIBUTING.md"])
def test_nobody_is_told_to_install_the_other_jaxspec(where):
    path = ROOT / where
    for file in [path] if path.is_file() else [*path.rglob("*.py"), *path.rglob("*.md")]:
        text = file.read_text()
        assert "install jaxspec" not in text.replace("install jaxspec-vlm", "") and "'jaxspec[" not in text, file


def in_a_process(code: str) -> str:
    """What it prints, with a clean environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS")}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("jaxspec", ()),
        ("jaxspec.speculation.tree", ()),
        ("jaxspec.kernels.attention", ()),
        ("jaxspec.drafters.vispec", ("flax",)),
        ("jaxspec.demo", ("PIL",)),
    ],
)
def test_an_import_loads_what_it_needs(module, allowed):
    code = f"""
import os, sys
before = dict(os.environ)
import {module}
assert os.environ == before
print(*(name for name in {HEAVY} if name in sys.modules))
"""
    assert set(in_a_process(code).split()) <= set(allowed)


def test_what_is_exported_is_there():
    assert set(jaxspec.__all__) <= set(dir(jaxspec))
    names = {}
    exec("from jaxspec import *", names)
    for name in jaxspec.__all__:
        assert names[name] is getattr(jaxspec, name)
    assert {*jaxspec._HOMES, "demo"} == {*jaxspec.__all__}
    assert jaxspec.demo.target_path().is_dir()
    assert jaxspec.speculation.tree.TreeConfig is jaxspec.TreeConfig
    with pytest.raises(AttributeError, match="'jaxspec' has no attribute 'no_such_name'"):
        _ = jaxspec.no_such_name


def test_transformers_does_not_ask_for_torch():
    """Whoever imports it first: the advice is a warning of the logger that it would be given to."""
    code = """
import logging, sys
import jaxspec
logger = logging.getLogger("transformers")
logger.addHandler(logging.StreamHandler(sys.stdout))
logger.warning("PyTorch was not found. Models won't be available")
logger.warning("something else")
"""
    assert in_a_process(code).split("\n") == ["something else", ""]


def installed(folder: Path, summary: str) -> str:
    """A folder in which a distribution called jaxspec is installed."""
    about = folder / "jaxspec-0.3.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: jaxspec\nVersion: 0.3.1\nSummary: {summary}\n")
    return str(folder)


def test_another_jaxspec_is_noticed(tmp_path, monkeypatch, capsys):
    theirs = installed(tmp_path / "theirs", "A library for X-ray spectra")
    ours = installed(tmp_path / "ours", distribution.SUMMARY)  # from when we were called so
    monkeypatch.setattr(sys, "path", [ours])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distribution.warn_of_namesakes()
    monkeypatch.setattr(sys, "path", [ours, theirs])
    with pytest.warns(UserWarning) as told:
        distribution.warn_of_namesakes()
    (sentence,) = (str(each.message) for each in told)
    for part in ("jaxspec 0.3.1 (A library for X-ray spectra)", "same import name as jaxspec-vlm", "uninstall both"):
        assert part in sentence
    monkeypatch.setattr(jaxspec, "__all__", ["SpectralModel"])  # theirs was installed last
    assert main(["train"]) == 2
    assert capsys.readouterr().err == f"jaxspec: {sentence}\n"


def test_the_version_is_that_of_the_distribution(monkeypatch, capsys):
    monkeypatch.setattr(distribution, "version", {distribution.NAME: "7.8"}.__getitem__)
    assert distribution.installed_version() == "7.8"

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(distribution, "version", missing)
    assert distribution.installed_version() == "0+unknown"
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "jaxspec 0+unknown\n"
