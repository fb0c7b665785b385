"""The commands by name. Their modules load slowly, so that only what was asked for is imported."""

from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

import tyro

COMMANDS = ("generate", "bench", "distill", "train", "export", "prepare", "serve")
"""Each is a module here, and in it a class of that name."""
DESCRIPTION = (
    "Vision-language models that answer faster without changing a single answer. --version says which jaxspec this is."
)


def read_command(arguments: Sequence[str], program: str) -> Any:
    """A command with its options. Exits after --help (0) and, with what is wrong on stderr, for bad flags (2)."""
    if arguments and arguments[0] in COMMANDS:
        name, *options = arguments
        return tyro.cli(command_named(name), args=options, prog=f"{program} {name}")
    every = [named(name) for name in COMMANDS]
    return tyro.cli(reduce(or_, every), args=list(arguments), prog=program, description=DESCRIPTION)


def named(name: str) -> Any:
    """What tyro makes a subcommand of."""
    command: Any = command_named(name)
    return Annotated[command, tyro.conf.subcommand(name)]


def command_named(name: str) -> type:
    return getattr(import_module(f"jaxspec.cli.{name}"), name.capitalize())
