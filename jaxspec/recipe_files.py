"""Recipes as files, one experiment each: those that come with the package (jaxspec/recipes, in a checkout also seen as
configs), by name, and anybody's own, by path.
"""

import ast
import re
import runpy
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxspec.checks import one_line

if TYPE_CHECKING:
    from jaxspec.training import Recipe

FOLDER = Path(__file__).parent / "recipes"


def packaged_recipes() -> Mapping[str, Path]:
    """The files of the package by name, sorted."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.py"))}


def find_recipe(name_or_path: str) -> Path:
    """The file of a packaged recipe, or any other one. A name is that of the package, whatever lies in the working
    directory; a path ends in `.py`. Raises FileNotFoundError."""
    packaged = packaged_recipes()
    if found := packaged.get(name_or_path):
        return found
    path = Path(name_or_path)
    if not name_or_path.endswith(".py"):
        raise FileNotFoundError(
            f"no recipe {name_or_path}: neither a .py file nor one of the package's: {', '.join(packaged)}"
        )
    if not path.is_file():
        known = f"; the package has one of that name: {path.stem}" if path.stem in packaged else ""
        raise FileNotFoundError(f"no recipe file {name_or_path}{known}")
    return path


def load_recipe(name_or_path: str) -> "Recipe":
    """The recipe that a file holds as `recipe`. Raises FileNotFoundError, or ValueError where it holds none or
    fails, with the line."""
    from jaxspec.training import Recipe  # loads slowly, and names are listed without

    path = str(find_recipe(name_or_path))
    try:
        recipe = runpy.run_path(path).get("recipe")
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        raise ValueError(f"{path} cannot be run: {where}{type(error).__name__}: {one_line(str(error))}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name_or_path}: `recipe` must be a recipe of jaxspec.training, got {type(recipe).__name__}")
    return recipe


def headline(path: Path) -> str:
    """The first sentence of a recipe file's docstring; the file is not run."""
    first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n\n")[0]
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(first.split()))[0]
