"""`python -m jaxspec bench`: how much faster, how often accepted, how identical, and how right."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jaxspec.benchmark.plot import write_plot
from jaxspec.benchmark.quality import score_answers
from jaxspec.benchmark.report import (
    QUALITY_COLUMNS,
    SPEED_COLUMNS,
    TEMPLATED,
    THROUGHPUT_COLUMNS,
    environment,
    quality_rows,
    speed_rows,
    throughput_legend,
    throughput_rows,
    write_report,
)
from jaxspec.benchmark.run import SpeedBenchmark, example_prompts, settings_of
from jaxspec.benchmark.throughput import ThroughputBenchmark
from jaxspec.cli.options import ModelOptions, PenaltyOptions, TreeOptions, load_named_drafter
from jaxspec.cli.output import ProgressLines, show_applied, show_warning, table, waiting
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.generation import GenerationDefaults

SHOWN = {
    "arm": "",
    "temperature": "temp.",
    "decode tokens/s": "decode tokens/s",
    "speed-up": "speed-up",
    "efficiency": "efficiency",
    "mean_acceptance_length (with bonus)": "mean acceptance length (with bonus)",
    "mean_accepted_draft_tokens (without)": "mean accepted draft tokens (without)",
    "identical": "identical tokens",
}
"""Columns of the report that fit a terminal, and what they are called there."""


def name_of(given: str) -> str:
    """What tables call a drafter: the end of its path, or its run where training exported it."""
    path = Path(given.removeprefix("demo:"))
    return path.parent.name if path.name == "export" and path.parent.name else path.name


@dataclasses.dataclass(frozen=True)
class Bench:
    """Measure drafters against autoregressive decoding on held-out scenes.

    What the target's generation_config.json asks for beside a temperature (filters, penalties) applies in every arm, so
    that what is measured is what is served.

    Writes results.json, results.md and (with matplotlib) results.png.
    """

    model: Annotated[ModelOptions, tyro.conf.arg(name="")] = ModelOptions()
    tree: Annotated[TreeOptions, tyro.conf.arg(name="")] = TreeOptions()
    penalties: Annotated[PenaltyOptions, tyro.conf.arg(name="")] = PenaltyOptions()
    drafters: tuple[str, ...] = ("eagle2", "vispec")
    """Methods of the embedded model, lookup, folders or repo ids."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    num_prompts: int = 20
    """Questions about test scenes."""
    max_new_tokens: int = 160
    runs: int = 3
    """Timed runs of every arm on every question, interleaved; the median counts."""
    patience: int = 10
    """On a virtual machine: so many tries per run to find one in which the host took less than 1 % of the CPU away."""
    seed: int = 0
    """Of scenes and sampling."""
    noise_off: bool = True
    """At temperatures above 0, also draft without the target's noise."""
    transformers: bool = False
    """Also compare autoregressive decoding with transformers' greedy generate (needs torch)."""
    concurrency: int = 0
    """Also answer all questions at once, in so many slots; 0 is off."""
    score_prompts: int = 100
    """Scenes whose greedy descriptions are scored object by object; 0 is off."""
    output: Path = Path("runs/bench")
    """Folder for the results."""

    def run(self, console: Console, arguments: list[str]) -> None:
        for field, least in (("num_prompts", 1), ("score_prompts", 0), ("concurrency", 0)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be at least {least}, got {getattr(self, field)}")
        with waiting(console, "loading ..."):
            target = self.model.load()
            drafters = {}
            for given in self.drafters:
                drafter = load_named_drafter(given, target, self.model.quantize_drafter)
                name = name_of(given)
                if name in drafters:
                    raise ValueError(f"two drafters are called {name}; their folders need different names")
                drafters[name] = drafter, self.tree.applied(drafter.tree)
            defaults = target.generation_defaults if self.model.generation_config else GenerationDefaults()
            greedy = SamplingParams(temperature=0, **self.penalties.given).resolved(defaults)
            others, about_transformers = [], None
            if self.transformers:
                from jaxspec.benchmark.transformers_arm import transformers_arm

                arm, about_transformers = transformers_arm(target, self.model.dtype, self.max_new_tokens, greedy)
                others.append(arm)
            benchmark = SpeedBenchmark(
                target=target,
                drafters=drafters,
                examples=example_prompts(self.num_prompts, self.seed),
                temperatures=self.temperatures,
                runs=self.runs,
                max_new_tokens=self.max_new_tokens,
                max_length=self.model.max_length,
                seed=self.seed,
                patience=self.patience,
                noise_off=self.noise_off,
                others=others,
                penalties=self.penalties.given,
                generation_config=self.model.generation_config,
            )
            throughput = ThroughputBenchmark(benchmark, self.concurrency) if self.concurrency else None
        show_applied(target.generation_defaults, benchmark.from_folder)
        progress = partial(ProgressLines, console)
        results = {
            "environment": environment(target, self.model.precision, self.model.target, arguments),
            "settings": settings_of(benchmark) | {"concurrency": self.concurrency},
            "transformers": about_transformers,
            "speed": benchmark.run(progress),
            "throughput": throughput.run(progress) if throughput else [],
            "quality": [],
        }
        if self.score_prompts:
            results["quality"] = score_answers(
                target,
                drafters,
                self.score_prompts,
                self.seed,
                self.max_new_tokens,
                progress,
                greedy,
                max_length=self.model.max_length,
                generation_config=self.model.generation_config,
            )
        write_report(results, self.output)
        self.show(console, results)

    def show(self, console: Console, results: dict) -> None:
        chosen = [SPEED_COLUMNS.index(column) for column in SHOWN]
        rows = [[row[index] for index in chosen] for row in speed_rows(results)]
        console.print(table(console, list(SHOWN.values()), rows))
        if results["throughput"]:
            console.print(table(console, THROUGHPUT_COLUMNS, throughput_rows(results)))
            console.print(throughput_legend(results["settings"]))
        if results["quality"]:
            console.print(table(console, QUALITY_COLUMNS, quality_rows(results)))
        for entry in results["speed"]:
            if entry["warning"]:
                show_warning(console, f"{entry['arm']}: {entry['warning']}")
        console.print(TEMPLATED)
        drawn = write_plot(results, self.output / "results.png")
        wrote = ", ".join(["results.json", "results.md", *(["results.png"] if drawn else [])])
        console.print(f"wrote {wrote} to {self.output}", markup=False, soft_wrap=True)
        if not drawn and self.drafters:
            console.print("no results.png: matplotlib is not installed (pip install 'jaxspec-vlm[plot]')", markup=False)
