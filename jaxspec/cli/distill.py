"""`python -m jaxspec distill`: the target answers prompts itself; the answers are what its drafters are trained on."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import jaxspec
from jaxspec.cli.options import ModelOptions, TreeOptions, load_named_drafter
from jaxspec.cli.output import ProgressLines, show_applied, show_warning, waiting
from jaxspec.colours import visible
from jaxspec.data.answers import AnswerParts
from jaxspec.data.prompts import open_prompts
from jaxspec.distillation import Distiller, DistillSettings, engine_settings, finish_output, open_output
from jaxspec.serving.engine import Engine
from jaxspec.stopping import CatchSignals, Stopped

SHOWN = 20
"""Refused records that are named on the screen; distill.json names them all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill:
    """Let the target answer prompts itself: the set that its drafters are trained on.

    Temperature and filters are those given here; penalties are those of the target's generation_config.json.

    Writes a tensorflow-datasets folder of ArrayRecord files with token ids and references to the images, and
    distill.json. A run that was stopped goes on with the same command. Records that cannot be answered are skipped and
    named.
    """

    data: Annotated[str, tyro.conf.arg(metavar="FILE|NAME|scenes")]
    """Prompts: LLaVA's .json; .jsonl with prompt, messages or conversations, and image or images; the folder or name of
    a prepared tensorflow-datasets set; or scenes, the demo's own."""
    output: Path
    """Folder for the set."""
    split: str = "train"
    """Of scenes and tensorflow-datasets; a file has none."""
    image_folder: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """What the image paths of a file are relative to; the file's own folder by default."""
    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions()
    drafter: Annotated[str | None, tyro.conf.arg(metavar="PATH|REPO|METHOD")] = None
    """A drafter that the target has already: the same answers (but for ties in rounding), sooner."""
    tree: Annotated[TreeOptions, tyro.conf.arg(name="")] = TreeOptions()
    settings: Annotated[DistillSettings, tyro.conf.arg(name="")] = DistillSettings()
    batch_size: int = 32
    """Prompts that are answered at once, at most: where one ends, the next begins. Each takes the memory of max-length
    tokens."""
    process_index: int = 0
    """This process answers every process-count'th part; all write to the same folder, the last one makes the set."""
    process_count: int = 1

    def run(self, console: Console, arguments: list[str]) -> None:
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index must lie in 0..{self.process_count - 1}, got {self.process_index}")
        if self.drafter is None and self.tree.given:
            raise ValueError("a tree needs a drafter: give --drafter")
        if self.drafter is None and self.model.quantize_drafter:
            raise ValueError("quantize-drafter needs a drafter: give --drafter")
        source = open_prompts(self.data, self.split, self.image_folder)
        with waiting(console, "loading ..."):
            target = self.model.load()
            drafter = None
            if self.drafter is not None:
                drafter = load_named_drafter(self.drafter, target, self.model.quantize_drafter)
            tree = None if drafter is None else self.tree.applied(drafter.tree)
            model = {"max_length": self.model.max_length, "generation_config": self.model.generation_config}
            options = engine_settings(self.settings, len(source), self.batch_size, **model)
            engine = Engine(target, drafter, tree, options)
            distiller = Distiller(engine, source, self.settings)
            image_folder = None if source.image_folder is None else str(source.image_folder)
            about = {
                "command": shlex.join(["python", "-m", "jaxspec", *arguments]),
                "jaxspec": jaxspec.__version__,
                "target": self.model.target,
                "target_fingerprint": target.fingerprint(),
                "image_folder": image_folder,
            }
            settings = {
                "data": source.identity,
                "image_folder": image_folder,
                **dataclasses.asdict(self.settings),
                "count": len(distiller.records),
                "target_fingerprint": about["target_fingerprint"],
                "dtype": self.model.dtype,
                "quantize": self.model.quantize,
                "max_length": engine.max_length,
                "generation_config": distiller.from_folder or None,
            }
            open_output(self.output, settings, about)
        show_applied(engine.generation_defaults, distiller.from_folder)
        parts = AnswerParts(self.output, distiller.records, self.settings.shard_size)
        with engine:
            self.answer(console, distiller, parts)
        show_warning(console, engine.acceptance_warning)
        missing = [part for part in range(len(parts)) if not parts.finished(part)]
        if missing:
            console.print(
                f"process {self.process_index} of {self.process_count} has finished its parts; {len(missing)} of "
                f"{len(parts)} are still missing. Whichever process finishes last makes the set; the same command "
                "makes it, too, once all parts are there."
            )
        else:
            self.show(console, finish_output(self.output, parts))

    def answer(self, console: Console, distiller: Distiller, parts: AnswerParts) -> None:
        """This process's parts, without those that are there already."""
        own = range(self.process_index, len(parts), self.process_count)
        total = sum(len(parts.ranges[part]) for part in own)
        todo = [part for part in own if not parts.finished(part)]
        done = total - sum(len(parts.ranges[part]) for part in todo)
        with CatchSignals() as signals, ProgressLines(console, "distill", total, done) as progress:
            if done:
                console.print(f"going on after {done} of {total} records", markup=False)
            for part in todo:
                try:
                    made = distiller.part(parts.ranges[part], progress.advance, lambda: signals.received)
                except Stopped:
                    raise Stopped(
                        f"stopped with {done} of {total} records in {self.output}; run the same command to go on"
                    ) from None
                parts.write(part, made)
                done += len(parts.ranges[part])

    def show(self, console: Console, about: dict) -> None:
        refused = about["refused"]
        console.print(
            f"{about['settings']['count']} records, {len(refused)} refused: {about['answers']} answers of "
            f"{about['answer_tokens'] / about['answers']:.1f} tokens on average, {about['cut']} cut at their limit",
            soft_wrap=True,
        )
        for each in refused[:SHOWN]:
            line = f"refused: {each['id']} (record {each['record']}): {' '.join(each['reason'].split())}"
            console.print(shown(console, line), markup=False, soft_wrap=True)
        if len(refused) > SHOWN:
            console.print(f"refused: {len(refused) - SHOWN} more, all named in distill.json")
        console.print(shown(console, f"wrote the set to {self.output}"), markup=False, soft_wrap=True)


def shown(console: Console, text: str) -> str:
    """The text with what the console cannot print escaped."""
    return visible(text).encode(console.encoding, "backslashreplace").decode(console.encoding)
