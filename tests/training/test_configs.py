"""The recipes of the package: each file holds the one that its name says, published values where papers name them."""

import dataclasses
import re
import runpy
import shlex
from pathlib import Path

import pytest
import tyro

from jaxspec import TreeConfig
from jaxspec.arguments import DEFAULT_MAX_LENGTH
from jaxspec.cli.commands import read_command
from jaxspec.recipe_files import packaged_recipes
from jaxspec.training import DrafterRecipe, EagleRecipe, MassvRecipe, Recipe, ViSpecRecipe
from jaxspec.training.recipe import load_recipe, recipe_hash

CONFIGS = packaged_recipes()
PUBLISHED = [name for name in CONFIGS if not name.startswith("demo_")]
"""Those for published targets."""


def recipe_of(name: str) -> Recipe:
    return load_recipe(name)


def command_of(name: str, program: str) -> list[str]:
    """The arguments of the only command in a config's docstring that begins with `program`."""
    text = runpy.run_path(str(CONFIGS[name]))["__doc__"].replace("\\\n", " ")
    (command,) = [line.strip() for line in text.splitlines() if line.strip().startswith(f"python {program} ")]
    return shlex.split(command.removeprefix(f"python {program} "))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_holds_its_recipe(name):
    recipe = recipe_of(name)
    assert isinstance(recipe, Recipe) and recipe.name == name
    if isinstance(recipe, DrafterRecipe):
        assert recipe.tree.max_depth >= 1


@pytest.mark.parametrize("target", ["llava16_7b", "llava16_13b", "qwen2_5_vl_3b", "qwen2_5_vl_7b"])
def test_vispec_is_trained_as_published(target):
    """Values of arXiv 2509.15235 and its code, where optimizer and epochs are those of stage 1: ours for stage 2."""
    first, second = recipe_of(f"vispec1_{target}"), recipe_of(f"vispec2_{target}")
    assert type(first) is EagleRecipe and type(second) is ViSpecRecipe
    assert first.target == second.target and second.init_from == f"runs/vispec1_{target}/export"
    for recipe in (first, second):
        assert recipe.tree == TreeConfig(3, 8, 30)
        assert (recipe.learning_rate, recipe.decay, recipe.adam_b2) == (3e-6, "linear", 0.95)
        assert (recipe.clip_value, recipe.clip_norm) == (0.5, 0.0)
        epoch = 68_000 // recipe.batch_size
        assert (recipe.warmup_steps, recipe.steps) == (epoch, 20 * epoch)
    weights = ("feature_weight", "soft_cross_entropy_weight", "probability_l1_weight", "ranking_weight")
    assert [getattr(first, weight) for weight in weights] == [1.0, 0.1, 0.0, 0.01]
    assert [getattr(second, weight) for weight in weights] == [0.0, 0.0, 10.0, 0.1]
    assert (first.mtp_steps, first.feature_noise, first.conversations is None) == (0, 0.1, False)
    assert (second.mtp_steps, second.feature_noise, second.num_q, second.global_feature) == (1, 0.0, 2, True)


def test_no_two_sets_of_answers_share_a_folder():
    recipes = [recipe for recipe in map(recipe_of, PUBLISHED) if recipe.conversations is None]
    assert len(recipes) == len({recipe.answers_dir for recipe in recipes}) == 6


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith(("massv", "vispec2"))])
def test_a_config_tells_how_its_answers_are_made(name):
    recipe = recipe_of(name)
    distill = read_command(command_of(name, "-m jaxspec"), "jaxspec")
    assert (str(distill.output), distill.model.target) == (recipe.answers_dir, recipe.target)
    assert (
        distill.model.max_length or DEFAULT_MAX_LENGTH
    ) == recipe.sequence_length  # of nothing that was answered is a part left out
    assert distill.settings.suffix == ("" if isinstance(recipe, MassvRecipe) else "vispec")


@pytest.mark.parametrize("name", PUBLISHED)
def test_acceptance_is_measured_along_the_way(name):
    recipe = recipe_of(name)
    assert recipe.export_checkpoint == "best" and 8 <= recipe.steps // recipe.acceptance_every <= 24


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("massv")])
def test_massv_has_two_phases(name):
    """Values that arXiv 2505.10526 is believed to state, and 3 % of warm-up in both."""
    path, *overrides = command_of(name, "train.py")
    second = recipe_of(path.removeprefix("configs/").removesuffix(".py"))
    first = tyro.cli(MassvRecipe, default=second, args=overrides)
    assert second.name == name and str(first.export_folder) == second.init_from
    assert (first.phase, first.init_from, first.lm) == (1, None, second.lm)
    assert (first.learning_rate, first.batch_size, first.steps) == (1e-3, 256, 558_128 // 256)
    assert (second.phase, second.learning_rate, second.batch_size) == (2, 2e-5, 128)
    assert first.conversations and second.conversations is None
    for recipe in (first, second):
        assert recipe.warmup_steps == round(0.03 * recipe.steps)
        assert recipe.tree == TreeConfig.chain(5)


def test_a_recipes_hash_is_that_of_what_is_learned():
    recipe = recipe_of("demo_vispec")
    same = dataclasses.replace(recipe, name="other", run_dir="elsewhere", log_every=7, tensorboard=True)
    assert recipe_hash(same) == recipe_hash(recipe)
    for changes in ({"learning_rate": 1e-9}, {"num_q": 3}, {"answers_dir": "others"}):
        assert recipe_hash(dataclasses.replace(recipe, **changes)) != recipe_hash(recipe)


@pytest.mark.parametrize(
    "name", ["demo_eagle2", "demo_eaglevlm", "demo_medusa", "demo_specvlm", "demo_vispec", "demo_massv2"]
)
def test_hashes_of_the_results_are_those_of_the_configs(name):
    results = (Path(__file__).parents[2] / "docs/results/drafters/results.md").read_text()
    assert re.search(rf"; {name} \(recipe hash (\w+),", results)[1] == recipe_hash(recipe_of(name))
