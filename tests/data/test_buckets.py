"""Batches of similar length: the same records as without, a function of (seed, step), one length for all processes."""

import pickle
import warnings
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.buckets import bucket
from jaxspec.data.conversations import ConversationEncoder
from jaxspec.data.order import WINDOW, Order
from jaxspec.data.pipeline import Pipeline
from jaxspec.targets.registry import family_of
from tests.families import FAMILIES


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5), st.integers(1, 3))
def test_every_epoch_has_every_record_once(count, batch_size, seed, epochs):
    """The batches up to the end of an epoch hold what they hold without buckets, whatever the sizes."""
    lengths = np.random.default_rng(seed).integers(1, 500, count)
    plain = Order(count, batch_size, 400, seed, True)
    sorted_ = Order(count, batch_size, 400, seed, True, lambda index: int(lengths[index]))
    end = -(-epochs * count // batch_size)
    seen = [Counter(int(record) for step in range(end) for record in order[step][0]) for order in (plain, sorted_)]
    assert seen[0] == seen[1] and min(seen[0].values()) >= epochs and len(seen[0]) == count
    for step in range(end):
        records, length = sorted_[step]
        assert length == min(bucket(max(min(int(lengths[record]), 400) for record in records)), 400)
        assert plain[step][1] == 400


def test_lengths_of_a_batch_are_close_and_batches_are_not_in_their_order():
    count, batch_size = 4096, 8
    lengths = np.random.default_rng(0).lognormal(5, 0.8, count).astype(int) + 1
    order = Order(count, batch_size, 2048, 0, True, lambda index: int(lengths[index]))
    batches = [order[step] for step in range(count // batch_size)]
    kept = sum(min(length, 2048) for length in lengths)
    assert sum(length * batch_size for _, length in batches) < 1.35 * kept  # at most a third of a bucket is padding
    first = [length for _, length in batches[:WINDOW]]
    assert first != sorted(first) and {length for _, length in batches[:WINDOW]} != {length for _, length in batches}


def test_without_shuffling_the_order_stays():
    order = Order(10, 3, 400, 0, False, lambda index: 100 * (index % 3) + 1)
    assert [order[step][0].tolist() for step in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]]


def test_any_step_of_a_copy_equals_the_original():
    order = Order(50, 4, 400, 1, True, lengths_of_50)
    steps = [order[step] for step in range(100)]
    for step in (99, 0, 63, 32, 31):
        for left, right in zip(pickle.loads(pickle.dumps(order))[step], steps[step], strict=True):
            np.testing.assert_array_equal(left, right)


def lengths_of_50(index: int) -> int:
    return index * 37 % 390 + 1


# -- batches -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    hf_config, processor = FAMILIES["qwen2_5_vl"]()
    family = family_of(hf_config)
    return ConversationEncoder(processor, family.adapter(family.config_from_hf(hf_config)))


def record(number: int) -> dict:
    words = f"{number} words " + "word " * (number * 7 % 50)
    turns = [{"from": "human", "value": "Say."}, {"from": "gpt", "value": words}]
    return {"id": f"r{number}", "images": [], "conversations": turns}


SOURCE = [record(number) for number in range(24)]


def pipeline(encoder, source=SOURCE, batch_size=4, sequence_length=200, **options) -> Pipeline:
    options = {"length_buckets": True, "seed": 2} | options
    return Pipeline(source, encoder, sequence_length=sequence_length, batch_size=batch_size, **options)


def numbers(encoder, batch) -> list[int]:
    """Which records a batch holds."""
    rows = [row[mask] for row, mask in zip(batch["prompts"].input_ids, batch["loss_mask"], strict=True)]
    return [int(encoder.tokenizer.decode(row).split()[0]) for row in rows]


def test_batches_are_padded_to_a_bucket_and_hold_whole_conversations(encoder):
    batches = [pipeline(encoder)[step] for step in range(6)]
    assert sorted(number for batch in batches for number in numbers(encoder, batch)) == list(range(24))
    widths = set()
    for batch in batches:
        prompts = batch["prompts"]
        assert batch["loss_mask"].shape == prompts.input_ids.shape
        assert prompts.input_ids.shape[1] == min(bucket(int(prompts.lengths.max())), 200)
        widths.add(prompts.input_ids.shape[1])
        for number, length in zip(numbers(encoder, batch), prompts.lengths, strict=True):
            assert length == encoder.length(SOURCE[number])
    assert len(widths) > 1


def test_going_on_at_any_step_equals_never_stopping(encoder):
    whole = [pipeline(encoder)[step] for step in range(10)]
    for start in (0, 3, 7):
        rest = pipeline(encoder).batches(start_step=start)
        for step in range(start, 10):
            jax.tree.map(np.testing.assert_array_equal, whole[step], next(rest))


def test_processes_share_out_each_batch_at_one_length(encoder):
    shares = [pipeline(encoder, process_index=index, process_count=2) for index in range(2)]
    for step in range(8):
        whole, parts = pipeline(encoder)[step], [share[step] for share in shares]
        rows = np.stack([part["prompts"].input_ids for part in parts], 1)
        np.testing.assert_array_equal(rows.reshape(whole["prompts"].input_ids.shape), whole["prompts"].input_ids)


def test_conversations_over_the_limit_are_cut_to_it(encoder):
    short = pipeline(encoder, sequence_length=90)
    with pytest.warns(UserWarning, match="was cut to 90"):
        widths = {short[step]["prompts"].input_ids.shape[1] for step in range(6)}
    assert widths == {64, 90} and short.truncated == sum(encoder.length(each) > 90 for each in SOURCE)


# -- records that cannot be encoded ------------------------------------------------------------------------------------

BROKEN = {**record(5), "images": [b"none"]}
BROKEN["conversations"] = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.mark.parametrize("length_buckets", [False, True])
def test_a_broken_record_is_left_out_by_name_and_changes_no_other_row(encoder, length_buckets):
    source = [BROKEN if number == 5 else each for number, each in enumerate(SOURCE)]
    damaged = pipeline(encoder, source, length_buckets=length_buckets)
    with pytest.warns(UserWarning, match=r"left out, record r5: image 1 cannot be read: .* \(1 so far\)") as caught:
        batches = [damaged[step] for step in range(6)]
    assert len(caught) == 1 and damaged.skipped == 1
    silent = [batch for batch in batches if not batch["loss_mask"].any(axis=1).all()]
    assert len(silent) == 1 and (silent[0]["loss_mask"].any(axis=1)).sum() == 3
    spoken = [row for batch in batches for row in rows_with_loss(encoder, batch)]
    assert sorted(spoken) == [number for number in range(24) if number != 5]
    if not length_buckets:
        for step in range(6):
            plain = pipeline(encoder, length_buckets=False)[step]["prompts"].input_ids
            kept = batches[step]["loss_mask"].any(axis=1)
            np.testing.assert_array_equal(batches[step]["prompts"].input_ids[kept], plain[kept])


def rows_with_loss(encoder, batch) -> list[int]:
    heard = batch["loss_mask"].any(axis=1)
    rows = zip(batch["prompts"].input_ids[heard], batch["loss_mask"][heard], strict=True)
    return [int(encoder.tokenizer.decode(ids[mask]).split()[0]) for ids, mask in rows]


def test_a_set_without_any_good_record_stops(encoder):
    message = "none of 4 records can be learned from; the first, record r5: image 1 cannot be read"
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match=message):
        _ = pipeline(encoder, [BROKEN] * 4)[0]


def test_a_length_that_is_wrong_is_named(encoder):
    class Liar(ConversationEncoder):
        def length(self, record):
            return 1

    liar = Liar(encoder.processor, encoder.adapter)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="tokens, more than the 64 that its length told"):
        warnings.simplefilter("ignore")
        _ = pipeline(liar, [record(7)] * 4)[0]
