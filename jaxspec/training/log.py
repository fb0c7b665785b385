"""What a run tells: a progress bar, lines on the console, `log.jsonl`, and where asked TensorBoard and wandb.

Lines have a split: "train" every `log_every` steps, "validation" at every evaluation, "acceptance" at every measurement
(by temperature), "data" where conversations were cut or records left out, and once "run": the operations of a step and
the machine.
"""

import json
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxspec.devices import peaks_of
from jaxspec.metrics import Acceptance
from jaxspec.training.acceptance import figures
from jaxspec.training.recipe import Recipe, recorded, write_text


class Log:
    """A context, from step `start` on. `alone` where no other run shares the console: others get no progress bar, and
    their lines begin with their name. Lines are written within `writing()`. Raises ValueError where TensorBoard or
    wandb is asked for but not installed."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        recipe: Recipe,
        start: int,
        alone: bool = True,
        writing: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.folder, self.console, self.recipe, self.start, self.writing = folder, console, recipe, start, writing
        self.label = "" if alone else f"{recipe.name}  "
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self.bar = Progress(
            *columns, TextColumn("{task.fields[rate]}"), console=console, disable=not (alone and console.is_terminal)
        )
        self.flops: float | None = None
        self.peak: float | None = None
        self.since_step: int | None = None
        self.tokens = 0

    def __enter__(self) -> "Log":
        self.tensorboard = self.open_tensorboard() if self.recipe.tensorboard else None
        self.wandb = self.open_wandb() if self.recipe.wandb else None
        path = self.folder / "log.jsonl"
        with self.writing():
            if path.exists():
                write_text(path, "".join(f"{line}\n" for line in path.read_text().splitlines() if self.stands(line)))
            self.file = path.open("ab", buffering=0)
        self.bar.start()
        self.row = self.bar.add_task(self.recipe.name, total=self.recipe.steps, completed=self.start, rate="")
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

    def stands(self, line: str) -> bool:
        """Whether a line is whole, and not of a step that a stopped run took and that is now taken again."""
        try:
            return json.loads(line)["step"] <= self.start
        except ValueError:
            return False

    def open_tensorboard(self) -> Any:
        """Events that a stopped run wrote of steps that are now run again are void."""
        writer = optional("tensorboardX", "tensorboard").SummaryWriter
        return writer(logdir=str(self.folder / "tensorboard"), purge_step=self.start + 1 if self.start else None)

    def open_wandb(self) -> Any:
        """A resumed run goes on under the id it began with."""
        wandb, path = optional("wandb", "wandb"), self.folder / "wandb_id"
        if not path.exists():
            write_text(path, secrets.token_hex(8))
        return wandb.init(
            project=self.recipe.wandb,
            name=self.recipe.name,
            id=path.read_text(),
            resume="allow",
            dir=str(self.folder),
            config=recorded(self.recipe),
        )

    def machine(self, flops: float, devices: set[jax.Device]) -> None:
        """What one step computes, and on what."""
        device = next(iter(devices))
        self.flops, peaks = flops, peaks_of(device)
        self.peak = peaks.flops * len(devices) if peaks else None
        text = f"{flops / 1e9:.4g} GFLOP a step on {len(devices)} x {device.device_kind}"
        self.write("run", self.start, {"model_flops_per_step": flops, "devices": len(devices)}, text)

    def step(self, step: int, metrics: dict, tokens: int) -> None:
        """Metrics (still on the device) of step number `step` (1-based), which read `tokens` tokens."""
        if self.since_step is None:  # the first step's time is that of compiling
            self.restart(step)
        else:
            self.tokens += tokens
        if step % self.recipe.log_every and step != self.recipe.steps:
            return
        values = {name: float(value) for name, value in metrics.items()}
        text, speed = shown(values), self.speed(step)
        rate = f"{1 / speed['seconds_per_step']:.2f} step/s" if speed else ""
        if "model_flop_utilisation" in speed:
            rate += f", {speed['model_flop_utilisation']:.0%} of peak"
        self.bar.update(self.row, completed=step, rate=rate)
        self.write("train", step, values | speed, f"{text}  {rate}")
        self.restart(step)

    def speed(self, step: int) -> dict[str, float]:
        """Since the last `restart`; nothing where no step was timed."""
        if self.since_step is None or step == self.since_step:
            return {}
        seconds = (time.perf_counter() - self.since) / (step - self.since_step)
        values = {"seconds_per_step": seconds}
        if self.tokens:
            values["tokens_per_second"] = self.tokens / (step - self.since_step) / seconds
        if self.flops and self.peak:
            values["model_flop_utilisation"] = self.flops / (seconds * self.peak)
        return values

    def restart(self, step: int) -> None:
        """Time from here on, after `step` steps: what lay between is not training."""
        self.since, self.since_step, self.tokens = time.perf_counter(), step, 0

    def data(self, step: int, shortfall: dict[str, int]) -> None:
        """What this process could not use of its data so far, if anything."""
        if any(shortfall.values()):
            told = ", ".join(f"{count} {what}" for what, count in shortfall.items())
            self.write("data", step, shortfall, f"conversations and records so far: {told}")

    def validation(self, step: int, values: dict[str, float]) -> None:
        self.write("validation", step, values, shown(values))

    def acceptance(self, step: int, accepted: dict[float, Acceptance]) -> None:
        for temperature, each in accepted.items():
            values = figures(each)
            positions = " ".join(f"{share:.2f}" for share in each.acceptance_at_position)
            text = (
                f"temperature {temperature:g}: mean acceptance length {each.mean_acceptance_length:.2f} (with bonus), "
                f"accepted draft tokens {each.mean_accepted_draft_tokens:.2f}; at each position {positions}"
            )
            self.write("acceptance", step, {"temperature": temperature, **values}, text)

    def write(self, split: str, step: int, values: dict[str, Any], text: str) -> None:
        line = json.dumps({"split": split, "step": step, "time": time.time(), **values}) + "\n"
        with self.writing():
            self.file.write(line.encode())
        self.console.print(f"{split:>10} {step:6d}  {self.label}{text}", highlight=False, soft_wrap=True)
        scalars = flat(split, values)
        if self.tensorboard:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(scalars, step=step)


def shown(values: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


def flat(split: str, values: dict[str, Any]) -> dict[str, float]:
    """One number to a name: "train/loss", "acceptance/temperature_0/conditional_acceptance_1" (positions from 1)."""
    values = dict(values)
    prefix = f"{split}/"
    if "temperature" in values:
        prefix += f"temperature_{values.pop('temperature'):g}/"
    scalars = {}
    for name, value in values.items():
        if isinstance(value, list):
            scalars |= {f"{prefix}{name}_{position}": each for position, each in enumerate(value, 1)}
        else:
            scalars[prefix + name] = value
    return {name: value for name, value in scalars.items() if value is not None}


def optional(module: str, field: str) -> ModuleType:
    """A library of the extra `logging`, imported only for recipes that ask for it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{field} needs {module}, which is not installed: pip install 'jaxspec-vlm[logging]'"
        ) from error
