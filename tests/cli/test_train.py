"""`python -m jaxspec train`: recipes by name and by file, what is printed of them, and what they lack."""

import io
import re
import shlex
import sys

import pytest
from rich.console import Console

from jaxspec.cli import main
from jaxspec.cli.commands import COMMANDS, read_command
from jaxspec.cli.train import differences, show
from jaxspec.drafters.compressor import CompressorConfig
from jaxspec.recipe_files import FOLDER, packaged_recipes
from jaxspec.training import EagleRecipe, Recipe, SpecVLMRecipe, ViSpecRecipe
from jaxspec.training.recipe import load_recipe


@pytest.fixture
def trained(monkeypatch) -> list[Recipe]:
    """The recipes that would be trained."""
    recipes: list[Recipe] = []
    monkeypatch.setattr("jaxspec.training.run", lambda *given: recipes.extend(given))
    return recipes


def test_without_a_recipe_they_are_listed(capsys):
    assert main(["train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [*packaged_recipes()]
    assert all(len(line.partition(": ")[2]) > 20 and line.endswith(".") for line in lines)


def test_names_and_files_with_fields_for_all_of_them(tmp_path, monkeypatch, trained):
    (tmp_path / "mine.py").write_text(
        "from jaxspec.training import EagleRecipe\nrecipe = EagleRecipe(name='mine', method='eagle2')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo_vispec", "mine.py", "--steps", "7", "--warmup-steps", "0"]) == 0
    assert [type(recipe) for recipe in trained] == [ViSpecRecipe, EagleRecipe]
    assert [(recipe.name, recipe.steps) for recipe in trained] == [("demo_vispec", 7), ("mine", 7)]
    assert trained[0].learning_rate == load_recipe("demo_vispec").learning_rate


def test_a_file_does_not_hide_a_name(tmp_path, monkeypatch, trained):
    (tmp_path / "demo_lm").mkdir()
    (tmp_path / "demo_lm.py").write_text("recipe = None")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo_lm"]) == 0
    assert trained == [load_recipe(str(FOLDER / "demo_lm.py"))]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demo_nothing"], "no recipe demo_nothing: neither a .py file nor one of the package's: demo_eagle2, "),
        (["configs/demo_vispec.py"], "no recipe file configs/demo_vispec.py; the package has one of that name: "),
        (["fails.py"], "fails.py cannot be run: line 2: ZeroDivisionError: division by zero"),
        (["syntax.py"], "syntax.py cannot be run: SyntaxError: "),
        (["none.py"], "none.py: `recipe` must be a recipe of jaxspec.training, got NoneType"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, sentence):
    (tmp_path / "none.py").write_text("")
    (tmp_path / "fails.py").write_text("a = 0\nb = 1 / a\n")
    (tmp_path / "syntax.py").write_text("def\n")
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.count("\n") == 1


def test_help_shows_the_fields_and_unknown_flags_are_errors(capsys, trained):
    assert main(["train", "demo_vispec", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "train demo_vispec [-h]" in shown and "--num-q INT" in shown and "(default: 552)" in shown
    assert main(["train", "--help"]) == 0
    assert "NAME|FILE.py" in capsys.readouterr().out
    wrong = [["demo_vispec", "--colour", "red"], ["--steps", "3"], ["demo_vispec", "--steps", "few"]]
    for arguments in (*wrong, ["demo_vispec", "--batch-size", "0"]):
        assert main(["train", *arguments]) == 2
        assert arguments[-2].strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")
    assert not trained


@pytest.mark.parametrize("called", ["/usr/bin/jaxspec", "/somewhere/jaxspec/__main__.py"])
def test_help_of_every_command_calls_it_as_it_was_called(monkeypatch, capsys, called):
    monkeypatch.setattr(sys, "argv", [called])
    program = "jaxspec" if called.endswith("bin/jaxspec") else "python -m jaxspec"
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: {program} {command} ")
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {program} [-h] {{{','.join(COMMANDS)}}}") and "--version" in shown


def test_only_what_differs_from_the_defaults_is_told():
    recipe = SpecVLMRecipe(name="it", steps=5, warmup_steps=0, compressor=CompressorConfig(num_queries=9))
    told = {field: (value, default) for field, value, default in differences(recipe)}
    queries = str(CompressorConfig().num_queries)
    assert told == {"steps": ("5", "1000"), "warmup_steps": ("0", "100"), "compressor.num_queries": ("9", queries)}


def test_a_table_on_a_terminal_and_lines_in_a_pipe():
    recipe = EagleRecipe(name="it", method="eagle2", steps=200)
    piped, terminal = io.StringIO(), io.StringIO()
    show(Console(file=piped, width=160), recipe)
    assert piped.getvalue() == "it: steps 200 (default: 1000)\n"
    show(Console(file=terminal, width=80, force_terminal=True, color_system=None), recipe)
    lines = [line.split() for line in terminal.getvalue().splitlines()]
    assert lines[0] == ["it,", "a", "EagleRecipe", "with"] and lines[1] == ["field", "value", "default"]
    assert lines[-1] == ["steps", "200", "1000"]


def test_what_is_not_there_yet_is_named_with_the_command_that_makes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "demo_vispec"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    distill, train = (shlex.split(command)[3:] for command in re.findall("`(.*?)`", told))
    assert train == ["train", "demo_vispec1"] and "minutes" in told
    command = read_command(distill, "jaxspec")
    documented = load_docstring("demo_eagle2")
    assert shlex.join(distill) in documented
    assert (command.model.target, str(command.output)) == ("demo", load_recipe("demo_vispec").answers_dir)


def load_docstring(name: str) -> str:
    """Of a recipe, in one line."""
    return " ".join(packaged_recipes()[name].read_text().replace("\\\n", " ").split())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["demo_massv2"], ["its init_from runs/demo_massv1/export, made by `python -m jaxspec train demo_massv1`"]),
        (["demo_massv1"], ["its lm runs/demo_lm/export, made by `python -m jaxspec train demo_lm`"]),
        (["demo_target"], ["its init_from runs/demo_target_shallow/export"]),
        (["demo_target_align"], ["its vision_from runs/demo_vision/export"]),
        (
            ["demo_eagle2", "--target", "runs/demo_target/export"],
            ["--data scenes --target runs/demo_target/export", "`python -m jaxspec train demo_target`"],
        ),
        (["vispec2_llava16_7b"], ["that ", "recipes/vispec2_llava16_7b.py names", "train vispec1_llava16_7b"]),
    ],
)
def test_every_kind_of_input(tmp_path, monkeypatch, capsys, arguments, parts):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    told = capsys.readouterr().err
    for part in parts:
        assert part in told
