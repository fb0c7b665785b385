"""The numbers of speculative decoding, defined once for training, benchmark and server."""

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

JUDGED_ROUNDS = 64
"""Rounds after which what a drafter earns while it serves says something of it."""
LEAST_LENGTH, LEAST_SHARE = 1.1, 0.6


class AcceptanceWarning(UserWarning):
    """A drafter accepts too little to be of use."""


@dataclasses.dataclass(frozen=True)
class Acceptance:
    """What a drafter earned over a number of rounds (verification steps of the target)."""

    rounds: int
    emitted_tokens: int
    mean_acceptance_length: float
    """Tokens emitted per round, bonus token included; 1.0 without a drafter."""
    mean_accepted_draft_tokens: float
    """The same without the bonus."""
    acceptance_at_position: tuple[float, ...]
    """Entry i: share of rounds in which at least i + 1 draft tokens were accepted."""
    conditional_acceptance: tuple[float, ...]
    """Entry i: the same, given that i were accepted; nan where that never happened."""
    draft_acceptance_rate: float
    """Accepted draft tokens over drafted depth; nan without a drafter."""
    emitted: tuple[int, ...]
    """Entry i: how many rounds emitted i + 1 tokens."""
    drafted_depth: int
    """Most draft tokens that the rounds could have accepted. All else follows from it and `emitted`."""

    @classmethod
    def from_histogram(cls, emitted: ArrayLike, drafted_depth: int | None = None) -> "Acceptance":
        """From counts `[P]`: entry i is the number of rounds that emitted i + 1 tokens (P = deepest path + 1). Where
        not all rounds had a tree so deep, `drafted_depth` says how deep the trees of all rounds were together.

        A round that was cut by a stop token or a length limit counts with the tokens it really emitted.
        """
        counts = np.asarray(emitted, np.int64)
        rounds = int(counts.sum())
        tokens = int((counts * np.arange(1, len(counts) + 1)).sum())
        reached = counts[::-1].cumsum()[::-1]  # rounds that emitted at least i + 1 tokens
        depth = rounds * (len(counts) - 1) if drafted_depth is None else drafted_depth
        length = tokens / rounds if rounds else float("nan")
        with np.errstate(divide="ignore", invalid="ignore"):
            joint = reached[1:] / rounds
            conditional = reached[1:] / reached[:-1]
        return cls(
            rounds=rounds,
            emitted_tokens=tokens,
            mean_acceptance_length=length,
            mean_accepted_draft_tokens=length - 1,
            acceptance_at_position=tuple(joint.tolist()),
            conditional_acceptance=tuple(conditional.tolist()),
            draft_acceptance_rate=(tokens - rounds) / depth if depth else float("nan"),
            emitted=tuple(counts.tolist()),
            drafted_depth=depth,
        )


@dataclasses.dataclass(frozen=True)
class GenerationStats(Acceptance):
    """One request: acceptance, and times in seconds. Rows of a batch share their times."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @classmethod
    def of(cls, emitted: ArrayLike, drafted_depth: int | None = None, **values: Any) -> "GenerationStats":
        """As of `from_histogram`, with the fields of its own."""
        return cls(**dataclasses.asdict(Acceptance.from_histogram(emitted, drafted_depth)), **values)

    @property
    def decode_tokens_per_second(self) -> float:
        """After the first token; nan where nothing was decoded."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else float("nan")

    @property
    def end_to_end_tokens_per_second(self) -> float:
        """With vision encoder and prefill."""
        return self.generated_tokens / (self.prefill_seconds + self.decode_seconds)

    @property
    def time_to_first_token(self) -> float:
        return self.prefill_seconds


def emitted_per_round(from_draft: np.ndarray, width: int) -> np.ndarray:
    """How many rounds emitted 1, 2, .. `width` tokens: i64 `[width]`.

    `from_draft` bool `[n]` are the tokens of an answer after its first, which comes with the prompt. A round ends with
    a token of the target's own; where the answer ends among a round's draft tokens, that round counts with these.
    """
    ends = np.flatnonzero(~from_draft) + 1
    if len(from_draft) and from_draft[-1]:
        ends = np.append(ends, len(from_draft))
    return np.bincount(np.diff(ends, prepend=0) - 1, minlength=width)


def pooled(stats: Sequence[Acceptance]) -> Acceptance:
    """The acceptance of all rounds of several requests together, whose trees may have been of different depths."""
    columns = itertools.zip_longest(*(each.emitted for each in stats), fillvalue=0)
    return Acceptance.from_histogram([sum(column) for column in columns], sum(each.drafted_depth for each in stats))


def acceptance_warning(live: Acceptance, recorded: float | None = None) -> str | None:
    """A sentence where greedy decoding says that a drafter is of no use: next to nothing is accepted, or far less than
    its folder `recorded` after training, with the same tree."""
    length = live.mean_acceptance_length
    if isinstance(recorded, int | float) and length < LEAST_SHARE * recorded:
        found = f"but this drafter recorded {recorded:.2f} after its training"
    elif length < LEAST_LENGTH:
        found = "so this drafter makes nothing faster (1.00 is what no drafter has)"
    else:
        return None
    return (
        f"mean_acceptance_length is {length:.2f} over {live.rounds} rounds, {found}; does it belong to this target, "
        "and is the picture of the kind it was trained on?"
    )


class AcceptanceWatch:
    """Judges a drafter by what it earns while it serves: warns once, with an `AcceptanceWarning`, where that is too
    little (`acceptance_warning`) after `JUDGED_ROUNDS` rounds.

    Args:
      recorded: the mean acceptance length that the drafter's folder tells, if the tree is the one it was measured with.
    """

    def __init__(self, recorded: float | None = None) -> None:
        self.recorded = recorded
        self.warning: str | None = None
        self._emitted: np.ndarray | int = 0

    def add(self, answers: Sequence[Acceptance]) -> None:
        """Take in what was accepted in these greedy answers, all of the same tree."""
        if self.warning is not None or not answers:
            return
        self._emitted = self._emitted + np.sum([each.emitted for each in answers], axis=0)
        live = Acceptance.from_histogram(self._emitted)
        if live.rounds >= JUDGED_ROUNDS:
            self.warning = acceptance_warning(live, self.recorded)
        if self.warning is not None:
            warnings.warn(self.warning, AcceptanceWarning, stacklevel=2)
