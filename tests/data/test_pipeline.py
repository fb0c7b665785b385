"""Batches are a function of (seed, step), whatever came before and however many processes share them."""

import itertools

import jax
import numpy as np
import pytest

from jaxspec.data.conversations import ConversationEncoder
from jaxspec.data.pipeline import Pipeline
from jaxspec.data.scenes import load_scenes
from jaxspec.demo.generation import conversation_of, numbered_scene
from jaxspec.demo.processor import build_processor
from jaxspec.targets.llava import LlavaAdapter, LlavaConfig
from tests.helpers import config_for


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_scenes(tmp_path_factory.mktemp("data"), "train", train_size=20, validation_size=2, test_size=2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    processor = build_processor(tmp_path_factory.mktemp("processor"), scenes=1500)
    return ConversationEncoder(processor, LlavaAdapter(LlavaConfig.from_hf(config_for(processor))))


def _take(batches, n):
    return list(itertools.islice(batches, n))


def _same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_records_depend_on_split_and_index_alone(source):
    assert sorted(record["index"] for record in source) == list(range(20))
    for record in source:
        scene, turns = numbered_scene("train", record["index"])
        assert record["conversations"] == conversation_of(turns)
        assert record["images"][0].startswith(b"\x89PNG")
        assert len(record["scene"]["items"]) == len(scene.items)


def test_shapes_and_padding(source, encoder):
    batch = Pipeline(source, encoder, sequence_length=448, batch_size=4)[0]
    prompts, mask = batch["prompts"], batch["loss_mask"]
    images = prompts.images
    shapes = [(value.shape, value.dtype) for value in (prompts.input_ids, images.index, images.pixels, mask)]
    assert shapes == [((4, 448), np.int32)] * 2 + [((4, 3, 144, 144), np.float32), ((4, 448), bool)]
    assert prompts.lengths.dtype == np.int32 and prompts.max_images == 1
    padding = np.arange(448) >= prompts.lengths[:, None]
    assert not mask[padding].any() and (images.ids[padding] == -1).all()
    assert ((prompts.input_ids == encoder.adapter.config.image_token_id) == (images.ids == 0)).all()


def test_pixels_stand_at_the_tokens_of_their_row(source, encoder):
    """Row i of a batch reads row i's picture, whatever pictures stand before it."""
    batch = Pipeline(source, encoder, sequence_length=448, batch_size=3, shuffle=False)[0]["prompts"]
    tokens = encoder.adapter.config.tokens_per_image
    for row in range(3):
        alone = encoder.encode_record(source[row]).prompt.images[0].pixels[0]
        first = batch.images.index[row][batch.images.ids[row] == 0]
        np.testing.assert_array_equal(first, row * tokens + np.arange(tokens))
        np.testing.assert_array_equal(batch.images.pixels[row], alone)


def test_going_on_at_any_step_equals_never_stopping(source, encoder):
    pipeline = Pipeline(source, encoder, sequence_length=448, batch_size=6, seed=3)
    whole = _take(pipeline.batches(), 9)
    for step in (0, 2, 5):
        for left, right in zip(whole[step:], _take(pipeline.batches(start_step=step), 9 - step), strict=True):
            _same(left, right)
    _same(whole[7], pipeline[7])


def test_batches_name_their_records(source, encoder):
    class Named:
        """The source, with names."""

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            return {**source[index], "id": f"scene-{index}"}

    for records, expected in ((source, "3"), (Named(), "scene-3")):
        pipeline = Pipeline(records, encoder, sequence_length=448, batch_size=2, shuffle=False)
        (batch,) = _take(pipeline.batches(start_step=1), 1)
        assert batch["ids"][1] == expected and len(batch["ids"]) == 2


def test_every_epoch_has_all_records_in_its_own_order(source, encoder):
    pipeline = Pipeline(source, encoder, sequence_length=448, batch_size=10, seed=3)
    rows = np.concatenate([pipeline[step]["prompts"].input_ids for step in range(4)])
    first, second = ([tuple(row) for row in rows[start : start + 20]] for start in (0, 20))
    assert len(set(first)) == 20 and set(first) == set(second) and first != second
    other = Pipeline(source, encoder, sequence_length=448, batch_size=10, seed=4)[0]["prompts"].input_ids
    assert (other != rows[:10]).any()


def test_processes_share_out_each_batch(source, encoder):
    whole = Pipeline(source, encoder, sequence_length=448, batch_size=4)[3]["prompts"].input_ids
    shares = [
        Pipeline(source, encoder, sequence_length=448, batch_size=4, process_index=i, process_count=2)[3][
            "prompts"
        ].input_ids
        for i in range(2)
    ]
    np.testing.assert_array_equal(np.stack(shares, 1).reshape(whole.shape), whole)


def test_cutting_warns_once_and_is_counted(source, encoder):
    pipeline = Pipeline(source, encoder, sequence_length=120, batch_size=4, shuffle=False)
    with pytest.warns(UserWarning, match="was cut to 120") as caught:
        _ = pipeline[0], pipeline[1]
    assert len(caught) == 1 and pipeline.truncated == 8


def test_bad_sizes_are_named(source, encoder):
    with pytest.raises(ValueError, match="multiple of process_count 2; got 3"):
        Pipeline(source, encoder, sequence_length=448, batch_size=3, process_count=2)
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="cuts image tokens"):
        _ = Pipeline(source, encoder, sequence_length=24, batch_size=2)[0]
