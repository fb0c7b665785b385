"""Records with nothing to learn from are left out and counted; where there are no others, it is an error."""

import warnings

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.data.answers import AnswerEncoder
from jaxspec.data.pipeline import Pipeline, teaches
from jaxspec.layers import TextConfig
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.processors import TextProcessor
from jaxspec.targets.text import TextTargetConfig

LIMIT = 16
TEXT = TextConfig(97, 32, 64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
# Without pictures and names of tokens.
ENCODER = AnswerEncoder(TextProcessor(None), PromptAdapter(TextTargetConfig(TEXT)))
pytestmark = pytest.mark.filterwarnings("ignore:left out", "ignore:A conversation of")


def record(number: int, prompt: int, answer: int) -> dict:
    """The answer's first token tells the number."""
    answer_ids = np.arange(answer) + number + 1
    return {"id": f"r{number}", "prompt_ids": np.zeros(prompt, int), "answer_ids": answer_ids, "images": []}


def pipeline(sizes, batch_size=2, **options) -> Pipeline:
    """Records with `(prompt, answer)` tokens."""
    source = [record(number, *each) for number, each in enumerate(sizes)]
    return Pipeline(source, ENCODER, sequence_length=LIMIT, batch_size=batch_size, **options)


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 3))
def test_what_teaches_is_a_run_of_answer_tokens_behind_the_first_token(mask, run):
    expected = any(all(mask[start : start + run]) for start in range(1, len(mask) - run + 1))
    assert teaches(np.array(mask, bool), run) == expected


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 24), st.integers(0, 4)), min_size=1, max_size=9),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 4),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
)
def test_every_batch_teaches_or_it_is_an_error(sizes, run, length_buckets, start, rows):
    """Whatever the sizes: each step has a token that counts in one of its processes' shares, only of usable records,
    and is the same whatever was made before it. Without a usable record every step is an error, and so is the check."""
    batch_size, processes = rows
    usable = {n for n, (prompt, answer) in enumerate(sizes) if min(prompt + answer, LIMIT) - prompt >= run}
    options = {"answer_run": run, "length_buckets": length_buckets, "process_count": processes}

    def shares():
        return [pipeline(sizes, batch_size, process_index=index, **options) for index in range(processes)]

    many = shares()
    if not usable:
        for each in (*[one.check for one in many], *[lambda one=one: one[start] for one in many]):
            with pytest.raises(ValueError, match=f"none of {len(sizes)} records can be learned from; the first, rec"):
                each()
        return
    for one in many:
        one.check()
        assert one.shortfall() == {"truncated": 0, "skipped": 0}
    for step in range(start, start + 3):
        batches = [one[step] for one in many]
        jax.tree.map(np.testing.assert_array_equal, batches, [one[step] for one in shares()])
        assert len({batch["loss_mask"].shape for batch in batches}) == 1
        heard = [(batch, row) for batch in batches for row in np.flatnonzero(batch["loss_mask"].any(axis=1))]
        assert heard
        for batch, row in heard:
            mask = batch["loss_mask"][row]
            assert teaches(mask, run)
            number = batch["prompts"].input_ids[row][mask][0] - 1
            assert number in usable and batch["ids"][row] == f"r{number}"


def test_an_answer_that_is_cut_away_is_left_out_by_name_and_counted():
    some = pipeline([(20, 3), (4, 4), (14, 9), (16, 2)], batch_size=4, shuffle=False)
    with pytest.warns(UserWarning) as told:
        batch = some[0]
    assert [str(each.message) for each in told] == [
        "left out, record r0: sequence_length 16 leaves nothing to learn of its answer, which begins behind 20 tokens "
        "(1 so far)",
        "left out, record r3: sequence_length 16 leaves nothing to learn of its answer, which begins behind 16 tokens "
        "(2 so far)",
        "A conversation of 23 tokens was cut to 16; more may follow unannounced.",
    ]
    assert batch["loss_mask"].sum(axis=1).tolist() == [0, 4, 2, 0]
    assert some.shortfall() == {"truncated": 1, "skipped": 2}


def test_a_batch_of_such_records_alone_is_left_out_as_a_whole():
    some = pipeline([(20, 3), (17, 1), (4, 4), (5, 5)], shuffle=False)
    first, second = some[0], some[1]
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first["ids"].tolist() == ["r2", "r3"] and some.skipped == 2


@pytest.mark.parametrize(
    ("sizes", "run", "reason"),
    [
        ([(20, 3), (30, 3), (17, 80)], 1, "leaves nothing to learn of its answer, which begins behind 20 tokens"),
        ([(15, 3), (30, 3), (17, 80)], 2, "leaves nothing to learn of its answer, which begins behind 15 tokens"),
        ([(4, 0)], 1, "it has no answer"),
        ([(4, 1)], 2, "its answer is too short: it takes 2 tokens in a row to learn from"),
        ([(0, 1)], 1, "its answer is too short: it takes 1 token behind a prompt to learn from"),
    ],
)
def test_none_left_is_an_error_with_the_sizes(sizes, run, reason):
    with pytest.raises(ValueError) as caught:
        pipeline(sizes, answer_run=run, shuffle=False).check()
    lengths, prompts = [sum(each) for each in sizes], [each[0] for each in sizes]
    assert str(caught.value).startswith(f"none of {len(sizes)} records can be learned from; the first, record r0: ")
    assert reason in str(caught.value)
    if len(sizes) == 3:
        assert str(caught.value).endswith(
            f"With sequence_length 16: records have {int(np.median(lengths))} tokens typically and {max(lengths)} at "
            f"most, their answers begin behind {int(np.median(prompts))} typically and {min(prompts)} at least"
        )


def test_a_long_search_in_vain_is_given_up():
    """And names only some of what it left out."""
    with warnings.catch_warnings(record=True) as told, pytest.raises(ValueError, match="none of 1000 records in a row"):
        warnings.simplefilter("always")
        pipeline([(20, 3)] * 1500, batch_size=10)[0]
    assert len(told) == 100
