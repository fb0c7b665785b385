"""Compiles the programs of published models for TPUs, without a TPU, and says what they take: compile-only numbers.

    pip install libtpu    # Python 3.12, jax 0.12; no TPU is looked for
    python -m benchmarks.aot_tpu --output docs/results/aot_tpu.json            # everything: hours of two cores
    python -m benchmarks.aot_tpu --arms llava-1.5-7b/vispec --layers 4 --output runs/aot.json      # a first look

Each arm is a target with a drafter and a tree, or autoregressive decoding; its programs are those of
`jaxspec.programs.Programs`: one round and one chunk of a prompt. A row says GiB a chip against what the compiler has to
give, the bytes that a round moves in main memory (benchmarks/hlo.py) and its FLOPs, the collectives of a round, copies
of weights or cache in the loop and before it, and compile seconds. `ceiling` is bytes of the autoregressive step over
bytes of the round on the same chips: what efficiency can reach where bytes are all that counts. Nothing here ran.
"""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

from benchmarks import hlo
from benchmarks.aot_programs import Arm, Decoding, training_step
from benchmarks.gpu_parts.part import write_json
from benchmarks.published import TARGETS, massv_config, vispec_config
from benchmarks.tpu import chips_of
from jaxspec.speculation.tree import TreeConfig

