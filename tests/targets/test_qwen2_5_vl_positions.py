"""Qwen2.5-VL's positions in time, height and width, against values written out by hand.

As trained (transformers 4.49, vLLM): what follows an image or a video stands at the largest position of any axis plus
one. Newer transformers (seen in 5.24) looks at height and width only: the text after a long video gets the positions of
its frames.
"""

import numpy as np
import pytest

from jaxspec.targets.chunks import position_offset
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.qwen2_5_vl import Qwen2_5VLConfig, QwenVisionConfig
from jaxspec.targets.qwen2_5_vl_adapter import Qwen2_5VLAdapter, frame_windows
from tests.families import family_target

TEXT, IMAGE, VIDEO = 5, 1, 2


def adapter(tokens_per_second: float = 2.0) -> Qwen2_5VLAdapter:
    vision = QwenVisionConfig(8, 8, 1, 1, 8, 14, 2, 2, 112, (), tokens_per_second=tokens_per_second)
    return Qwen2_5VLAdapter(Qwen2_5VLConfig(None, vision, image_token_id=IMAGE, video_token_id=VIDEO))


def positions(pieces, tokens_per_second: float = 2.0) -> list[list[int]]:
    """Of pieces: a number is that many text tokens, (t, h, w) an image and (t, h, w, seconds) a video, in tokens."""
    ours, ids, layouts = adapter(tokens_per_second), [], []
    vision = ours.config.vision
    for piece in pieces:
        if isinstance(piece, int):
            ids += [TEXT] * piece
            continue
        frames, height, width, *seconds = piece
        patches = np.zeros((frames * 4 * height * width, 0), np.float32)
        layouts.append(frame_windows(vision, patches, (frames, 2 * height, 2 * width), *(seconds or [None])))
        ids += [VIDEO if seconds else IMAGE] * (frames * height * width)
    return ours.position_ids(np.array(ids), layouts).tolist()


@pytest.mark.parametrize(
    ("pieces", "time", "height", "width"),
    [
        # An image of 2 x 3 tokens at position 2; the text goes on behind its longer side.
        ([2, (1, 2, 3), 2], [0, 1, *[2] * 6, 5, 6], [0, 1, 2, 2, 2, 3, 3, 3, 5, 6], [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]),
        # Four grids of 1 x 2 tokens, 1.5 seconds each at 2 tokens a second: time 0, 3, 6, 9 outgrows both sides.
        (
            [1, (4, 1, 2, 1.5), 2],
            [0, 1, 1, 4, 4, 7, 7, 10, 10, 11, 12],
            [0, *[1] * 8, 11, 12],
            [0, *[1, 2] * 4, 11, 12],
        ),
        # A third of a second: 0, 2/3, 4/3, 2 are cut to 0, 0, 1, 2; the width is longer.
        ([(4, 1, 4, 1 / 3), 1], [*[0] * 8, *[1] * 4, *[2] * 4, 4], [*[0] * 16, 4], [*[0, 1, 2, 3] * 4, 4]),
        # Two videos, the second right behind the first, then an image.
        (
            [1, (3, 1, 1, 1.0), (2, 1, 1, 2.5), 1, (1, 1, 2), 1],
            [0, 1, 3, 5, 6, 11, 12, 13, 13, 15],
            [0, 1, 1, 1, 6, 6, 12, 13, 13, 15],
            [0, 1, 1, 1, 6, 6, 12, 13, 14, 15],
        ),
        # An image right behind a long video.
        ([(3, 1, 1, 2.0), (1, 1, 2), 1], [0, 4, 8, 9, 9, 11], [0, 0, 0, 9, 9, 11], [0, 0, 0, 9, 10, 11]),
    ],
    ids=["image", "long video", "fractions of a second", "two videos", "image behind a video"],
)
def test_positions(pieces, time, height, width):
    assert positions(pieces) == [time, height, width]


def test_time_is_multiplied_as_in_training():
    """In float32, frame by frame: 0.7 seconds are a little less than 0.7 there, and 10 of them are 7."""
    assert positions([(11, 1, 1, 0.7)], 1.0)[0] == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 7]


def test_decoding_goes_on_behind_the_largest_position():
    target = family_target("qwen2_5_vl")
    ours = target.adapter
    ids = np.array([TEXT, *[ours.video_token_id] * 4, TEXT])
    pixels = np.zeros((16, ours.config.vision.patch_pixels), np.float32)
    layout = frame_windows(ours.config.vision, pixels, (4, 2, 2), 3.0)
    assert layout.tokens == 4
    prompt = EncodedPrompt.of(ours, ids, [layout])
    assert prompt.position_ids[0].tolist() == [0, 1, 13, 25, 37, 38]
    plain = EncodedPrompt(np.array([TEXT] * 3), [])
    assert [position_offset(each) for each in (prompt, plain)] == [39 - 6, 0]
