"""The throughput benchmark: every drafter against autoregressive decoding where many requests share the machine.

Each arm is an engine with so many slots, which is asked all questions at once. Nothing is kept from one run for the
next: every prompt is read whole.
"""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from jaxspec.benchmark.measure import Runs, interleaved
from jaxspec.benchmark.run import BASELINE, SpeedBenchmark, quantiles
from jaxspec.generator import Result
from jaxspec.metrics import pooled
from jaxspec.prompting import encode_prompt
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import EngineSettings
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.prompts import EncodedPrompt

WHOLE_TREE = "{} (whole tree)"


class AllAnswers(NamedTuple):
    """One run of an arm."""

    results: list[Result]
    seconds: float  # from the first submission until the last token

    @property
    def tokens(self) -> int:
        return sum(len(result.tokens) for result in self.results)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclasses.dataclass(frozen=True)
class ThroughputBenchmark:
    """What is measured: models, questions, temperatures and runs of `speed`, in `concurrency` slots. Raises ValueError
    for fewer questions than slots, which would not fill them."""

    speed: SpeedBenchmark
    concurrency: int

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= len(self.speed.examples):
            raise ValueError(
                f"concurrency must lie in 1..{len(self.speed.examples)}, the number of prompts; got {self.concurrency}"
            )

    def arms(self) -> dict[str, Engine]:
        """The baseline first; every drafter twice: as much as pays, and its whole tree at all times."""
        settings = EngineSettings(
            max_length=self.speed.max_length,
            max_num_seqs=self.concurrency,
            max_queued_requests=len(self.speed.examples),
            image_cache_bytes=0,
            prefix_cache_bytes=0,
            generation_config=self.speed.generation_config,
        )
        whole = dataclasses.replace(settings, adaptive=False)
        made = {BASELINE: Engine(self.speed.target, settings=settings)}
        for name, (drafter, tree) in self.speed.drafters.items():
            made[name] = Engine(self.speed.target, drafter, tree, settings)
            made[WHOLE_TREE.format(name)] = Engine(self.speed.target, drafter, tree, whole)
        return made

    def run(self, progress: Callable[[str, int], AbstractContextManager[Any]]) -> list[dict]:
        """One entry per temperature and arm. `progress(name, total)` is a context with `advance()`."""
        speed, arms = self.speed, self.arms()
        prompts = [encode_prompt(speed.target, each.question, (each.image,)) for each in speed.examples]
        entries = []
        with contextlib.ExitStack() as engines:
            with progress("warm-up, many at once", len(arms)) as bar:
                for engine in arms.values():
                    engines.enter_context(engine)
                    while not engine.ready:
                        time.sleep(0.05)
                    self.answered(engine, prompts, max(speed.temperatures))
                    bar.advance()
            compiled = {name: engine.stats().compilations for name, engine in arms.items()}
            with progress("measuring, many at once", speed.runs * len(speed.temperatures)) as bar:
                for temperature in speed.temperatures:
                    asked = {
                        name: functools.partial(self.answered, engine, prompts, temperature)
                        for name, engine in arms.items()
                    }
                    made = interleaved(asked, speed.runs, speed.patience, bar.advance)
                    entries += [self.summary(temperature, name, made) for name in arms]
            for entry in entries:
                before = compiled[entry["arm"]]
                entry["compilations"] = before
                entry["compilations_while_measuring"] = arms[entry["arm"]].stats().compilations - before
        return entries

    def answered(self, engine: Engine, prompts: Sequence[EncodedPrompt], temperature: float) -> AllAnswers:
        """All of them, submitted at once."""
        sampling: list[SamplingParams] = [self.speed.sampling(temperature, index) for index in range(len(prompts))]
        started = time.perf_counter()
        streams = [
            engine.submit(prompt, params, self.speed.max_new_tokens)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]
        results = [stream.result().checked() for stream in streams]
        return AllAnswers(results, time.perf_counter() - started)

    def summary(self, temperature: float, name: str, made: Runs[AllAnswers]) -> dict:
        """The numbers of one arm."""
        runs, baseline = made.answers[name], made.answers[BASELINE]
        acceptance = pooled([result.stats for result in runs[0].results])
        rates = [run.tokens_per_second for run in runs]
        reference = [run.tokens_per_second for run in baseline]
        expected = [result.tokens.tolist() for result in baseline[0].results]
        answers = zip(expected, *(run.results for run in runs), strict=True)
        return {
            "temperature": temperature,
            "arm": name,
            "tokens_per_second": statistics.median(rates),
            "tokens_per_second_runs": rates,
            "speedup": statistics.median(rates) / statistics.median(reference),
            "speedup_runs": [ours / theirs for ours, theirs in zip(rates, reference, strict=True)],
            **dataclasses.asdict(acceptance),
            "tokens": runs[0].tokens,
            "seconds": [run.seconds for run in runs],
            "answers": len(expected),
            "identical": sum(all(each.tokens.tolist() == tokens for each in given) for tokens, *given in answers),
            "stolen": quantiles(made.stolen),
            "repeated": made.repeated,
        }
