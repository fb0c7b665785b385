"""The numbers of an answer from its tokens, and when a drafter is found to be of no use."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxspec.metrics import Acceptance, AcceptanceWarning, AcceptanceWatch, acceptance_warning, emitted_per_round


@given(st.lists(st.integers(1, 4), max_size=12), st.integers(0, 3))
def test_rounds_from_tokens(rounds, cut):
    """Rounds of 1 to 4 tokens, the last of each the target's own; the answer may end inside the last round."""
    flags = np.array([token < size - 1 for size in rounds for token in range(size)], bool)
    cut = min(cut, rounds[-1] - 1) if rounds else 0
    left = rounds[:-1] + [rounds[-1] - cut] if rounds else []
    expected = np.bincount(np.array(left, int), minlength=5)[1:]
    assert emitted_per_round(flags[: len(flags) - cut], 4).tolist() == expected.tolist()


def test_sentences():
    def live(length):  # of a chain of nine
        emitted = np.zeros(10, int)
        whole = int(length)
        emitted[whole - 1 : whole + 1] = round(100 * (whole + 1 - length)), round(100 * (length - whole))
        return Acceptance.from_histogram(emitted)

    assert "is 1.70 over 100 rounds, but this drafter recorded 3.00" in acceptance_warning(live(1.7), 3.0)
    assert acceptance_warning(live(1.9), 3.0) is None
    assert "is 1.05 over 100 rounds, so this drafter makes nothing faster" in acceptance_warning(live(1.05))
    assert acceptance_warning(live(1.2)) is None
    assert acceptance_warning(live(1.2), "what a folder of somebody else says") is None
    assert acceptance_warning(Acceptance.from_histogram([0, 0]), 3.0) is None


def test_warns_once_and_not_before_64_rounds():
    watch, poor = AcceptanceWatch(), Acceptance.from_histogram([31, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.add([poor])
        watch.add([])
    assert watch.warning is None
    with pytest.warns(AcceptanceWarning, match="mean_acceptance_length is 1.03 over 64 rounds"):
        watch.add([poor])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.add([poor])
    assert "1.03 over 64" in watch.warning
