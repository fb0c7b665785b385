"""What commands print: a rich console that is plain text when piped, waiting signs, a progress bar, coloured text."""

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxspec.colours import visible
from jaxspec.targets.generation import GenerationDefaults

PIPED_WIDTH = 160
ACCEPTED_STYLE = "green"


def make_console() -> Console:
    """On stdout: colours on a terminal, else plain text that is wide enough for the tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH, record=True)


def waiting(console: Console, what: str) -> contextlib.AbstractContextManager[Any]:
    """A context with a spinner on a terminal; nothing elsewhere."""
    return console.status(Text(what)) if console.is_terminal else contextlib.nullcontext()


def table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Names to the left, numbers to the right; closer together where the terminal is narrow."""
    narrow = console.width < 110
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0 if narrow else (0, 1))
    for index, column in enumerate(columns):
        cells = [column, *(row[index] for row in rows)]
        longest_word = max(len(word) for cell in cells for word in [*cell.split(), ""])
        width = longest_word if narrow else None
        made.add_column(column, justify="right" if index else "left", overflow="fold", width=width)
    for row in rows:
        made.add_row(*map(Text, row))
    return made


class ProgressLines:
    """A progress bar with rate and time left on a terminal; a plain line every tenth of the way when piped.

    `done` steps were there before: they count for the way, not for the rate.
    """

    def __init__(self, console: Console, name: str, total: int, done: int = 0) -> None:
        self.console, self.name, self.total, self.done, self.before = console, name, total, done, done
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> "ProgressLines":
        self.bar.start()
        self.row = self.bar.add_task(self.name, total=self.total, completed=self.done, rate="")
        self.started = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def advance(self, steps: int = 1) -> None:
        if not steps:
            return
        tenths = self.done * 10 // self.total
        self.done += steps
        rate = (self.done - self.before) / max(time.perf_counter() - self.started, 1e-9)
        self.bar.update(self.row, completed=self.done, rate=f"{rate:.3g}/s")
        if not self.console.is_terminal and self.done * 10 // self.total > tenths:
            left = (self.total - self.done) / rate
            self.console.print(f"{self.name}: {self.done}/{self.total}, {rate:.3g}/s, {left:.0f} s left")


def show_warning(console: Console, sentence: str | None) -> None:
    if sentence is not None:
        console.print(f"warning: {sentence}", style="yellow", markup=False)


def show_applied(defaults: GenerationDefaults, values: Mapping[str, float]) -> None:
    """One line on stderr that says which of a folder's sampling defaults apply; nothing where none does."""
    if values:
        said = ", ".join(f"{name} {value:g}" for name, value in values.items())
        print(f"from {defaults.source}: {said} (--no-generation-config turns that off)", file=sys.stderr)


def coloured(runs: Sequence[tuple[str, bool]]) -> Text:
    return Text.assemble(*((visible(part), ACCEPTED_STYLE if drafted else "") for part, drafted in runs))