LIMITS = {"v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
"""GiB a chip that the compiler has to give: what it says where a program asks for more."""
LEAST = 2**20
"""Bytes from which a copy is told."""
GIB = 2**30


VISPEC = TreeConfig(3, 8, 30)
EIGHTH = partial(vispec_config, share=8)
OWN_HEAD = partial(vispec_config, own_head=True)
ARMS = {
    "llava-1.5-7b/autoregressive": Arm("llava-1.5-7b"),
    "llava-1.5-7b/vispec": Arm("llava-1.5-7b", "vispec", vispec_config, VISPEC),
    "llava-1.5-7b/vispec-eighth": Arm("llava-1.5-7b", "vispec", EIGHTH, VISPEC),
    "llava-1.5-7b/vispec-int8": Arm("llava-1.5-7b", "vispec", OWN_HEAD, VISPEC, quantize=True),
    "llava-1.5-7b/vispec-eighth-int8": Arm("llava-1.5-7b", "vispec", EIGHTH, VISPEC, quantize=True),
    "llava-1.5-7b-int8/autoregressive": Arm("llava-1.5-7b", quantize_target=True),
    "llava-1.5-7b-int8/vispec-int8": Arm(
        "llava-1.5-7b", "vispec", OWN_HEAD, VISPEC, quantize=True, quantize_target=True
    ),
    "qwen2.5-vl-7b/autoregressive": Arm("qwen2.5-vl-7b"),
    "qwen2.5-vl-7b/vispec": Arm("qwen2.5-vl-7b", "vispec", vispec_config, VISPEC),
    "qwen2.5-vl-7b/vispec-eighth": Arm("qwen2.5-vl-7b", "vispec", EIGHTH, VISPEC),
    "qwen2.5-vl-7b/vispec-int8": Arm("qwen2.5-vl-7b", "vispec", OWN_HEAD, VISPEC, quantize=True),
    "qwen2.5-vl-7b/vispec-eighth-int8": Arm("qwen2.5-vl-7b", "vispec", EIGHTH, VISPEC, quantize=True),
    "gemma3-12b/autoregressive": Arm("gemma3-12b"),
    "gemma3-12b/massv": Arm("gemma3-12b", "massv", massv_config, TreeConfig.chain(5)),
    "llava-1.5-7b/training": Arm("llava-1.5-7b", "vispec", vispec_config, VISPEC),
}
"""The arms with an eighth of the vocabulary have the target's most frequent tokens in mind (drafters/vocabulary.py);
those in int8 have an int8 head and an int8 LM head of their own, of all tokens where no eighth is said."""


@dataclasses.dataclass(frozen=True)
class Compile:
    """What to compile."""

    output: Path = Path("runs/aot_tpu.json")
    arms: tuple[str, ...] = tuple(ARMS)
    kinds: tuple[Literal["v5e", "v5p", "v6e"], ...] = ("v5e", "v5p", "v6e")
    chips: tuple[Literal[1, 4, 8], ...] = (1, 4, 8)
    """All of one group along `tensor` where that divides the heads, else in groups along `data`; in training along
    `fsdp`."""
    programs: tuple[Literal["decode", "prefill"], ...] = ("decode", "prefill")
    batch: int = 1
    capacity: int = 2048
    """Positions of the caches."""
    rows: int = 2
    """Of a training batch, on each chip."""
    length: int = 2048
    """Tokens of a training row."""
    filled: int = 704
    """Positions of the caches that hold something, of which attention's kernel reads no others: by default those of a
    prompt with a picture of 576 tokens and a few tokens of answer."""
    layers: int | None = None
    """The first so many layers of the target's text model, to look at a program quickly; default all."""
    hlo: Path | None = None
    """A folder for the compiled programs' text."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.arms) - set(ARMS)):
            raise ValueError(f"arms {', '.join(unknown)} are not known; known are {', '.join(ARMS)}")

    def write(self) -> None:
        """Compile, print and keep row after row: what is done when time runs out is in the file. Rows of other programs
        that are in it stay, so that several commands fill one table."""
        rows = json.loads(self.output.read_text())["rows"] if self.output.exists() else []
        for kind in self.kinds:
            for chips in self.chips:
                devices = chips_of(kind, chips)
                for row in self.compiled(kind, devices):
                    rows = merged(rows, row)
                    print(sentence(next(each for each in rows if key_of(each) == key_of(row))), flush=True)
                    self.output.parent.mkdir(parents=True, exist_ok=True)
                    write_json(self.output, {"compile_only": True, "rows": rows})

    def compiled(self, kind: str, devices: list[Any]) -> Iterator[dict[str, Any]]:
        """A row for every program of every arm."""
        versions = {"jax": jax.__version__, "libtpu": version("libtpu")}
        for name in self.arms:
            arm, target = ARMS[name], TARGETS[ARMS[name].target].with_layers(self.layers)
            about = {"arm": name, "kind": kind, "chips": len(devices), "layers": self.layers} | versions
            if name.endswith("training"):
                about |= {"program": "step", "batch": self.rows * len(devices), "positions": self.length}
                yield about | self.told(about, partial(training_step, target, arm, devices, self.rows, self.length))
                continue
            decoding = Decoding(target, arm, devices, self.batch, self.capacity)
            about |= {"batch": decoding.batch, "positions": self.capacity}
            for program in self.programs:
                told = about | {"program": program}
                filled = min(1.0, self.filled / self.capacity)
                yield told | self.told(told, getattr(decoding, program), decoding.resident(program), filled)

    def told(
        self, about: dict[str, Any], lower: Callable[[], Any], resident: float = 0.0, filled: float = 1.0
    ) -> dict[str, Any]:
        """What the compiler makes of one program, or why it makes nothing; `resident` bytes of a chip are taken by what
        is loaded, whether the program reads it or not; of caches the part `filled` holds something."""
        lowered, started = lower(), time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            asked = refusal(str(error))
            if asked is None:
                raise
            return {"fits": False, "gib": asked[0], "limit_gib": asked[1]}
        seconds, text = time.perf_counter() - started, compiled.as_text()
        if self.hlo is not None:
            name = "_".join(str(about[key]) for key in ("arm", "program", "kind", "chips")).replace("/", "_")
            self.hlo.mkdir(parents=True, exist_ok=True)
            (self.hlo / f"{name}.txt").write_text(text)
        memory, limit = compiled.memory_analysis(), LIMITS[about["kind"]]
        arguments = max(memory.argument_size_in_bytes, resident)
        outputs = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
        gib = (arguments + outputs + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes) / GIB
        return {
            "fits": gib <= limit, "gib": round(gib, 2), "limit_gib": limit,
            "temporary_gib": round(memory.temp_size_in_bytes / GIB, 2),
            "compile_seconds": round(seconds, 1), **read_program(text, about["program"], self.capacity, filled),
            "flops": flops(compiled),
        }  # fmt: skip


def refusal(error: str) -> tuple[float, float] | None:
    """(GiB asked for, GiB there are) of a compiler's error; None for an error about something else."""
    said = (r"Used ([\d.]+)G of ([\d.]+)G hbm", r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)")
    found = next(filter(None, (re.search(pattern, error) for pattern in said)), None)
    return None if found is None else (float(found.group(1)), float(found.group(2)))


def read_program(text: str, program: str, capacity: int, filled: float) -> dict[str, Any]:
    """What its text tells: of the loop of a decoding program, of all of another one. Attention's kernel reads caches of
    `capacity` positions as far as they are filled: `bytes` is with all of them, `bytes_filled` with that part."""
    parsed = hlo.parse(text)
    body = parsed.loop() if program == "decode" else parsed.entry
    loop = [each for each in parsed.copies(body, LEAST)] if program == "decode" else []
    entry = parsed.copies(parsed.entry, LEAST)

    def listed(copies: list[hlo.Moved], computation: str) -> dict[str, Any]:
        named: dict[str, float] = {}
        for each in copies:
            source = parsed.origin(computation, each.instruction)
            origin = re.sub(r"\d+", "*", source.label or source.name)
            named[origin] = named.get(origin, 0) + each.bytes
        largest = sorted(named.items(), key=lambda item: -item[1])[:6]
        held = [each.bytes for each in copies if parsed.is_held(computation, each.instruction)]
        return {
            **{"count": len(copies), "bytes": sum(each.bytes for each in copies), "of": dict(largest)},
            **{"held_count": len(held), "held_bytes": sum(held)},  # of weights and caches
        }

    moved, caches = parsed.moved_by(body), parsed.read_by_kernels(body, capacity)
    return {
        "bytes": moved,
        "bytes_filled": moved - (1 - filled) * caches,
        "kernels": parsed.kernels(body),
        "collectives": {
            kind: {"count": count, "bytes": size} for kind, (count, size) in parsed.collectives(body).items()
        },
        "copies_in_loop": listed(loop, body),
        "copies_at_entry": listed(entry, parsed.entry),
        "instructions": len(parsed.computations[body]),
    }


def flops(compiled: Any) -> float | None:
    """As XLA counts them, of one chip, a loop's body once."""
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list | tuple) else costs
    return costs.get("flops")


