"""Training: recipes, tasks, losses and the loop. `run` does whatever a recipe of `jaxspec/recipes` describes."""

from collections.abc import Sequence
from typing import cast

from jaxspec.stopping import Stopped
from jaxspec.training.drafter import DrafterRecipe, drafter_task, drafter_tasks
from jaxspec.training.eagle import EagleRecipe
from jaxspec.training.inputs import check_inputs
from jaxspec.training.language_model import SmallLanguageModelRecipe, language_model_task
from jaxspec.training.loop import train, train_together
from jaxspec.training.massv import MassvRecipe
from jaxspec.training.medusa import MedusaRecipe
from jaxspec.training.recipe import Recipe, Task
from jaxspec.training.specvlm import SpecVLMRecipe
from jaxspec.training.target import TargetRecipe, target_task
from jaxspec.training.vision import VisionRecipe, vision_task
from jaxspec.training.vispec import ViSpecRecipe

__all__ = [
    "DrafterRecipe",
    "EagleRecipe",
    "MassvRecipe",
    "MedusaRecipe",
    "Recipe",
    "SmallLanguageModelRecipe",
    "SpecVLMRecipe",
    "Stopped",
    "TargetRecipe",
    "Task",
    "ViSpecRecipe",
    "VisionRecipe",
    "run",
]


def run(*recipes: Recipe) -> None:
    """Run or resume a recipe, or several recipes of drafters for the same target on the same answers, which then runs
    once per step for all of them.

    Raises Stopped after a signal, with everything saved, and FileNotFoundError, naming the command, where what a recipe
    reads has yet to be made.
    """
    for recipe in recipes:
        if not isinstance(recipe, Recipe):
            raise ValueError(f"`recipe` must be a recipe of jaxspec.training, got {type(recipe).__name__}")
        check_inputs(recipe)
    if len(recipes) > 1:
        train_together(recipes, drafter_tasks(cast(Sequence[DrafterRecipe], recipes)))  # which looks whether they are
        return
    (recipe,) = recipes
    match recipe:
        case DrafterRecipe():
            train(recipe, drafter_task(recipe))
        case SmallLanguageModelRecipe():
            train(recipe, language_model_task(recipe))
        case TargetRecipe():
            train(recipe, target_task(recipe))
        case VisionRecipe():
            train(recipe, vision_task(recipe))
        case _:
            raise ValueError(f"{type(recipe).__name__} is no recipe that can be run")
