"""What a drafter in training would earn: drafting for real, by the code that serves, on held-out questions.

The cheap figure of every evaluation (`agreement_k`, teacher-forced) says little about trees and about a drafter that
reads its own mistakes; this one is the number that decoding will show.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jaxspec.generator import Generator
from jaxspec.metrics import Acceptance, pooled
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.prompts import EncodedPrompt


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a task measures acceptance while it trains."""

    measure: Callable[[Any], dict[float, Acceptance]]
    """`measure(params)` by temperature; at least temperature 0."""
    every: int = 0
    """Steps from one measurement to the next; 0 is only after the last step."""
    export: Literal["best", "last"] = "best"
    """Which parameters are exported: those with the highest mean acceptance length at temperature 0, or the last."""


def figures(accepted: Acceptance) -> dict[str, Any]:
    """The numbers of `Acceptance` that logs and drafter folders tell; JSON-ready: None where nothing was counted."""
    names = ("mean_acceptance_length", "mean_accepted_draft_tokens", "acceptance_at_position", "conditional_acceptance")
    return {"rounds": accepted.rounds} | {name: without_nan(getattr(accepted, name)) for name in names}


def summary(step: int, accepted: dict[float, Acceptance]) -> dict[str, Any]:
    """What a drafter folder says of its parameters: those of `step`, measured greedily and perhaps when sampling."""
    sampled = {f"at_temperature_{t:g}": figures(each) for t, each in accepted.items() if t}
    return {"step": step, **figures(accepted[0.0]), **sampled}


def without_nan(value: float | tuple[float, ...]) -> float | list[float | None] | None:
    if isinstance(value, tuple):
        return [None if math.isnan(each) else each for each in value]
    return None if math.isnan(value) else value


def measured_acceptance(
    generator: Generator,
    prompts: Sequence[EncodedPrompt],
    limit: int,
    temperature: float = 0.0,
    rows: int | None = None,
) -> Acceptance:
    """What the drafter's drafts earn on `prompts`, answered with up to `limit` tokens, over all rounds of all of them.
    A prompt's place is its seed; `rows` prompts are answered at a time, all of them by default."""
    sampling = [SamplingParams(temperature=temperature, seed=seed) for seed in range(len(prompts))]
    rows, stats = rows or len(prompts), []
    for start in range(0, len(prompts), rows):
        here = slice(start, start + rows)
        stats += [result.checked().stats for result in generator.generate_encoded(prompts[here], sampling[here], limit)]
    return pooled(stats)
