"""Train a target or a drafter:

    python train.py configs/NAME.py [--field value ...]

A config file holds one recipe; every field can be overridden. Runs resume by themselves and stop cleanly on Ctrl-C.
"""

import os
import runpy
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it announces that torch is missing, which nobody needs

import tyro  # noqa: E402

from jaxspec.training import Recipe, Stopped, run  # noqa: E402


def read_recipe(arguments: list[str]) -> Recipe:
    """The recipe of a config file with command-line overrides. Exits with a message on bad arguments."""
    if not arguments or arguments[0].startswith("-"):
        known = "\n".join(f"  {path}" for path in sorted(Path("configs").glob("*.py")))
        sys.exit(f"{__doc__}\nrecipes here:\n{known}")
    path, overrides = Path(arguments[0]), arguments[1:]
    if not path.is_file():
        sys.exit(f"no config file {path}")
    recipe = runpy.run_path(str(path))["recipe"]
    return tyro.cli(type(recipe), default=recipe, args=overrides, prog=f"train.py {path}")


def main() -> None:
    recipe = read_recipe(sys.argv[1:])
    print(recipe)
    try:
        run(recipe)
    except Stopped as stopped:
        print(stopped)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
