"""`python -m jaxspec train`: recipes by name or file, with every field of theirs as a flag."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated

import tyro
from rich.console import Console

import jaxspec.cli
from jaxspec.cli.output import table
from jaxspec.recipe_files import headline, packaged_recipes

if TYPE_CHECKING:
    from jaxspec.training import Recipe


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a target or a drafter, or several drafters at once: the target then runs once per step for all of them.

    A recipe comes from the package, by name, or from a file of your own that holds it as `recipe`. Behind the recipes
    every field can be set, in all of them (`train NAME --help` shows the fields). Runs resume by themselves and stop
    cleanly on Ctrl-C. Without a recipe those of the package are listed.
    """

    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME|FILE.py")] = ()
    """What to train. Nothing: the package's recipes are listed."""

    def run(self, console: Console, arguments: Sequence[str]) -> None:
        if not self.recipes:
            for name, path in packaged_recipes().items():
                console.print(f"{name}: {headline(path)}", markup=False, soft_wrap=not console.is_terminal)
            return
        recipes = resolved_recipes(self.recipes, arguments[1 + len(self.recipes) :])
        from jaxspec.training import run  # loads slowly

        for recipe in recipes:
            show(console, recipe)
        run(*recipes)


def before_overrides(arguments: list[str]) -> list[str]:
    """Of a command line that names recipes to train, what stands before their fields; any other one as it is."""
    if arguments[:1] != ["train"]:
        return arguments
    known = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    return known if len(known) > 1 else arguments


def resolved_recipes(names: Sequence[str], overrides: Sequence[str]) -> list["Recipe"]:
    """Recipes with fields from the command line. Exits, as tyro does, after --help and for unknown flags."""
    from jaxspec.training.recipe import load_recipe  # loads slowly

    prog = f"{jaxspec.cli.program()} train {' '.join(names)}"
    recipes = [load_recipe(name) for name in names]
    return [tyro.cli(type(recipe), default=recipe, args=overrides, prog=prog) for recipe in recipes]


def show(console: Console, recipe: "Recipe") -> None:
    """What is special about a recipe: the fields that differ from their defaults."""
    rows = differences(recipe)
    if console.is_terminal:
        console.print(f"{recipe.name}, a {type(recipe).__name__} with", markup=False)
        console.print(table(console, ("field", "value", "default"), rows))
    else:
        for field, value, default in rows:
            console.print(f"{recipe.name}: {field} {value} (default: {default})", markup=False, soft_wrap=True)


def differences(recipe: "Recipe") -> list[tuple[str, str, str]]:
    """(field, value, default) of all that is not as by default but the name; what is nested, field by field."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in dataclasses.fields(recipe)
    }
    return list(unlike(recipe, {name: value for name, value in defaults.items() if value is not dataclasses.MISSING}))


def unlike(value: object, defaults: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for name, default in defaults.items():
        now = getattr(value, name)
        if dataclasses.is_dataclass(default) and type(now) is type(default):
            inner = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
            yield from unlike(now, inner, f"{prefix}{name}.")
        elif now != default:
            yield f"{prefix}{name}", str(now), str(default)
