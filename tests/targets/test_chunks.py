"""Prompts cut into chunks on the host: nothing is lost, no image is cut where it must not be, sizes are few."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxspec.buckets import chunk_size, coarse_bucket
from jaxspec.layers import TextConfig
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.chunks import cuts, images_of, position_offset, steps_of
from jaxspec.targets.contract import TargetConfig
from jaxspec.targets.images import ImageLayout
from jaxspec.targets.prompts import EncodedPrompt

MARK = 99


@dataclasses.dataclass(frozen=True)
class Config(TargetConfig):
    text: TextConfig = TextConfig(100, 8, 8, 1, 1, 1, 8)
    whole: bool = False

    @property
    def reads_images_whole(self) -> bool:
        return self.whole


class Adapter(PromptAdapter[ImageLayout]):
    @property
    def image_token_ids(self) -> tuple[int, ...]:
        return (MARK,)

    @property
    def shared_features(self) -> int:
        return 1


def image(tokens: int, name: int) -> ImageLayout:
    """Its last token is the shared feature, as LLaVA-NeXT's newline."""
    return ImageLayout(np.full((1, 2), name, np.float32), np.array([*range(tokens - 1), -1]), tokens - 1)


@st.composite
def prompts(draw) -> EncodedPrompt:
    ids, images = [], []
    for kind in draw(st.lists(st.sampled_from(["text", "image"]), min_size=1, max_size=5)):
        count = draw(st.integers(1, 40))
        if kind == "image":
            images.append(image(count, draw(st.integers(0, 3)) * 100 + count))
        ids += [MARK] * count if kind == "image" else draw(st.lists(st.integers(0, 50), min_size=count, max_size=count))
    return EncodedPrompt(np.array(ids, np.int32), images)


@given(batch=st.lists(prompts(), min_size=1, max_size=3), limit=st.sampled_from([16, 32, 64]), whole=st.booleans())
@settings(deadline=None, max_examples=60)
def test_chunks_hold_every_token_once(batch, limit, whole):
    adapter = Adapter(Config(whole=whole))
    layouts = images_of(batch)
    tables = {key: np.concatenate([[-1], np.arange(layout.table_size)]) for key, layout in layouts.items()}
    read = [[] for _ in batch]
    for step in steps_of(adapter, batch, limit, 512):
        chunk = step.chunk
        features = np.full(chunk.input_ids.shape, -2)
        for key, index in step.placements.items():
            features = np.where(index >= 0, tables[key][np.maximum(index, 0)], features)
        for row, count in enumerate(chunk.count):
            assert (chunk.image_ids[row, count:] == -1).all() and (features[row, count:] == -2).all()
            parts = (chunk.input_ids[row, :count], chunk.image_ids[row, :count], features[row, :count])
            read[row] += list(zip(*parts, strict=True))
            if whole and count > 0:  # an image ends with the chunk that it begins in
                here, rest = chunk.image_ids[row, :count], len(read[row])
                last = here[-1]
                following = batch[row].input_ids[rest] if rest < len(batch[row].input_ids) else None
                if last >= 0 and following == MARK:
                    assert (here == last).sum() == batch[row].images[last].tokens
    for prompt, got in zip(batch, read, strict=True):
        assert [int(token) for token, _, _ in got] == prompt.input_ids.tolist()
        expected = [value for layout in prompt.images for value in layout.index.tolist()]
        assert [int(value) for _, number, value in got if number >= 0] == expected
        assert all(value == -2 for _, number, value in got if number < 0)


@given(prompt=prompts(), start=st.integers(0, 30), limit=st.sampled_from([8, 16]))
@settings(deadline=None, max_examples=60)
def test_pieces_go_on_from_any_token(prompt, start, limit):
    ids = np.full(len(prompt.input_ids), -1)
    pieces = cuts(ids, min(start, len(ids) - 1), limit, False)
    assert pieces[0][0] == min(start, len(ids) - 1) and pieces[-1][1] == len(ids)
    assert all(before[1] == after[0] for before, after in zip(pieces, pieces[1:], strict=False))
    assert all(0 < stop - first <= limit for first, stop in pieces)


def test_an_image_longer_than_a_chunk_is_read_at_once_where_it_must_be():
    ids = np.array([-1] * 10 + [0] * 50 + [-1] * 5)
    assert cuts(ids, 0, 16, True) == [(0, 10), (10, 60), (60, 65)]
    assert max(stop - first for first, stop in cuts(ids, 0, 16, False)) == 16


def test_sizes_are_few():
    assert {chunk_size(size, 512, alone=True) for size in range(1, 513)} == {64, 96, 128, 192, 256, 384, 512}
    assert {chunk_size(size, 512, alone=False) for size in range(1, 513)} == {64, 256, 512}
    assert chunk_size(600, 512, alone=False) >= 600  # an image that is longer than a chunk
    sizes = [coarse_bucket(size) for size in range(1, 4097)]
    assert sizes == sorted(sizes) and all(size >= wanted for wanted, size in enumerate(sizes, 1))
    assert {size for size in sizes if size > 512} == {1024, 2048, 4096}


def test_equal_pictures_have_one_key():
    first, again, other = image(5, 1), image(5, 1), image(5, 2)
    assert first.key == again.key != other.key
    assert list(images_of([EncodedPrompt(np.full(10, MARK), [first, again])])) == [first.key]
    same_numbers = ImageLayout(first.pixels.reshape(2, 1), first.index, first.table_size)
    assert same_numbers.key != first.key


def test_positions_of_what_follows():
    assert position_offset(EncodedPrompt(np.arange(4), [])) == 0
    positions = np.array([[0, 1, 1, 1, 2], [0, 1, 1, 2, 3], [0, 1, 2, 1, 3]])
    assert position_offset(EncodedPrompt(np.arange(5), [], positions)) == -1


@pytest.mark.parametrize("start", [0, 3])
def test_one_short_prompt_is_one_chunk_of_its_own_size(start):
    steps = steps_of(Adapter(Config()), [EncodedPrompt(np.arange(50, dtype=np.int32), [])], 512, 256, [start])
    assert [step.chunk.input_ids.shape for step in steps] == [(1, 64)]
    assert steps[0].chunk.count.tolist() == [50 - start]
