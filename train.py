"""Train a target or a drafter, or several drafters at once (the target then runs once per step for all of them):

    python train.py configs/NAME.py [configs/OTHER.py ...] [--field value ...]

A config file holds one recipe; every field can be overridden, in all of them. Runs resume by themselves and stop
cleanly on Ctrl-C.
"""

import os
import runpy
import sys
from itertools import takewhile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it announces that torch is missing, which nobody needs

import tyro  # noqa: E402

from jaxspec.training import Recipe, Stopped, run  # noqa: E402


def read_recipes(arguments: list[str]) -> list[Recipe]:
    """The recipes of config files with command-line overrides. Exits with a message on bad arguments."""
    paths = list(takewhile(lambda argument: not argument.startswith("-"), arguments))
    if not paths:
        known = "\n".join(f"  {path}" for path in sorted(Path("configs").glob("*.py")))
        sys.exit(f"{__doc__}\nrecipes here:\n{known}")
    if missing := [path for path in paths if not Path(path).is_file()]:
        sys.exit(f"no config file {', '.join(missing)}")
    recipes = {path: runpy.run_path(path)["recipe"] for path in paths}
    overrides = arguments[len(paths) :]
    return [
        tyro.cli(type(recipe), default=recipe, args=overrides, prog=f"train.py {path}")
        for path, recipe in recipes.items()
    ]


def main() -> None:
    recipes = read_recipes(sys.argv[1:])
    for recipe in recipes:
        print(recipe)
    try:
        run(*recipes)
    except Stopped as stopped:
        print(stopped)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
