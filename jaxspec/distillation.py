"""Self-distillation: a target answers prompts itself, part by part, for its drafters to learn from.

A part's answers depend on its prompts and the settings, not on other parts: batches never reach across parts, record i
samples with seed + i. So a run that was stopped, or that several processes share, ends in the same set, given the same
kind of device, batch size and drafter. These choose no token, but they change how matrix products are rounded, which
decides where two tokens are as good as equal: the coarser the type (bfloat16), the more often.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxspec.checks import encodable
from jaxspec.data.answers import ABOUT, Answer, AnswerParts, Part, Refused, write_json
from jaxspec.data.formats import name_of, printable
from jaxspec.data.pictures import Pictures
from jaxspec.data.prompts import Conversation, PromptSource, read_conversation, with_suffix
from jaxspec.generator import Generator, Result
from jaxspec.prompting import encode_prompt
from jaxspec.speculation.params import SamplingParams
from jaxspec.stopping import Stopped
from jaxspec.targets.prompts import EncodedPrompt


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """Which prompts are answered, and how."""

    start: int = 0
    """The first record."""
    count: int | None = None
    """Records from there on; all by default."""
    suffix: str = ""
    """An ending for every prompt: vispec (at least 1000 words), specvlm (an explanation, in place of LLaVA's requests
    for short answers), or any text, appended as it is."""
    turns: Literal["first", "all"] = "first"
    """Answer the first turn of a conversation, or each one after the target's own answers to those before; every turn
    is an answer of its own in the set."""
    temperature: float = 0.0
    sampled_share: float = 1.0
    """Share of the records that are sampled at the temperature, evenly spread; the others are answered greedily. 0.5
    samples every odd one."""
    top_p: float = 1.0
    repetition_penalty: float | None = None
    """This and the next: as the target's generation_config.json says where none is given, else off."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    """No end-of-sequence token before so many tokens of an answer."""
    seed: int = 0
    """Record i samples with seed + i."""
    max_new_tokens: int = 1024
    shard_size: int = 256
    """Records per file of the set, and per part that is written whole: a run that is killed loses one part at most."""

    def __post_init__(self) -> None:
        for field, least in (("start", 0), ("count", 1), ("seed", 0), ("max_new_tokens", 1), ("shard_size", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field} must be at least {least}, got {value}")
        if not 0 <= self.sampled_share <= 1:
            raise ValueError(f"sampled_share must lie in 0..1, got {self.sampled_share}")
        encodable(self.suffix, "suffix")
        temperature = SamplingParams(temperature=self.temperature, top_p=self.top_p, **self.penalties).temperature
        if (self.min_tokens or 0) > self.max_new_tokens:
            raise ValueError(
                f"min_tokens must be at most max_new_tokens ({self.max_new_tokens}), got {self.min_tokens}"
            )
        for field in ("top_p", "sampled_share"):
            if not temperature and getattr(self, field) != 1:
                raise ValueError(f"{field} has no effect at temperature 0, got {getattr(self, field)}")
        if temperature and not self.sampled_share:
            raise ValueError(f"temperature has no effect at sampled_share 0, got {self.temperature}")

    @property
    def penalties(self) -> dict[str, Any]:
        """Those that are given, by their names in `SamplingParams`."""
        names = "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def records(self, available: int) -> range:
        """The chosen ones of a source of that size."""
        if self.start >= available:
            raise ValueError(f"start must lie in 0..{available - 1}, the records of the source; got {self.start}")
        if self.count is not None and self.start + self.count > available:
            raise ValueError(
                f"count must be at most {available - self.start}, the records from number {self.start} on; "
                f"got {self.count}"
            )
        return range(self.start, available if self.count is None else self.start + self.count)

    def sampling(self, record: int) -> SamplingParams:
        """How that record is answered: temperature and filters as set here, whatever the target's folder says; of
        penalties, which change greedy answers, too, what is not set is left to it, as by whoever asks for such answers
        later."""
        sampled = math.floor((record + 1) * self.sampled_share) > math.floor(record * self.sampled_share)
        seed, temperature = (self.seed + record) % 2**32, self.temperature if sampled else 0.0
        return SamplingParams(
            temperature=temperature, top_p=self.top_p, top_k=0, min_p=0.0, seed=seed, **self.penalties
        )


@dataclasses.dataclass
class Dialogue:
    """A conversation on its way: what has been said so far."""

    record: int
    asked: Conversation
    messages: list[dict]
    answered: int = 0  # turns
    encoded: EncodedPrompt | None = None  # up to the turn that is to be answered next

    @property
    def prompt(self) -> EncodedPrompt:
        """What is to be answered next, once it is encoded."""
        assert self.encoded is not None
        return self.encoded

    @property
    def images(self) -> tuple[str, ...]:
        """References of the images seen so far."""
        marks = sum(part["type"] == "image" for turn in self.asked.turns[: self.answered + 1] for part in turn)
        return self.asked.images[:marks]

    @property
    def id(self) -> str:
        return self.asked.id if not self.answered else f"{self.asked.id}#{self.answered + 1}"


class Distiller:
    """Answers the records of a source.

    Args:
      generator: of the target, with or without a drafter: the answers are the same but for ties in rounding.
      source: from `jaxspec.data.prompts.open_prompts`.
      settings: which records, and how.
      batch_size: prompts that are answered at once; smaller batches are filled up, so that all are of one size.
    """

    def __init__(self, generator: Generator, source: PromptSource, settings: DistillSettings, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.generator, self.source, self.settings = generator, source, settings
        self.records = settings.records(len(source))
        self.batch_size = min(batch_size, settings.shard_size, len(self.records))
        self.pictures = Pictures(source.image_folder)
        self.from_folder = settings.sampling(0).from_folder(generator.generation_defaults)
        """What the answers take from the target's folder."""

    def part(
        self,
        records: range,
        advance: Callable[[int], None] = lambda count: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Part:
        """Answer these records. `advance(n)` is told of n more that are done with; where `stopping()` is true between
        two batches, Stopped is raised."""
        answers: dict[tuple[int, int], Answer] = {}
        refused: list[Refused] = []
        cut = 0
        waiting = []
        for record in records:
            try:
                waiting.append(self.begin(record))
            except ValueError as error:
                refused.append(Refused(record, self.name(record), str(error)))
        advance(len(records) - len(waiting))
        while waiting:
            ready = []
            for dialogue in waiting:
                try:
                    dialogue.encoded = self.encode(dialogue)
                    ready.append(dialogue)
                except ValueError as error:
                    refused.append(Refused(dialogue.record, dialogue.id, str(error)))
            advance(len(waiting) - len(ready))
            waiting = []
            for batch in self.batches(ready):
                if stopping():
                    raise Stopped
                results, going_on = self.answer(batch), []
                for row, (dialogue, result) in enumerate(zip(batch, results, strict=True)):
                    if result.error is not None:
                        reason = result.error.removeprefix(f"prompt {row}: ")
                        refused.append(Refused(dialogue.record, dialogue.id, reason))
                        continue
                    key = dialogue.record, dialogue.answered
                    answers[key] = self.answer_of(dialogue, result.tokens)
                    cut += result.finish_reason == "length"
                    if self.settings.turns == "all" and dialogue.answered + 1 < len(dialogue.asked.turns):
                        dialogue.messages.append({"role": "assistant", "content": result.text})
                        dialogue.answered += 1
                        going_on.append(dialogue)
                advance(len(batch) - len(going_on))
                waiting += going_on
        refused.sort(key=lambda each: each.record)
        return Part([answers[key] for key in sorted(answers)], refused, cut)

    def begin(self, record: int) -> Dialogue:
        asked = read_conversation(self.source[record], record)
        return Dialogue(record, asked, list(asked.system))

    def name(self, record: int) -> str:
        """What a refused record is called where it is shown."""
        try:
            given = self.source[record]
        except ValueError:
            given = None
        return printable(name_of(given, f"record {record}"))

    def encode(self, dialogue: Dialogue) -> EncodedPrompt:
        """The dialogue up to its next turn, that turn included; raises ValueError for what cannot be asked."""
        turn = with_suffix(dialogue.asked.turns[dialogue.answered], self.settings.suffix)
        dialogue.messages.append({"role": "user", "content": turn})
        images = [self.pictures[reference] for reference in dialogue.images]
        encoded = encode_prompt(self.generator.target, dialogue.messages, images)
        self.generator.check_length(encoded)
        return encoded

    def batches(self, ready: list[Dialogue]) -> Iterator[list[Dialogue]]:
        """Prompts of similar length together, text apart from images: few shapes, few compiled programs."""
        ordered = sorted(ready, key=lambda each: (len(each.images), len(each.prompt.input_ids), each.record))
        for start in range(0, len(ordered), self.batch_size):
            yield ordered[start : start + self.batch_size]

    def answer(self, batch: list[Dialogue]) -> list[Result]:
        """A short batch is filled up with copies of its last prompt."""
        full = [*batch, *batch[-1:] * (self.batch_size - len(batch))]
        sampling = [self.settings.sampling(each.record) for each in full]
        prompts = [each.prompt for each in full]
        return self.generator.generate_encoded(prompts, sampling, self.settings.max_new_tokens)[: len(batch)]

    def answer_of(self, dialogue: Dialogue, tokens: np.ndarray) -> Answer:
        """What the set says of it; `tokens` i32 `[n]`."""
        params = self.settings.sampling(dialogue.record)
        return Answer(
            id=dialogue.id,
            prompt_ids=dialogue.prompt.input_ids,
            answer_ids=tokens,
            images=dialogue.images,
            temperature=params.temperature,
            seed=params.seed,
        )


def open_output(folder: Path, settings: dict[str, Any], about: dict[str, Any]) -> None:
    """Begin a set in `folder` or go on with the one that is there.

    `settings` decide its answers; `about` is what else `distill.json` shall say. Raises ValueError, naming them, where
    the settings are not those that the set was begun with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ABOUT).exists():
        write_json(folder / ABOUT, {**about, "settings": settings})
    begun = json.loads((folder / ABOUT).read_text())["settings"]
    differing = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
    if differing:
        pairs = ", ".join(f"{name} (there {begun.get(name)!r}, here {settings.get(name)!r})" for name in differing)
        raise ValueError(f"{folder} holds answers made with other settings: {pairs}; choose another output folder")


def finish_output(folder: Path, parts: AnswerParts) -> dict:
    """Make the data set once all parts are there; returns what `distill.json` says."""
    about = json.loads((folder / ABOUT).read_text()) | parts.finish()
    write_json(folder / ABOUT, about)
    return about
