"""The files in configs/: each holds the recipe that its name says, published values where papers name them."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from jaxspec import TreeConfig
from jaxspec.training import DrafterRecipe, EagleRecipe, Recipe, ViSpecRecipe
from jaxspec.training.recipe import recipe_hash

CONFIGS = {path.stem: path for path in (Path(__file__).parents[2] / "configs").glob("*.py")}


def recipe_of(name: str) -> Recipe:
    return runpy.run_path(str(CONFIGS[name]))["recipe"]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_holds_its_recipe(name):
    recipe = recipe_of(name)
    assert isinstance(recipe, Recipe) and recipe.name == name
    if isinstance(recipe, DrafterRecipe):
        assert recipe.tree.max_depth >= 1


@pytest.mark.parametrize("target", ["llava16_7b", "llava16_13b", "qwen2_5_vl_3b", "qwen2_5_vl_7b"])
def test_vispec_is_trained_as_published(target):
    """Values of arXiv 2509.15235 and its code."""
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


def test_a_recipes_hash_is_that_of_what_is_learned():
    recipe = recipe_of("demo_vispec")
    same = dataclasses.replace(recipe, name="other", run_dir="elsewhere", log_every=7, tensorboard=True)
    assert recipe_hash(same) == recipe_hash(recipe)
    for changes in ({"learning_rate": 1e-9}, {"num_q": 3}, {"answers_dir": "others"}):
        assert recipe_hash(dataclasses.replace(recipe, **changes)) != recipe_hash(recipe)
