"""The command line: one file per command, each a frozen dataclass of its options with a `run(console)`.

The library raises ValueError and OSError (a missing file) with one clear sentence for whatever a user can get wrong,
and FloatingPointError where a target's logits are not finite; here those sentences become the last line on stderr and
exit status 2.
"""

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import tyro

from jaxspec.cli.bench import Bench
from jaxspec.cli.distill import Distill
from jaxspec.cli.export import Export
from jaxspec.cli.generate import Generate
from jaxspec.cli.output import make_console
from jaxspec.cli.prepare import Prepare
from jaxspec.metrics import AcceptanceWarning
from jaxspec.stopping import Stopped

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Distill, tyro.conf.subcommand("distill")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for input that cannot be used, 130 after Ctrl-C or
    SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = tyro.cli(Command, args=arguments, prog="python -m jaxspec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AcceptanceWarning)  # commands print it themselves
            command.run(make_console(), arguments)
    except SystemExit as stop:  # tyro: 0 after --help, 2 after printing what is wrong with the flags
        return stop.code or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"jaxspec: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"jaxspec: {stopped}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("jaxspec: interrupted", file=sys.stderr)
        return 130
    return 0