def key_of(row: dict[str, Any]) -> tuple:
    """What a row is about: of two with the same key the later one counts."""
    return tuple(row.get(name) for name in ("arm", "program", "kind", "chips", "batch", "positions", "layers"))


def merged(rows: Sequence[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with another one, in the place of that with its key if there is one, and with ceilings."""
    places = {key_of(each): each for each in rows} | {key_of(row): row}
    return [with_ceiling(each, list(places.values())) for each in places.values()]


def with_ceiling(row: dict[str, Any], others: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """With `ceiling` and `ceiling_filled` where the autoregressive step of the same target, of as many layers, on the
    same chips is among the others."""
    if row["program"] != "decode" or "bytes" not in row:
        return row
    wanted = key_of(row | {"arm": row["arm"].split("/")[0] + "/autoregressive"})
    steps = [each for each in [*others, row] if key_of(each) == wanted and "bytes" in each]
    if not steps:
        return row
    names = {"ceiling": "bytes", "ceiling_filled": "bytes_filled"}
    return row | {name: round(steps[0][own] / row[own], 4) for name, own in names.items()}


def sentence(row: dict[str, Any]) -> str:
    """A row for a reader."""
    name = f"{row['arm']} {row['program']}, {row['chips']} x {row['kind']}, batch {row['batch']}"
    if row.get("layers") is not None:
        name += f", {row['layers']} layers"
    if "bytes" not in row:
        return f"{name}: does not fit, {row['gib']} of {row['limit_gib']} GiB (compile-only)"
    loop, entry = row["copies_in_loop"], row["copies_at_entry"]
    found = ", ".join(
        f"{each['count']} {kind} {each['bytes'] / 1e6:.1f} MB" for kind, each in row["collectives"].items()
    )
    takes = f"{row['gib']} of {row['limit_gib']} GiB{'' if row['fits'] else ' (does not fit)'}"
    moves = f"{row['bytes'] / 1e9:.2f} GB ({row['bytes_filled'] / 1e9:.2f} as filled)"
    ceiling = f", ceiling {row['ceiling']:.3f} ({row['ceiling_filled']:.3f})" if "ceiling" in row else ""
    kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items()) or "no kernels"
    copies = ", ".join(
        f"{where} {each['held_count']} ({each['held_bytes'] / 1e6:.0f} MB)"
        for where, each in (("in the loop", loop), ("at entry", entry))
    )
    return (
        f"{name}: {takes}, {moves}, {(row['flops'] or 0) / 1e12:.2f} TFLOP{ceiling}; {kernels}; copies of weights and "
        f"caches {copies}; {found or 'no collectives'}; {row['compile_seconds']} s (compile-only)"
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing runs; without a TPU that is looked for
    tyro.cli(Compile, description=__doc__).write()
