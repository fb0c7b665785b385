"""Runs of drafters read back from their folders: the recipe, and the drafter in the checkpoints."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flax import nnx

import jaxspec
from jaxspec.checkpoints.tensors import read_json
from jaxspec.drafters.drafter import Drafter
from jaxspec.training.checkpoints import BEST, LATEST, manager, restore
from jaxspec.training.drafter import DrafterRecipe, about_run, split_draft_model
from jaxspec.training.member import initial_state

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Kind = TypeVar("Kind", bound="DataclassInstance")


def read_recipe(folder: Path) -> DrafterRecipe:
    """The recipe of a run. Raises ValueError where it is not one of jaxspec's recipes for drafters."""
    values = read_json(folder / "recipe.json")
    name = values.pop("type", None)
    known = {each.__name__: each for each in subclasses(DrafterRecipe)}
    if name not in known:
        raise ValueError(f"{folder} holds a run of {name}, not of a drafter's recipe ({', '.join(sorted(known))})")
    fields = {field.name for field in dataclasses.fields(known[name])}
    if unknown := sorted(values.keys() - fields):
        raise ValueError(f"{folder}/recipe.json has fields that {name} does not know: {', '.join(unknown)}")
    return from_json(known[name], values)


def from_json(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """A dataclass from what `dataclasses.asdict` and JSON made of it: lists were tuples, dicts were dataclasses."""
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(kind)}

    def restored(name: str, value: Any) -> Any:
        if isinstance(value, dict) and dataclasses.is_dataclass(defaults[name]):
            return from_json(type(defaults[name]), value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: restored(name, value) for name, value in values.items()})


def drafter_of_run(folder: Path, recipe: DrafterRecipe, target: jaxspec.Target) -> Drafter:
    """The drafter that the run would export now: of its best checkpoint, if it has one and the recipe wants it, else of
    the latest. Raises FileNotFoundError where no checkpoint was saved."""
    folder = folder.absolute()  # as orbax wants it
    graph, params, rest = split_draft_model(recipe, target)
    about = about_run(recipe, target)
    if recipe.export_checkpoint == "best" and (folder / BEST).is_dir():
        with manager(folder / BEST, read_only=True) as source:
            if (step := source.best_step()) is not None:
                about |= source.metrics(step)
                params = restore(source, step, params)
                return Drafter(nnx.merge(graph, params, rest), recipe.tree, recipe.method, about)
    if not (folder / LATEST).is_dir():
        raise FileNotFoundError(f"no checkpoint in {folder}")
    with manager(folder / LATEST, read_only=True) as source:
        if (step := source.latest_step()) is None:
            raise FileNotFoundError(f"no complete checkpoint in {folder / LATEST}")
        params = restore(source, step, initial_state(recipe, params)).params
    return Drafter(nnx.merge(graph, params, rest), recipe.tree, recipe.method, about | {"step": step})


def subclasses(parent: type[Kind]) -> set[type[Kind]]:
    return {parent}.union(*map(subclasses, parent.__subclasses__()))
