"""The speed benchmark: every drafter, at every temperature, against autoregressive decoding, batch 1.

`SpeedBenchmark.run` returns plain values for `results.json`; `report.py` words them, `plot.py` draws them.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from jaxspec import demo
from jaxspec.arguments import length_limit
from jaxspec.benchmark.identity import choice_margin, first_difference
from jaxspec.benchmark.measure import (
    WARM_UPS,
    Answer,
    Arm,
    Question,
    Timing,
    distinct_shapes,
    interleaved,
    speedup,
    speedup_of_run,
    tokens_per_second,
    warm_up,
)
from jaxspec.drafters.drafter import Drafter
from jaxspec.generator import Generator
from jaxspec.metrics import Acceptance, acceptance_warning, pooled
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.generation import GenerationDefaults
from jaxspec.targets.target import Target

BASELINE = "autoregressive"
UNCOUPLED = "{} (noise off)"
ACCEPTANCE_FIELDS = tuple(field.name for field in dataclasses.fields(Acceptance))


@dataclasses.dataclass(frozen=True)
class SpeedBenchmark:
    """What is measured. `drafters` maps a name to the drafter and its tree; `others` are further arms for greedy
    decoding, such as another library's."""

    target: Target
    drafters: dict[str, tuple[Drafter, TreeConfig]]
    examples: Sequence[demo.Example]
    temperatures: Sequence[float]
    runs: int
    max_new_tokens: int
    max_length: int | None
    seed: int
    patience: int = 1
    noise_off: bool = True
    others: Sequence[Arm] = ()
    penalties: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Of `SamplingParams`, by name, in every arm."""
    generation_config: bool = True
    """Whether every arm does what else the target's generation_config.json asks for: filters and penalties, so that
    what is measured is what is served. Temperatures are the benchmark's own."""

    def __post_init__(self) -> None:
        for field in ("runs", "max_new_tokens", "patience"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not self.examples:
            raise ValueError("a benchmark needs at least one prompt, got none")
        if not self.temperatures:
            raise ValueError("a benchmark needs at least one temperature, got none")
        if self.others and 0 not in self.temperatures:
            raise ValueError("other implementations are compared at temperature 0, which is not among the temperatures")
        for temperature in self.temperatures:
            SamplingParams(temperature=temperature, seed=self.seed, **self.penalties)

    def arms(self) -> dict[float, list[list[Arm]]]:
        """Groups of arms for every temperature, the baseline first in each. Generators are shared between temperatures.

        Another library's arm is a group of its own: its threads may go on spinning for a while after it has answered.
        """

        def arm(name, drafter=None, tree=None):
            generator = Generator(self.target, drafter, tree, self.max_length, generation_config=self.generation_config)
            return Arm.of(name, generator, self.max_new_tokens)

        common = [arm(BASELINE)] + [arm(name, drafter, tree) for name, (drafter, tree) in self.drafters.items()]
        uncoupled = []
        if self.noise_off and any(temperature > 0 for temperature in self.temperatures):
            uncoupled = [
                arm(UNCOUPLED.format(name), drafter, dataclasses.replace(tree, noise_weight=0.0))
                for name, (drafter, tree) in self.drafters.items()
                if drafter.method != "lookup"  # which has no scores for noise to change
            ]
        others = [[common[0], *self.others]] if self.others else []
        return {
            temperature: [[*common, *uncoupled]] if temperature > 0 else [common, *others]
            for temperature in self.temperatures
        }

    def run(self, progress: Callable[[str, int], AbstractContextManager[Any]]) -> list[dict]:
        """One entry per temperature and arm. `progress(name, total)` is a context with `advance()`."""
        arms = self.arms()
        questions = [Question(example.question, (example.image,)) for example in self.examples]
        shapes = distinct_shapes(self.target, questions)
        seats = [arm for groups in arms.values() for group in groups for arm in group]
        every_arm = {arm.name: arm for arm in seats}
        with progress("warm-up", len(every_arm)) as bar:
            for arm in every_arm.values():
                # One program serves all temperatures, but only sampling draws noise: warm up with it where it is used.
                warm_up([arm], shapes, self.sampling(max(self.temperatures) if arm.generator else 0.0, 0))
                bar.advance()
        compiled = {name: arm.compilations for name, arm in every_arm.items()}
        results = []
        with progress("measuring", len(questions) * self.runs * sum(map(len, arms.values()))) as bar:
            for temperature, groups in arms.items():
                for group in groups:
                    entries = self.measured(temperature, group, questions, bar.advance)
                    results += entries if group is groups[0] else entries[1:]  # the baseline once per temperature
        for entry in results:
            name = entry["arm"]
            entry["compilations"] = compiled[name]
            entry["compilations_while_measuring"] = every_arm[name].compilations - compiled[name]
        return results

    def measured(
        self, temperature: float, group: Sequence[Arm], questions: Sequence[Question], after_each: Callable[[], None]
    ) -> list[dict]:
        """One entry per arm of the group, whose arms answer every question in turns."""
        made = [
            interleaved(
                {arm.name: arm.asked(question, self.sampling(temperature, index)) for arm in group},
                self.runs,
                self.patience,
                after_each,
            )
            for index, question in enumerate(questions)
        ]
        answers = [each.answers for each in made]  # per question: arm -> runs
        disturbance = {
            "stolen": quantiles([share for each in made for share in each.stolen]),
            "repeated": sum(each.repeated for each in made),
        }
        return [
            self.summary(temperature, arm, [each[arm.name] for each in answers], answers, questions) | disturbance
            for arm in group
        ]

    def sampling(self, temperature: float, index: int) -> SamplingParams:
        defaults = self.target.generation_defaults if self.generation_config else GenerationDefaults()
        return SamplingParams(temperature=temperature, seed=self.seed + index, **self.penalties).resolved(defaults)

    @property
    def from_folder(self) -> dict[str, float]:
        """What applies from the target's folder, at one temperature at least."""
        if not self.generation_config:
            return {}
        warmest = SamplingParams(temperature=max(self.temperatures), **self.penalties)
        return warmest.from_folder(self.target.generation_defaults)

    def summary(
        self,
        temperature: float,
        arm: Arm,
        answers: Sequence[Sequence[Answer]],
        all_answers: Sequence[Mapping[str, Sequence[Answer]]],
        questions: Sequence[Question],
    ) -> dict:
        """The numbers of one arm over all questions; `answers` are its runs per question, `all_answers` every arm's."""
        timings = [Timing.of(runs) for runs in answers]
        baseline = [Timing.of(each[BASELINE]) for each in all_answers]
        acceptance = pooled([runs[0].stats for runs in answers])
        gained = speedup(baseline, timings)
        prompts = [
            self.prompt_entry(index, runs[0], timing, reference)
            for index, (runs, timing, reference) in enumerate(zip(answers, timings, baseline, strict=True))
        ]
        differences = [
            {"prompt": index, "position": position, "margin": margin}
            for index, (runs, each) in enumerate(zip(answers, all_answers, strict=True))
            if (position := first_difference(runs[0].tokens, each[BASELINE][0].tokens)) is not None
            for margin in [
                choice_margin(
                    self.target,
                    questions[index],
                    self.sampling(temperature, index),
                    each[BASELINE][0].tokens,
                    position,
                )
            ]
        ]
        warning = None
        if arm.generator and arm.generator.judges_drafter and temperature == 0:
            drafter, tree = self.drafters[arm.name]
            recorded = drafter.about.get("mean_acceptance_length") if tree == drafter.tree else None
            warning = acceptance_warning(acceptance, recorded)
        return {
            "temperature": temperature,
            "arm": arm.name,
            "decode_tokens_per_second": tokens_per_second(timings),
            "end_to_end_tokens_per_second": sum(timing.tokens for timing in timings)
            / sum(timing.decode + timing.time_to_first_token for timing in timings),
            "time_to_first_token": statistics.median(timing.time_to_first_token for timing in timings),
            "speedup": gained,
            "speedup_runs": [speedup_of_run(baseline, timings, run) for run in range(self.runs)],
            "speedup_prompts": quantiles([entry["speedup"] for entry in prompts]),
            "efficiency": gained / acceptance.mean_acceptance_length,
            **dataclasses.asdict(acceptance),
            "identical": len(prompts) - len(differences),
            "differences": differences,
            "warning": warning,
            "prompts": prompts,
        }

    def prompt_entry(self, index: int, answer: Answer, timing: Timing, baseline: Timing) -> dict:
        example, stats = self.examples[index], answer.stats
        gained = speedup([baseline], [timing])
        return {
            "kind": example.kind,
            "question": example.question,
            "text": answer.text,
            "prompt_tokens": stats.prompt_tokens,
            "tokens": timing.tokens,
            "decode_seconds": list(timing.decode_seconds),
            "prefill_seconds": list(timing.prefill_seconds),
            "time_to_first_token": timing.time_to_first_token,
            "decode_tokens_per_second": timing.decode_tokens_per_second,
            "end_to_end_tokens_per_second": timing.end_to_end_tokens_per_second,
            "speedup": gained,
            "efficiency": gained / stats.mean_acceptance_length,
            **{name: getattr(stats, name) for name in ACCEPTANCE_FIELDS},
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Smallest, tenth, half, nine tenths, largest; of the values that are numbers."""
    finite = [value for value in values if np.isfinite(value)] or [float("nan")]
    names = ("min", "p10", "median", "p90", "max")
    return dict(zip(names, np.quantile(finite, [0, 0.1, 0.5, 0.9, 1]).tolist(), strict=True))


def example_prompts(count: int, seed: int) -> list[demo.Example]:
    """The first test examples; a kind of question that is missing takes the place of the last of the commonest kind."""
    chosen = demo.examples("test", count, seed)
    for kind in ("describe", "count", "compare", "locate", "read"):
        counts = Counter(example.kind for example in chosen)
        commonest, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
        if kind not in counts and most > 1:
            last = max(index for index, example in enumerate(chosen) if example.kind == commonest)
            chosen[last] = demo.examples("test", 1, seed, kinds=[kind])[0]
    return chosen


def settings_of(benchmark: SpeedBenchmark) -> dict:
    """What a report says about how it was measured."""
    return {
        "batch": 1,
        "devices": 1 if benchmark.target.mesh is None else benchmark.target.mesh.size,
        "num_prompts": len(benchmark.examples),
        "kinds": dict(Counter(example.kind for example in benchmark.examples)),
        "temperatures": list(benchmark.temperatures),
        "runs": benchmark.runs,
        "warm_ups": WARM_UPS,
        "patience": benchmark.patience,
        "max_new_tokens": benchmark.max_new_tokens,
        "max_length": length_limit(benchmark.max_length, benchmark.target.config.text.max_position_embeddings),
        "seed": benchmark.seed,
        "penalties": dict(benchmark.penalties),
        "generation_config": benchmark.from_folder,
        "drafters": {
            name: {
                "method": drafter.method,
                "tree": dataclasses.asdict(tree),
                "quantize": drafter.quantize,
                "recorded_mean_acceptance_length": drafter.about.get("mean_acceptance_length"),
                "trained": {field: drafter.about.get(field) for field in ("recipe", "recipe_hash", "step", "seed")},
            }
            for name, (drafter, tree) in benchmark.drafters.items()
        },
    }
