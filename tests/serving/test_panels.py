"""What the page says of answers, without a browser."""

import dataclasses

import numpy as np
import pytest

from jaxspec.generator import Piece, Result
from jaxspec.metrics import GenerationStats, emitted_per_round
from jaxspec.serving.panels import Panel, beside, sentence
from jaxspec.serving.requests import Served

TEXT = "<b>ab"


def panel(tokens=(1, 2, 3, 4, 5), reason="stop", seconds=2.0, drafting=True, error=None) -> Panel:
    """An answer whose second and third token came from the draft, in two pieces."""
    made = Panel("<i>title</i>", drafting, 3)
    ids, accepted = np.array(tokens, np.int32), np.array([0, 1, 1, 0, 0], bool) & drafting
    ends = np.arange(1, 6, dtype=np.int32)
    stats = GenerationStats.of(emitted_per_round(accepted[1:], 4), generated_tokens=5)
    made.add(Piece(TEXT[:1], ids[:1], accepted[:1], ends[:1]), None)
    result = Result(ids, accepted, TEXT, reason, stats, ends, error)
    made.add(Piece(TEXT[1:], ids[1:], accepted[1:], ends[1:], result), Served(0.0, 0.5, 0.5 + seconds, 0))
    return made


def test_numbers_are_those_of_the_engine():
    shown = panel().html()
    for name, value in {
        "decode tokens/s": "2",  # four tokens after the first, in two seconds
        "tokens": "5",
        "time to first token, ms": "500",
        "mean acceptance length (with bonus)": "2.00",  # rounds of three and of one
        "mean accepted draft tokens (without)": "1.00",
    }.items():
        assert f"<dt>{name}</dt><dd>{value}</dd>" in shown
    assert "mean accept" not in panel(drafting=False).html()


def test_live_numbers_become_those_of_the_end():
    made = panel()
    live = Panel("live", True, 3)
    live.colours, live.first = made.colours, (0.0, 1)
    assert live.acceptance.mean_acceptance_length == made.acceptance.mean_acceptance_length
    assert "–" in Panel("nothing yet", True, 3).html()


def test_text_of_titles_answers_and_errors_is_escaped():
    shown = beside([panel(reason="error", error="<u>no</u>")]) + sentence("it is <s>")
    assert "<i>" not in shown and "<u>" not in shown and "<s>" not in shown and "<b>" not in shown
    assert "&lt;u&gt;no" in shown and "It is &lt;s&gt;." in shown


def test_two_complete_answers_are_compared():
    shown = beside([panel(), panel(seconds=4.0, drafting=False)])
    assert "<strong>Identical:</strong> both answers have the same 5 token ids." in shown
    assert "<strong>Speed-up 2.00</strong>" in shown


@pytest.mark.parametrize(("other", "place"), [((1, 2, 9, 4, 5), 2), ((1, 2, 3, 4), 4)])
def test_a_difference_is_told_with_its_place(other, place):
    theirs = panel(drafting=False)
    theirs.result = dataclasses.replace(theirs.result, tokens=np.array(other, np.int32))
    assert f"<strong>Not identical:</strong> the answers first differ at token {place}" in beside([panel(), theirs])


@pytest.mark.parametrize("reason", ["cancelled", "error"])
def test_an_answer_that_did_not_end_by_itself_is_compared_with_nothing(reason):
    shown = beside([panel(reason=reason), panel(drafting=False)])
    assert "dentical" not in shown and "Speed-up" not in shown
