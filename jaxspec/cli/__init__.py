"""The command line: one file per command, each a frozen dataclass of its options with a `run(console)`.

The library raises ValueError and OSError (a missing file) with one clear sentence for whatever a user can get wrong,
and FloatingPointError where numbers are not finite; here those sentences become the last line on stderr and exit status
2, or 1 for numbers.
"""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jaxspec
from jaxspec.distribution import NAME, installed_version, namesake
from jaxspec.stopping import Broken, Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for input that cannot be used, 1 for a target or a training whose
    numbers are not finite and for a server that broke, 130 after Ctrl-C or SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "load_target" not in getattr(jaxspec, "__all__", ()):  # that package is not ours, this one still is
        print(f"jaxspec: {namesake() or f'its __init__.py is not that of {NAME}: install it again'}", file=sys.stderr)
        return 2
    if arguments == ["--version"]:
        print(f"jaxspec {installed_version()}")
        return 0
    try:
        run(arguments)
    except SystemExit as stop:  # tyro: 0 after --help, 2 after printing what is wrong with the flags
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BrokenPipeError:  # whoever read what we print has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, FloatingPointError, Broken) as error:
        print(f"jaxspec: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError | Broken) else 2
    except Stopped as stopped:
        print(f"jaxspec: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("jaxspec: interrupted", file=sys.stderr)
        return 130
    return 0


def run(arguments: list[str]) -> None:
    from jaxspec.cli.commands import read_command  # slow to load, and --version needs none of it
    from jaxspec.cli.output import make_console
    from jaxspec.cli.train import before_overrides
    from jaxspec.metrics import AcceptanceWarning

    command = read_command(before_overrides(arguments), program())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AcceptanceWarning)  # commands print it themselves
        command.run(make_console(), arguments)


def program() -> str:
    """How this was called."""
    return "jaxspec" if Path(sys.argv[0]).stem == "jaxspec" else "python -m jaxspec"
