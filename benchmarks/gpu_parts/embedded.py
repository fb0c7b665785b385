"""The embedded model end to end: `jaxspec bench`'s numbers for every drafter, and whether answers are identical, in
float32 (products in float32, then as the device has them by default) and in bfloat16."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from benchmarks.gpu_parts.part import Part
from jaxspec import demo, load_drafter, load_target
from jaxspec.benchmark.run import BASELINE, SpeedBenchmark, example_prompts
from jaxspec.targets.target import Target

SPEED = ("vispec", "eagle2", "eaglevlm", "massv", "medusa", "specvlm", "lookup")
FIELDS = ("temperature", "decode_tokens_per_second", "speedup", "efficiency", "mean_acceptance_length", "identical")


class Bar:
    def advance(self, steps: int = 1) -> None:
        pass


@contextlib.contextmanager
def silent(name: str, total: int) -> Iterator[Bar]:
    """Progress that nobody looks at."""
    del name, total
    yield Bar()


def measure(part: Part) -> None:
    dearest = 0.0 if part.tiny else 15.0
    for dtype, precision, drafters in (
        ("float32", "highest", SPEED[:1]),
        ("bfloat16", None, SPEED[:1]),
        ("float32", None, SPEED[:1]),
        ("bfloat16", None, SPEED[1:]),
        ("float32", "highest", SPEED[1:]),
    )[: 1 if part.tiny else None]:
        jax.config.update("jax_default_matmul_precision", precision)
        target = load_target(demo.target_path(), dtype=dtype)
        for name in drafters:
            before = part.passed
            told = f"{name}, {dtype}, {precision or 'default'} precision"
            part.trying(told, dearest, partial(bench, part, target, name, dtype, precision))
            dearest = max(dearest, part.passed - before)


def bench(part: Part, target: Target, name: str, dtype: str, precision: str | None) -> None:
    drafter = load_drafter("lookup" if name == "lookup" else demo.drafter_path(name), target)
    benchmark = SpeedBenchmark(
        target=target,
        drafters={name: (drafter, drafter.tree)},
        examples=example_prompts(1 if part.tiny else 6, 0),
        temperatures=(0.0,) if part.tiny else (0.0, 1.0),
        runs=1 if part.tiny else 2,
        max_new_tokens=16 if part.tiny else 160,
        max_length=None,
        seed=0,
        noise_off=False,
    )
    for entry in benchmark.run(silent):
        if entry["arm"] == BASELINE and name != SPEED[0]:
            continue  # told once for each dtype
        rows: dict[str, Any] = {field: entry[field] for field in FIELDS}
        part.add(
            "embedded",
            dtype=dtype,
            precision=precision or "default",
            arm=entry["arm"],
            **rows,
            answers=len(entry["prompts"]),
            time_to_first_token_ms=1e3 * entry["time_to_first_token"],
            compilations=entry["compilations"],
            differences=entry["differences"],
        )
