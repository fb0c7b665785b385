"""Train a target or a drafter: `python train.py configs/NAME.py [--field value ...]`.

A config file holds one recipe; every field can be overridden. Runs resume by themselves and stop cleanly on Ctrl-C.
"""

import runpy
import sys
from pathlib import Path

import tyro

from jaxspec.training import TASKS, Recipe, Stopped, train


def read_recipe(arguments: list[str]) -> Recipe:
    """The recipe of a config file with command-line overrides. Exits with a message on bad arguments."""
    if not arguments or arguments[0].startswith("-"):
        sys.exit(f"{__doc__}\nrecipes: {', '.join(sorted(map(str, Path('configs').glob('*.py'))))}")
    path, overrides = Path(arguments[0]), arguments[1:]
    if not path.exists():
        sys.exit(f"no config file {path}")
    recipe = runpy.run_path(str(path))["recipe"]
    return tyro.cli(type(recipe), default=recipe, args=overrides, prog=f"train.py {path}")


def main() -> None:
    recipe = read_recipe(sys.argv[1:])
    print(recipe)
    try:
        train(recipe, TASKS[type(recipe)](recipe))
    except Stopped as stopped:
        print(stopped)


if __name__ == "__main__":
    main()
