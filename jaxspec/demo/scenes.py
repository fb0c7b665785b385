"""What a demo scene is, how one is sampled and how it is drawn.

The embedded model needs pictures whose whole truth is known, so that its answers can be scored object by object, and
which a small vision tower (144 pixels, 24-pixel patches: four to each place) can really read. Two kinds of scene give
that: a few plain shapes on a grid of nine named places, and a bar chart with whole-number values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

FRAME = 288
"""Side of a rendered picture in pixels."""

PLACES = (
    "top left", "top center", "top right",
    "middle left", "center", "middle right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
"""The nine places in raster order: place `p` lies in row `p // 3` and column `p % 3`."""

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = ("small", "large")
COLOURS = {
    "red": (220, 50, 47),
    "green": (46, 160, 67),
    "blue": (38, 98, 217),
    "yellow": (245, 200, 20),
    "purple": (142, 68, 173),
    "orange": (240, 125, 20),
    "black": (35, 35, 40),
}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (216, 218, 222), "cream": (253, 243, 210), "pink": (252, 221, 228)}

MAX_ITEMS = 6
"""Most shapes of a scene; a chart has at most one bar less."""

MAX_VALUE = 8
"""Largest value of a bar; bars hold whole numbers from 1 to this."""

# The two ranges are far apart, so that a size is never in doubt after the picture is halved for the vision tower.
_EXTENTS = {"small": (42, 44, 46), "large": (72, 75, 78)}
_JITTER = 7
_OVERSAMPLING = 4
_CHART_LEFT, _CHART_RIGHT, _BASELINE, _UNIT = 22, 266, 260, 29


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One shape: its place (a name from `PLACES`), colour, shape and size."""

    place: str
    colour: str
    shape: str
    size: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar of a chart: its colour and its value (1..`MAX_VALUE`)."""

    colour: str
    value: int


@dataclasses.dataclass(frozen=True)
class ShapeScene:
    """A few shapes on a grid of nine places.

    Attributes:
      background: a name from `BACKGROUNDS`.
      items: the shapes in raster order.
      drawing: per item (extent, dx, dy), its side and its offset from the middle of its cell in pixels. It changes the
        picture and never the truth.
    """

    kind: Literal["shapes"] = dataclasses.field(default="shapes", init=False)
    background: str
    items: tuple[SceneObject, ...]
    drawing: tuple[tuple[int, int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """The scene as plain JSON values; `scene_from_json` reads it back."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A bar chart.

    Attributes:
      background: a name from `BACKGROUNDS`.
      items: the bars from left to right.
    """

    kind: Literal["chart"] = dataclasses.field(default="chart", init=False)
    background: str
    items: tuple[Bar, ...]

    def to_json(self) -> dict[str, Any]:
        """The scene as plain JSON values, with the same fields as a `ShapeScene`; `scene_from_json` reads it back."""
        return {**dataclasses.asdict(self), "drawing": ()}


Scene: TypeAlias = ShapeScene | Chart
"""Everything that is needed to draw a picture and to talk about it."""


def scene_from_json(fields: dict[str, Any]) -> Scene:
    """The scene that `to_json` wrote."""
    if fields["kind"] == "chart":
        return Chart(fields["background"], tuple(Bar(**entry) for entry in fields["items"]))
    return ShapeScene(
        fields["background"],
        tuple(SceneObject(**entry) for entry in fields["items"]),
        tuple((extent, dx, dy) for extent, dx, dy in fields["drawing"]),
    )


def sample_scene(rng: np.random.Generator, chart_share: float = 0.3) -> Scene:
    """Draws a random scene: a chart with probability `chart_share`, else shapes."""
    return _sample_chart(rng) if rng.random() < chart_share else _sample_shapes(rng)


def render(scene: Scene) -> Image.Image:
    """Draws `scene` as an RGB picture of `FRAME` x `FRAME` pixels."""
    image = Image.new("RGB", (FRAME, FRAME), BACKGROUNDS[scene.background])
    if isinstance(scene, ShapeScene):
        for item, (extent, dx, dy) in zip(scene.items, scene.drawing, strict=True):
            row, column = divmod(PLACES.index(item.place), 3)
            left = round((column + 0.5) * FRAME / 3) + dx - extent // 2
            top = round((row + 0.5) * FRAME / 3) + dy - extent // 2
            image.paste(COLOURS[item.colour], (left, top), _mask(item.shape, extent))
    else:
        _draw_chart(image, scene)
    return image


def patch_labels(scene: Scene, side: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """What each of `side` x `side` patches belongs to, and how many classes each kind of label has.

    int32 [side * side] each: `colour`, `shape`, `size` and `value` of the object whose cell (or the bar whose slot) the
    middle of the patch lies in, 0 for none; `background` and `count` are the scene's.
    """
    classes = {
        "colour": len(COLOURS) + 1,
        "shape": len(SHAPES) + 2,  # a bar is one more shape
        "size": len(SIZES) + 1,
        "value": MAX_VALUE + 1,
        "background": len(BACKGROUNDS),
        "count": MAX_ITEMS + 1,
    }
    labels = {name: np.zeros((side, side), np.int32) for name in classes}
    labels["background"][:] = tuple(BACKGROUNDS).index(scene.background)
    labels["count"][:] = len(scene.items)
    middles = (np.arange(side) + 0.5) * FRAME / side
    rows, columns = np.meshgrid(middles, middles, indexing="ij")
    for index, item in enumerate(scene.items):
        if isinstance(item, SceneObject):
            inside = (rows * 3 // FRAME) * 3 + columns * 3 // FRAME == PLACES.index(item.place)
            labels["shape"][inside] = SHAPES.index(item.shape) + 1
            labels["size"][inside] = SIZES.index(item.size) + 1
        else:
            inside = (columns - _CHART_LEFT) * len(scene.items) // (_CHART_RIGHT - _CHART_LEFT) == index
            labels["shape"][inside] = len(SHAPES) + 1
            labels["value"][inside] = item.value
        labels["colour"][inside] = tuple(COLOURS).index(item.colour) + 1
    return {name: label.reshape(-1) for name, label in labels.items()}, classes


def _sample_shapes(rng: np.random.Generator) -> ShapeScene:
    count = int(rng.integers(3, MAX_ITEMS + 1))
    places = sorted(rng.choice(len(PLACES), size=count, replace=False).tolist())
    colours, items, drawing = tuple(COLOURS), [], []
    for place in places:
        size = SIZES[rng.integers(len(SIZES))]
        colour, shape = colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))]
        items.append(SceneObject(PLACES[place], colour, shape, size))
        dx, dy = rng.integers(-_JITTER, _JITTER + 1, size=2).tolist()
        drawing.append((int(rng.choice(_EXTENTS[size])), dx, dy))
    return ShapeScene(_sample_background(rng), tuple(items), tuple(drawing))


def _sample_chart(rng: np.random.Generator) -> Chart:
    count = int(rng.integers(3, 6))
    colours = rng.permutation(tuple(COLOURS))[:count].tolist()
    values = rng.integers(1, MAX_VALUE + 1, size=count).tolist()
    # "Which bar is tallest" and "which is shortest" must have one answer.
    while values.count(max(values)) > 1 or values.count(min(values)) > 1:
        values = rng.integers(1, MAX_VALUE + 1, size=count).tolist()
    return Chart(_sample_background(rng), tuple(map(Bar, colours, values)))


def _sample_background(rng: np.random.Generator) -> str:
    return tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]


def _draw_chart(image: Image.Image, scene: Chart) -> None:
    # Every edge lies on a whole pixel, so a chart needs no antialiasing.
    draw = ImageDraw.Draw(image)
    grid = tuple(round(0.88 * channel) for channel in BACKGROUNDS[scene.background])
    for value in range(1, MAX_VALUE + 1):
        y = _BASELINE - value * _UNIT
        draw.line((_CHART_LEFT, y, _CHART_RIGHT, y), fill=grid, width=1)
    slot = (_CHART_RIGHT - _CHART_LEFT) / len(scene.items)
    for index, bar in enumerate(scene.items):
        left = round(_CHART_LEFT + (index + 0.17) * slot)
        right = round(_CHART_LEFT + (index + 0.83) * slot)
        draw.rectangle((left, _BASELINE - bar.value * _UNIT, right, _BASELINE), fill=COLOURS[bar.colour])
    draw.line((_CHART_LEFT - 6, _BASELINE + 1, _CHART_RIGHT + 6, _BASELINE + 1), fill=(70, 70, 75), width=3)


@functools.cache
def _mask(shape: str, extent: int) -> Image.Image:
    """Antialiased coverage of one shape, `extent` x `extent` pixels; there are only a few, so each is drawn once."""
    side = extent * _OVERSAMPLING
    mask = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(mask)
    end = side - 1
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, end, end), fill=255)
        hole = round(0.24 * side)
        draw.ellipse((hole, hole, end - hole, end - hole), fill=0)
    elif shape == "square":
        inset = round(0.04 * side)
        draw.rectangle((inset, inset, end - inset, end - inset), fill=255)
    elif shape == "triangle":
        draw.polygon(((end / 2, 0), (end, 0.94 * end), (0, 0.94 * end)), fill=255)
    elif shape == "star":
        draw.polygon(_star_points(side), fill=255)
    elif shape == "cross":
        arm = round(0.33 * side)
        draw.rectangle((arm, 0, end - arm, end), fill=255)
        draw.rectangle((0, arm, end, end - arm), fill=255)
    else:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}.")
    return mask.resize((extent, extent), Image.Resampling.BOX)


def _star_points(side: int) -> list[tuple[float, float]]:
    points = []
    for corner in range(10):
        radius = side * (0.52 if corner % 2 == 0 else 0.22)
        angle = math.pi * (corner / 5 - 0.5)
        points.append((side / 2 + radius * math.cos(angle), 0.52 * side + radius * math.sin(angle)))
    return points
