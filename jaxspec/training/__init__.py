"""Training: recipes, tasks, losses and the loop."""

from jaxspec.training.loop import Stopped, train
from jaxspec.training.recipe import Recipe, Task
from jaxspec.training.target import TargetRecipe, target_task

TASKS = {TargetRecipe: target_task}

__all__ = ["TASKS", "Recipe", "Stopped", "TargetRecipe", "Task", "train"]
