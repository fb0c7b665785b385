"""Where the time of a compiled program goes, as text: what `jax.profiler` has recorded, added up by part of the model
and by operation. No viewer is needed."""

import collections
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

TOP = 25
NO_SCOPE = (
    "jit(",
    "while",
    "body",
    "cond",
    "closed_call",
    "eval_jaxpr",
    "branch_",
    "pjit",
    "transpose",
    "jvp(",
    "vmap(",
    "checkpoint",
)


class Event(NamedTuple):
    """One operation that ran."""

    operation: str
    scope: str
    microseconds: float


def summary_of(run: Callable[[], Any], rounds: int, compiled: str = "") -> str:
    """A text about `run()`, which must wait for the device and consists of so many rounds. `compiled` is the program as
    XLA writes it, which tells to which part of the model an operation belongs where the profiler does not. Raises
    RuntimeError where the profiler has seen no operation."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            started = time.perf_counter()
            run()
            seconds = time.perf_counter() - started
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            raise RuntimeError("the profiler has written no trace")
        events = list(events_of(files[-1], paths_of(compiled)))
    if not events:
        raise RuntimeError("the profiler has seen no operation of a device")
    return summary(events, rounds, seconds)


def summary(events: list[Event], rounds: int, seconds: float) -> str:
    """Microseconds a round, by scope and by operation, the longest first; `seconds` are those of all rounds."""
    total = sum(event.microseconds for event in events)
    lines = [
        f"{1e6 * seconds / rounds:.0f} us a round while it was recorded; {total / rounds:.0f} us in "
        f"{len(events) / rounds:.0f} operations",
        "",
        "by part:",
    ]
    for scope, (spent, count) in added(events, lambda event: event.scope):
        lines.append(line(spent, total, count, rounds, scope))
    lines += ["", "by operation:"]
    for name, (spent, count) in added(events, lambda event: f"{plain(event.operation)}  {event.scope}")[:TOP]:
        lines.append(line(spent, total, count, rounds, name))
    return "\n".join(lines)


def added(events: list[Event], key: Callable[[Event], str]) -> list[tuple[str, tuple[float, int]]]:
    times, counts = collections.Counter(), collections.Counter()
    for event in events:
        times[key(event)] += event.microseconds
        counts[key(event)] += 1
    return [(name, (time, counts[name])) for name, time in times.most_common()]


def line(spent: float, total: float, count: int, rounds: int, name: str) -> str:
    return f"{spent / rounds:10.1f} us {100 * spent / total:5.1f} % x{count / rounds:<7.1f} {name}"


def plain(operation: str) -> str:
    """Without the number that tells it from its like."""
    return re.sub(r"([._]\d+)+$", "", operation)


def paths_of(compiled: str) -> dict[str, str]:
    """Where each operation of a program comes from, by its name in a spelling that kernels share."""
    named = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*op_name="([^"]*)"', compiled, re.MULTILINE)
    return {spelled(name): path for name, path in named}


def spelled(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def events_of(file: Path, paths: Mapping[str, str]) -> Iterator[Event]:
    """What ran on a device; on a CPU what XLA's threads did. An operation that contains others (a loop) is left out."""
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    for plane in devices or planes:
        for each in plane.lines:
            if devices and not is_stream(each.name):
                continue
            for event in each.events:
                stats = {name: str(value) for name, value in event.stats if name is not None}
                names = [name for name in (stats.get("hlo_op"), event.name if devices else None) if name]
                if not names or re.match(r"(while|conditional|call)\b", names[0]):
                    continue
                known = [name for name in names if spelled(name) in paths]
                path = stats.get("tf_op") or stats.get("name") or (paths[spelled(known[0])] if known else "")
                yield Event((known or names[::-1])[0], scope_of(path), event.duration_ns / 1e3)


def is_stream(line: str) -> bool:
    """Whether a line of a device holds operations that ran; others repeat them under the names of what they are of."""
    return line.startswith("Stream") or line == "XLA Ops"


def scope_of(path: str) -> str:
    """The named scopes of an operation's path, layers by no number."""
    parts = [part for part in path.split("/")[:-1] if part and not part.startswith(NO_SCOPE)]
    return "/".join("layer" if re.fullmatch(r"layer_\d+", part) else part for part in parts) or "-"
