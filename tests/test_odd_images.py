"""Odd pictures: what every target makes of them, and that modes and orientations are those of transformers."""

import functools

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from jaxspec.media import open_image
from jaxspec.prompting import encode_prompt
from tests.families import family_target

ORIENTATION = 0x0112


def coloured(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def palette() -> Image.Image:
    image = coloured(20, 12).quantize(16)
    image.info["transparency"] = 3
    return image


def turned(orientation: int) -> Image.Image:
    image = coloured(20, 12)
    image.getexif()[ORIENTATION] = orientation
    return image


MODES = {
    "1": lambda: coloured(20, 12).convert("1"),
    "L": lambda: coloured(20, 12).convert("L"),
    "LA": lambda: coloured(20, 12).convert("LA"),
    "P with transparency": palette,
    "RGBA": lambda: Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 20, 4), np.uint8)),
    "CMYK": lambda: coloured(20, 12).convert("CMYK"),
    "YCbCr": lambda: coloured(20, 12).convert("YCbCr"),
    "HSV": lambda: coloured(20, 12).convert("HSV"),
    "I": lambda: coloured(20, 12).convert("I"),
    "F": lambda: coloured(20, 12).convert("F"),
    **{f"EXIF orientation {value}": functools.partial(turned, value) for value in range(1, 9)},
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_and_orientations_are_those_of_transformers(mode):
    np.testing.assert_array_equal(open_image(MODES[mode]()), load_image(MODES[mode]()))


def test_orientation_of_files(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    coloured(20, 12).save(path, exif=exif)
    for source in (path, path.read_bytes()):
        assert open_image(source).size == (12, 20)


def test_sixteen_bits_keep_their_high_bytes():
    """Pillow, and so transformers, would make everything above 255 white."""
    values = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)
    np.testing.assert_array_equal(np.asarray(open_image(Image.fromarray(values)))[..., 0], values >> 8)


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (2, 200), (200, 1), (3, 3), (127, 61)], ids=str)
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_sizes(family, size):
    target = targets(family)
    encoded = encode_prompt(target, "What is this?", [coloured(*size)])
    (layout,) = encoded.images
    assert layout.tokens == target.config.is_image(encoded.input_ids).sum() > 0
    pixels = target.config.place(encoded.images, encoded.input_ids[None]).pixels
    assert all(np.isfinite(array).all() for array in (pixels.values() if isinstance(pixels, dict) else [pixels]))


@pytest.mark.parametrize("size", [(201, 1), (1, 5000)], ids=str)
def test_too_narrow(size):
    with pytest.raises(
        ValueError, match=f"image 2 has {size[0]} x {size[1]} pixels; one side may be 200 times the other"
    ):
        encode_prompt(targets("gemma3"), "What is this?", [coloured(4, 4), coloured(*size)])


targets = functools.cache(family_target)
