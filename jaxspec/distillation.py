"""Self-distillation: a target answers prompts itself, part by part, for its drafters to learn from.

The answers come from an engine: as soon as one ends, the next begins in its slot, and a conversation goes on with its
next turn while others are at their first. Record i samples with seed + i, whatever is answered beside it. So a run that
was stopped, or that several processes share, ends in the same set, given the same kind of device, number of slots and
drafter. These choose no token, but they change how matrix products are rounded, which decides where two tokens are as
good as equal: the coarser the type (bfloat16), the more often. What else is being answered changes not even that
(`EngineSettings.batch_invariant`).
"""

import asyncio
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxspec.checks import encodable
from jaxspec.data.answers import ABOUT, Answer, AnswerParts, Part, Refused, write_json
from jaxspec.data.formats import name_of, printable
from jaxspec.data.pictures import Pictures
from jaxspec.data.prompts import Conversation, PromptSource, read_conversation, with_suffix
from jaxspec.generator import Result, not_finite
from jaxspec.prompting import encode_prompt
from jaxspec.serving.engine import Engine
from jaxspec.serving.requests import EngineSettings
from jaxspec.speculation.params import SamplingParams
from jaxspec.stopping import Stopped
from jaxspec.targets.prompts import EncodedPrompt

READ_AHEAD = 3
"""Prompts that are ready or being answered, pictures and all, for every slot."""


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


def engine_settings(settings: DistillSettings, available: int, batch_size: int, **options: Any) -> EngineSettings:
    """Those of an engine that answers a source of `available` records: no more slots than `batch_size`, and none that a
    part has no records for. Raises ValueError for a `batch_size` below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    slots = min(batch_size, settings.shard_size, len(settings.records(available)))
    return EngineSettings(
        max_num_seqs=slots, max_queued_requests=READ_AHEAD * slots, batch_invariant=True, warm_up=False, **options
    )


class Answered(NamedTuple):
    """What became of a record."""

    answers: list[Answer]  # one for each turn, up to one that was refused
    refused: Refused | None = None
    cut: int = 0  # answers that ended at the limit of tokens


class Distiller:
    """Answers the records of a source.

    Args:
      engine: of the target, with or without a drafter: the answers are the same but for ties in rounding. Its settings
        are those of `engine_settings`, and it runs while parts are made.
      source: from `jaxspec.data.prompts.open_prompts`.
      settings: which records, and how.
    """

    def __init__(self, engine: Engine, source: PromptSource, settings: DistillSettings) -> None:
        self.engine, self.source, self.settings = engine, source, settings
        self.records = settings.records(len(source))
        self.pictures = Pictures(source.image_folder)
        self.from_folder = settings.sampling(0).from_folder(engine.generation_defaults)
        """What the answers take from the target's folder."""

    def part(
        self,
        records: range,
        advance: Callable[[int], None] = lambda count: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Part:
        """Answer these records. `advance(n)` is told of n more that are done with; once `stopping()` is true, answers
        that are on their way are given up and Stopped is raised."""

        async def answered() -> list[Answered]:
            room = asyncio.Semaphore(self.engine.settings.max_queued_requests)

            async def one(record: int) -> Answered:
                async with room:
                    made = await self.record(record, stopping)
                advance(1)
                return made

            return await asyncio.gather(*map(one, records))

        made = asyncio.run(answered())
        return Part(
            answers=[answer for each in made for answer in each.answers],
            refused=[each.refused for each in made if each.refused is not None],
            cut=sum(each.cut for each in made),
        )

    async def record(self, record: int, stopping: Callable[[], bool]) -> Answered:
        """Answer the turns of one record, one after the other."""
        answers, cut = [], 0
        try:
            dialogue = self.begin(record)
        except ValueError as error:
            return Answered([], Refused(record, self.name(record), str(error)))
        while True:
            if stopping():
                raise Stopped
            try:
                dialogue.encoded = self.encode(dialogue)
            except ValueError as error:
                return Answered(answers, Refused(record, dialogue.id, str(error)), cut)
            result = await self.answer(dialogue, stopping)
            if result.error is not None:
                return Answered(answers, Refused(record, dialogue.id, result.error), cut)
            answers.append(self.answer_of(dialogue, result.tokens))
            cut += result.finish_reason == "length"
            if self.settings.turns == "first" or dialogue.answered + 1 == len(dialogue.asked.turns):
                return Answered(answers, None, cut)
            dialogue.messages.append({"role": "assistant", "content": result.text})
            dialogue.answered += 1

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
        encoded = encode_prompt(self.engine.target, dialogue.messages, images)
        self.engine.check(encoded, self.settings.sampling(dialogue.record), self.settings.max_new_tokens)
        return encoded

    async def answer(self, dialogue: Dialogue, stopping: Callable[[], bool]) -> Result:
        """The engine's answer, which has an error only where the target's numbers are to blame. Raises RuntimeError
        where the engine is: then other records might fare no better."""
        sampling = self.settings.sampling(dialogue.record)
        stream = self.engine.submit(dialogue.prompt, sampling, self.settings.max_new_tokens)
        result = None
        try:
            async for piece in stream:
                result = piece.result
                if result is None and stopping():
                    raise Stopped
        finally:
            stream.cancel()  # which does nothing to a finished one
        assert result is not None  # the last piece has it
        if result.error not in (None, not_finite(len(dialogue.prompt.input_ids), len(result.tokens))):
            why = f"{result.error}: {result.cause}"
            raise RuntimeError(f"record {dialogue.record} ({dialogue.id}) could not be answered: {why}")
        return result

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
