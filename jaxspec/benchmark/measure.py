"""How arms are timed: warm-up of every compiled shape, interleaved runs, medians, acceptance pooled over prompts."""

import dataclasses
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from jaxspec.benchmark.host import StolenShare
from jaxspec.buckets import bucket
from jaxspec.generator import Generator, Result
from jaxspec.metrics import GenerationStats
from jaxspec.prompting import ImageLike, Prompt, encode_prompt
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.target import Target
from jaxspec.video import Video

Made = TypeVar("Made")

WARM_UPS = 3
MAX_STOLEN = 0.01


class Question(NamedTuple):
    """One request of a benchmark."""

    prompt: Prompt
    images: tuple[ImageLike | Video, ...] = ()


class Answer(Protocol):
    """What timing needs of a result: `jaxspec.Result`, and what other implementations' arms return."""

    @property
    def tokens(self) -> np.ndarray:
        """I32 `[n]`."""
        ...

    @property
    def text(self) -> str: ...

    @property
    def stats(self) -> GenerationStats: ...


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to answer. `answer(question, sampling)` returns an `Answer`; `warm_up(question, sampling)` compiles."""

    name: str
    answer: Callable[[Question, SamplingParams], Answer]
    warm_up: Callable[[Question, SamplingParams], object]
    generator: Generator | None = None

    @classmethod
    def of(cls, name: str, generator: Generator, max_new_tokens: int) -> "Arm":
        def answer(question: Question, sampling: SamplingParams) -> Result:
            return generator.generate(question.prompt, question.images, sampling, max_new_tokens)

        def warm_up(question: Question, sampling: SamplingParams) -> None:
            """One prefill and two rounds: all programs of a request, without its length."""
            stream = generator.stream(question.prompt, question.images, sampling, max_new_tokens, rounds_per_piece=1)
            for _ in itertools.islice(stream, 3):
                pass

        return cls(name, answer, warm_up, generator)

    def asked(self, question: Question, sampling: SamplingParams) -> Callable[[], Answer]:
        """What answers that question, whenever it is called."""
        return functools.partial(self.answer, question, sampling)

    @property
    def compilations(self) -> int:
        return self.generator.compilations if self.generator else 0


def distinct_shapes(target: Target, questions: Sequence[Question]) -> list[Question]:
    """One question for each combination of shapes that a generator compiles for."""
    seen = {}
    for question in questions:
        encoded = encode_prompt(target, question.prompt, question.images)
        shape = bucket(len(encoded.input_ids)), *((image.table_size, image.tokens) for image in encoded.images)
        seen.setdefault(shape, question)
    return list(seen.values())


def warm_up(arms: Sequence[Arm], questions: Sequence[Question], sampling: SamplingParams) -> None:
    """Every arm on every question, `WARM_UPS` times."""
    for arm, question, _ in itertools.product(arms, questions, range(WARM_UPS)):
        arm.warm_up(question, sampling)


class Runs(NamedTuple, Generic[Made]):
    """What every arm made, `runs` times."""

    answers: dict[str, list[Made]]
    stolen: list[float]
    """Share of the machine that its host took away, run by run (`jaxspec.benchmark.host`)."""
    repeated: int
    """Runs that were thrown away for that."""


def interleaved(
    arms: Mapping[str, Callable[[], Made]],
    runs: int,
    patience: int = 1,
    after_each: Callable[[], None] = lambda: None,
) -> Runs[Made]:
    """What every arm makes `runs` times, in the order A B C A B C ..: a machine that slows down slows all arms alike.

    A run of all arms in which the host took more than `MAX_STOLEN` of the machine is repeated, until `runs * patience`
    have been made; the least disturbed ones count.
    """
    made: list[tuple[float, dict[str, Made]]] = []
    while len(made) < runs * patience and sum(stolen <= MAX_STOLEN for stolen, _ in made) < runs:
        share = StolenShare()
        answers = {name: answer() for name, answer in arms.items()}
        made.append((share(), answers))
        if len(made) <= runs:
            after_each()
    kept = sorted(made, key=lambda run: run[0])[:runs]
    return Runs(
        answers={name: [answers[name] for _, answers in kept] for name in arms},
        stolen=[stolen for stolen, _ in kept],
        repeated=len(made) - runs,
    )


@dataclasses.dataclass(frozen=True)
class Timing:
    """One arm's runs of one question, in seconds."""

    tokens: int
    decode_seconds: tuple[float, ...]
    prefill_seconds: tuple[float, ...]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Timing":
        return cls(
            tokens=len(answers[0].tokens),
            decode_seconds=tuple(answer.stats.decode_seconds for answer in answers),
            prefill_seconds=tuple(answer.stats.prefill_seconds for answer in answers),
        )

    @property
    def decode(self) -> float:
        return statistics.median(self.decode_seconds)

    @property
    def time_to_first_token(self) -> float:
        return statistics.median(self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """After the first token; nan where nothing was decoded."""
        return (self.tokens - 1) / self.decode if self.decode else math.nan

    @property
    def end_to_end_tokens_per_second(self) -> float:
        return self.tokens / (self.decode + self.time_to_first_token)


def speedup(baseline: Sequence[Timing], timings: Sequence[Timing]) -> float:
    """Ratio of decode tokens per second, summed over questions.

    Where both arms gave the same tokens, as they must but for floating-point ties, it is the ratio of decode times.
    """
    ours, theirs = tokens_per_second(timings), tokens_per_second(baseline)
    return ours / theirs if theirs else math.nan


def tokens_per_second(timings: Sequence[Timing]) -> float:
    """Decoded tokens of all questions over the sum of their median decode times; nan where nothing was decoded."""
    seconds = sum(timing.decode for timing in timings)
    return sum(timing.tokens - 1 for timing in timings) / seconds if seconds else math.nan


def speedup_of_run(baseline: Sequence[Timing], timings: Sequence[Timing], run: int) -> float:
    """The same from the run with that number alone."""

    def only(timing: Timing) -> Timing:
        return Timing(timing.tokens, (timing.decode_seconds[run],), (timing.prefill_seconds[run],))

    return speedup([*map(only, baseline)], [*map(only, timings)])
