"""`python -m jaxspec prepare`: a file of conversations and its pictures as one data set."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxspec.cli.output import waiting
from jaxspec.data.sources import build_conversations


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Put conversations and their pictures into ArrayRecord files, after looking at every one of them.

    Training reads the file itself as well (--conversations FILE). The data set holds the pictures, so that it can be
    moved as a whole, and a damaged record is found now and not while training.
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """LLaVA's or ShareGPT's .json, or .jsonl of conversations or messages."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Where data sets are kept."""
    name: str | None = None
    """Of the data set; that of the file by default."""
    image_folder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the paths of images start; the file's own folder by default."""

    def run(self, console: Console, arguments: Sequence[str]) -> None:
        told: list[str] = []
        with waiting(console, "reading ..."):
            made = build_conversations(
                self.output, self.name or self.file.stem, self.file, self.image_folder, told.append
            )
        for line in told:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(f"train on it with: --conversations {made}", markup=False, highlight=False, soft_wrap=True)
