"""Odd pictures: what every target makes of them, and that modes and orientations are those of transformers."""

import functools
import gc

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from jaxspec.media import image_size, open_image
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


GREYS = np.linspace(0, 65535, 240).astype(np.uint16).reshape(12, 20)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N", "I"])
def test_wide_greys_keep_their_high_bytes(mode):
    order = ">" if mode == "I;16B" else "="
    if mode == "I":
        image = Image.fromarray(GREYS.astype(np.int32))
    else:
        image = Image.frombytes(mode, (20, 12), GREYS.astype(f"{order}u2").tobytes())
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(open_image(image)), np.repeat((GREYS >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_files_of_wide_greys(kind, tmp_path):
    path = tmp_path / "depth"
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(GREYS).save(path, kind, exif=exif)
    for source in (path, path.read_bytes()):
        np.testing.assert_array_equal(np.asarray(open_image(source))[..., 0], np.rot90(GREYS >> 8, -1))


@pytest.mark.parametrize(("scale", "most"), [(1.0, 1.0), (255.0, 255.0), (1.0, 0.5)], ids=str)
def test_real_greys(scale, most, tmp_path):
    """From 0 to 1, or from 0 to 255."""
    greys = np.linspace(0, most, 240, dtype=np.float32).reshape(12, 20)
    picture = Image.fromarray(greys)
    picture.save(tmp_path / "depth.tiff")
    expected = np.floor(greys) if scale == 255 else np.rint(255 * greys)
    for source in (picture, tmp_path / "depth.tiff"):
        np.testing.assert_array_equal(np.asarray(open_image(source))[..., 0], expected)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.array([[0, 65536]], np.int32), r"greys from 0 to 65536 \(mode I\); they may lie in 0..255 or 0..65535"),
        (np.array([[-1, 9]], np.int32), "greys from -1 to 9"),
        (np.array([[0, 255.5]], np.float32), r"greys from 0.0 to 255.5 \(mode F\); they may lie in 0..1 or 0..255"),
        (np.array([[-0.1, 1]], np.float32), "greys from -0.1"),
        (np.array([[np.nan, 1]], np.float32), "greys from nan to nan"),
        (np.array([[0, np.inf]], np.float32), "greys from 0.0 to inf"),
    ],
)
def test_greys_out_of_range(values, sentence):
    with pytest.raises(ValueError, match=f"image 1 has {sentence}"):
        open_image(Image.fromarray(values))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_files_are_closed(kind, tmp_path):
    path = tmp_path / "picture"
    coloured(20, 12).save(path, kind)
    opened = open_image(path)
    image_size(path)
    path.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="cannot be read"):
        open_image(path)
    gc.collect()  # files left open warn here
    assert opened.size == (20, 12) and np.asarray(opened).any()


def test_programs_are_no_pictures(tmp_path):
    coloured(20, 12).save(tmp_path / "picture.eps")
    with pytest.raises(ValueError, match="is an EPS file, a program that Ghostscript would have to run"):
        open_image(tmp_path / "picture.eps")


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (2, 200), (200, 1), (3, 3), (127, 61)], ids=str)
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_sizes(family, size):
    target = targets(family)
    encoded = encode_prompt(target, "What is this?", [coloured(*size)])
    (layout,) = encoded.images
    assert layout.tokens == target.adapter.is_image(encoded.input_ids).sum() > 0
    pixels = target.adapter.place(encoded.images, encoded.input_ids[None]).pixels
    assert all(np.isfinite(array).all() for array in (pixels.values() if isinstance(pixels, dict) else [pixels]))


@pytest.mark.parametrize("size", [(201, 1), (1, 5000)], ids=str)
def test_too_narrow(size):
    with pytest.raises(
        ValueError, match=f"image 2 has {size[0]} x {size[1]} pixels; one side may be 200 times the other"
    ):
        encode_prompt(targets("gemma3"), "What is this?", [coloured(4, 4), coloured(*size)])


targets = functools.cache(family_target)
