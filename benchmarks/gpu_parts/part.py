"""What a part of the GPU benchmark is told and tells: its time, and rows that are on disk as soon as they are known."""

import dataclasses
import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

BEFORE, BEHIND = 32, 16
"""Tokens of a prompt before its image and behind."""
COMPILING_THREADS = min(6, os.cpu_count() or 1)
"""XLA compiles a program on a core or two, so several are compiled at once."""


@dataclasses.dataclass
class Part:
    """One part while it runs."""

    name: str
    file: Path
    seconds: float
    """That it has, from when it was made."""
    tiny: bool = False
    profile: bool = False
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    """Texts of several lines, by name."""
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def passed(self) -> float:
        return time.perf_counter() - self.started

    def has(self, seconds: float, name: str) -> bool:
        """Whether there is time for what takes so long; `name` is noted as left out where there is not."""
        if self.passed + seconds <= self.seconds:
            return True
        self.left_out.append(name)
        self.save()
        return False

    def add(self, measure: str, **row: Any) -> None:
        """A row of results, on disk when this returns."""
        self.rows.append({"measure": measure, **row})
        self.save()
        told = ", ".join(f"{key} {shown(value)}" for key, value in row.items() if not isinstance(value, list | dict))
        print(f"[{self.passed:5.0f} s] {self.name}: {measure}: {told}", flush=True)

    def trying(self, name: str, seconds: float, measure: Callable[[], Any]) -> bool:
        """Runs `measure` if there is time for it; an error is noted, and nothing else is lost. Whether it went well."""
        if not self.has(seconds, name):
            return False
        try:
            measure()
        except Exception as error:
            self.failed(name, error)
            return False
        return True

    def failed(self, name: str, error: Exception) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        self.errors.append(f"{name}: {type(error).__name__} at {where}: {str(error)[:2000]}")
        print(f"[{self.passed:5.0f} s] {self.name}: {self.errors[-1][:500]}", flush=True)
        self.save()

    def save(self, ended: bool = False) -> None:
        status = "running"
        if ended:
            status = "failed" if self.errors and not self.rows else "complete"
            status = "partial" if status == "complete" and (self.errors or self.left_out) else status
        write_json(
            self.file,
            {
                "part": self.name,
                "status": status,
                "tiny": self.tiny,
                **self.about,
                "seconds": self.passed,
                "errors": self.errors,
                "left_out": self.left_out,
                "notes": self.notes,
                "rows": self.rows,
            },
        )


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_json(path: Path, value: Any) -> None:
    """Under a temporary name, then renamed: whoever reads it finds a whole one. JSON has no nan: null."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(strict(value), indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def side_by_side(function: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """`function` of every item, several at a time: for what mostly compiles."""
    with ThreadPoolExecutor(COMPILING_THREADS) as pool:
        return list(pool.map(function, items))


def timed(run: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of every run; `run` must wait for what it computes."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return seconds


def taking_turns(arms: Sequence[Callable[[], Made]], runs: int) -> list[list[Made]]:
    """What each arm makes in every run, in the order A B C A B C ..: a card that slows down slows all alike."""
    made = [[arm() for arm in arms] for _ in range(runs)]
    return [list(of_arm) for of_arm in zip(*made, strict=True)]
