"""`python -m jaxspec export`: a trained drafter as a folder in the published layout."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.drafters.checkpoint import (
    EMBEDDING,
    is_drafter_folder,
    load_drafter_folder,
    read_drafter_folder,
    save_drafter_folder,
)
from jaxspec.drafters.drafter import Drafter, load_drafter
from jaxspec.drafters.registry import METHODS
from jaxspec.targets.target import DTYPES, Target, load_target


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a drafter (safetensors and config.json) in the layout that its authors publish.

    Nothing about a drafter changes on the way but, where asked, the type of its numbers.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder that training exported, any other drafter folder or repo id, or the folder of a run: of that the best
    checkpoint is taken, or the latest where acceptance was not measured."""
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """A new folder, or a drafter folder to replace."""
    target: Annotated[str | None, tyro.conf.arg(metavar="PATH|REPO")] = None
    """The drafter must fit this target. For a run, the target of its recipe by default."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default as in SOURCE, or as the run's recipe says."""

    def run(self, console: Console, arguments: Sequence[str]) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        source, output = resolve_folder(self.source), Path(self.output)
        check_replaceable(output)
        if (source / "config.json").is_file():
            drafter, dtype, embedding = self.from_drafter(source)
        elif (source / "recipe.json").is_file():
            drafter, dtype, embedding = self.from_run(source)
        else:
            raise FileNotFoundError(f"{source} is neither a drafter folder (config.json) nor a run (recipe.json)")
        dtype = self.dtype or dtype
        output.parent.mkdir(parents=True, exist_ok=True)
        save_drafter_folder(
            drafter.model, drafter.method, drafter.tree, None, output, dtype, drafter.about, embedding=embedding
        )
        step = f" of step {drafter.about['step']}" if "step" in drafter.about else ""
        console.print(f"{METHODS[drafter.method].title} drafter{step}, {dtype}: {output}", markup=False)

    def from_drafter(self, folder: Path) -> tuple[Drafter, str, np.ndarray | None]:
        """The drafter, the dtype that holds all its tensors, and its copy of the embedding."""
        raw, tensors, name = read_drafter_folder(folder)
        embedding = tensors.get(EMBEDDING)
        if self.target is not None:
            target = load_target(self.target)
            drafter = load_drafter(folder, target)
            embedding = embedding_of(target) if embedding is None else embedding
        else:
            model, tree = load_drafter_folder(folder, None)
            drafter = Drafter(model, tree, name, raw.get("jaxspec", {}))
        if embedding is None and METHODS[drafter.method].copies_embedding:
            raise ValueError(f"{folder} has no {EMBEDDING}: name its target with --target")
        return drafter, jnp.result_type(*(array.dtype for array in tensors.values())).name, embedding

    def from_run(self, folder: Path) -> tuple[Drafter, str, np.ndarray | None]:
        from jaxspec.training.runs import drafter_of_run, read_recipe  # what training needs loads slowly

        recipe = read_recipe(folder)
        target = load_target(self.target or recipe.target, recipe.target_dtype)
        return drafter_of_run(folder, recipe, target), recipe.save_dtype, embedding_of(target)


def embedding_of(target: Target) -> np.ndarray:
    return np.asarray(target.model.embedding)


def check_replaceable(output: Path) -> None:
    """Raises ValueError for what exists and is neither empty nor a drafter folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())) or is_drafter_folder(output):
        return
    raise ValueError(f"{output} exists and is no drafter folder: it is not replaced")
