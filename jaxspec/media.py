"""Images as people hand them over (files, bytes, arrays, data: URLs) -> RGB pictures, or one clear sentence."""

import base64
import contextlib
import io
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ImageLike = Any  # PIL.Image.Image, path, bytes, uint8 array [H, W, 3], data: URL
MAX_PIXELS = 64_000_000
"""Images with more pixels are refused from their header, before they are decoded."""
MAX_ASPECT = 200
"""Images with sides further apart are refused: processors would blow them up or shrink them to nothing."""


def open_image(image: ImageLike, name: str = "image 1") -> Image.Image:
    """An RGB picture, turned as its EXIF orientation says; transparency and palettes become colours as in transformers.

    Raises ValueError, naming the image, where it is missing, unreadable, empty, too large or too narrow.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"{name} has dtype {image.dtype}; give uint8")
        if 0 in image.shape:
            raise ValueError(f"{name} is empty: shape {image.shape}")
        if image.ndim not in (2, 3):
            raise ValueError(f"{name} has shape {image.shape}; give [H, W, 3], or [H, W] for greys")
    elif isinstance(image, str) and image.startswith("data:"):
        image = data_url_bytes(image, name)
    elif isinstance(image, str | Path):
        name = named(name, image)
        if not os.path.isfile(image):
            raise ValueError(f"{name} does not exist")
    elif not isinstance(image, Image.Image | bytes):
        raise ValueError(f"{name} has type {type(image).__name__}; give a PIL image, a path, bytes or an array")
    if not isinstance(image, str | Path | bytes):
        with readable(name):
            picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        return rgb(picture, name)
    with readable(name):
        # By its name Pillow would map a TIFF file into memory, with the sides of a turned one swapped.
        file = io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb")  # noqa: SIM115
    with file:
        with readable(name):
            opened = Image.open(file)
        if opened.format == "EPS":
            raise ValueError(f"{name} is an EPS file, a program that Ghostscript would have to run")
        return rgb(opened, name)


def named(what: str, path: str | Path) -> str:
    """An image or video by its path, of which a sentence shows the end where it is long."""
    text = str(path)
    return f"{what} ({text if len(text) <= 200 else '..' + text[-200:]})"


def rgb(image: Image.Image, name: str) -> Image.Image:
    """A picture as `open_image` gives it."""
    width, height = image.size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is empty: {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} x {height} pixels; the limit is {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{name} has {width} x {height} pixels; one side may be {MAX_ASPECT} times the other at most")
    with readable(name):
        image = ImageOps.exif_transpose(image)
        wide = np.asarray(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else None
    if wide is not None:
        image = Image.fromarray(greys(wide, image.mode, name))
    with readable(name):
        return image.convert("RGB")


def greys(values: np.ndarray, mode: str, name: str) -> np.ndarray:
    """Wide greys as uint8 `[H, W]`: Pillow would clip them and leave a white or a black picture.

    Of 16 bits the high ones; mode I holds 8 bits or 16, mode F 0..1 or 0..255. Raises ValueError for other values.
    """
    least, most = values.min(), values.max()
    if mode.startswith("I;16"):
        return (values >> 8).astype(np.uint8)
    if mode == "I":
        if least < 0 or most > 65535:
            raise ValueError(f"{name} has greys from {least} to {most} (mode I); they may lie in 0..255 or 0..65535")
        return (values if most <= 255 else values >> 8).astype(np.uint8)
    if not (least >= 0 and most <= 255):  # nor not a number
        raise ValueError(f"{name} has greys from {least} to {most} (mode F); they may lie in 0..1 or 0..255")
    return (np.rint(255 * values) if most <= 1 else values).astype(np.uint8)


def open_images(images: Sequence[ImageLike]) -> list[Image.Image]:
    """Several, numbered from 1 where one is refused."""
    return [open_image(image, f"image {number}") for number, image in enumerate(images, 1)]


def image_size(image: ImageLike, name: str = "image 1") -> tuple[int, int]:
    """Width and height of the picture that `open_image` gives; of files and bytes from the header. Raises ValueError
    where it cannot."""
    if not isinstance(image, str | Path | bytes):
        return open_image(image, name).size
    with readable(name), Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as header:
        if header.format == "TIFF":  # of which Pillow tells the size as turned already, or not, by its version
            return open_image(image, name).size
        turned = header.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return header.size[::-1] if turned else header.size


@contextlib.contextmanager
def readable(name: str) -> Generator[None]:
    """Whatever Pillow raises over a damaged file becomes a ValueError that names the image."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; the limit is {MAX_PIXELS}") from error
    except UnidentifiedImageError as error:  # whose own sentence shows a file object
        raise ValueError(f"{name} cannot be read: it is no picture of a known format") from error
    except Exception as error:  # its parsers raise OSError, SyntaxError, ValueError, struct.error, IndexError, ..
        raise ValueError(f"{name} cannot be read: {error}") from error


def data_url_bytes(url: str, name: str) -> bytes:
    header, _, payload = url.partition(",")
    if not header.endswith(";base64"):
        raise ValueError(f"{name} is a data: URL that is not base64")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:  # binascii's, or that of a text that is not ASCII
        raise ValueError(f"{name} is not valid base64: {error}") from error
