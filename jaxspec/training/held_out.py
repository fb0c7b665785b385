"""Which records of a set are learned from, and which only judged by."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from jaxspec.data.pipeline import Pipeline
from jaxspec.data.records import Encoder, QuestionEncoder, Records
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.training.recipe import Recipe

Source = TypeVar("Source", bound=Records[dict[str, Any]], covariant=True)


class Span(Generic[Source]):
    """Records `start` to `stop` of a random-access source."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self.source, self.start, self.stop = source, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return self.source[self.start + index]


def held_out_of(wanted: int, records: Records[Any]) -> int:
    """How many of the first records are held out: never more than half."""
    return min(wanted, len(records) // 2)


def pipelines(
    recipe: Recipe, records: Records[dict[str, Any]], held_out: int, encoder: Encoder, answer_run: int = 1
) -> tuple[Pipeline, Callable[[], Iterator[dict]]]:
    """The batches to train on, and up to `eval_batches` of the first `held_out` records (the last one may go round).
    `answer_run` is what the loss needs of an answer (`Pipeline`). Raises ValueError where nothing can be learned from
    the records, or from those held out."""

    def pipeline(span: Span, shuffle: bool) -> Pipeline:
        return Pipeline(
            span,
            encoder,
            sequence_length=recipe.sequence_length,
            batch_size=recipe.rows,
            seed=recipe.seed,
            shuffle=shuffle,
            length_buckets=recipe.length_buckets,
            answer_run=answer_run,
        )

    training = pipeline(Span(records, held_out, len(records)), True)
    training.check()
    if not held_out:
        return training, lambda: iter(())
    validation = pipeline(Span(records, 0, held_out), False)
    try:
        validation.check()
    except ValueError as error:
        raise ValueError(f"validation on the first {held_out} records: {error}") from error
    count = min(recipe.eval_batches * recipe.accumulate, -(-held_out // recipe.rows))
    return training, lambda: (validation[index] for index in range(count))


def first_questions(
    records: Records[dict[str, Any]], encoder: QuestionEncoder, count: int, room: int
) -> list[tuple[EncodedPrompt, int]]:
    """The first `count` questions of up to `room` tokens, each with the length of its answer. A record that has none,
    or cannot be encoded, is left out with a warning that names it."""
    questions = []
    for index in range(len(records)):
        if len(questions) == count:
            break
        name = index
        try:
            record = records[index]
            name = record.get("id", index)
            prompt, tokens = encoder.encode_question(record)
            if (length := len(prompt.input_ids)) > room:
                raise ValueError(f"its question has {length} tokens, of which {room} fit")
        except ValueError as error:
            warnings.warn(f"acceptance is measured without record {name}: {error}", stacklevel=2)
        else:
            questions.append((prompt, tokens))
    return questions
