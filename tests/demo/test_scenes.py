"""Scenes are reproducible, drawn where they say, and legible."""

import json

import numpy as np
import pytest

from jaxspec.demo import drafter_path, examples, picture_path
from jaxspec.demo.generation import numbered_scene
from jaxspec.demo.scenes import (
    COLOURS,
    FRAME,
    PLACES,
    SHAPES,
    SceneObject,
    ShapeScene,
    render,
    sample_scene,
    scene_from_json,
)


def test_a_scene_survives_json_and_draws_the_same():
    for seed in range(20):
        scene = sample_scene(np.random.default_rng(seed))
        again = scene_from_json(json.loads(json.dumps(scene.to_json())))
        assert again == scene
        assert render(again).tobytes() == render(scene).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("size", "extent", "least"), [("large", 72, 64), ("small", 42, 37)])
def test_an_object_fills_its_place_in_its_colour(shape, size, extent, least):
    scene = ShapeScene("white", (SceneObject("middle left", "red", shape, size),), ((extent, 0, 0),))
    pixels = np.asarray(render(scene))
    assert pixels.shape == (FRAME, FRAME, 3)
    rows, columns = np.nonzero((pixels != 255).any(-1))
    assert (pixels == COLOURS["red"]).all(-1).sum() > 0.15 * extent**2
    assert max(np.ptp(rows), np.ptp(columns)) + 1 >= least
    assert rows.min() >= FRAME // 3 and rows.max() < 2 * FRAME // 3 and columns.max() < FRAME // 3


def test_objects_stay_in_raster_order_and_bars_have_one_extreme():
    for seed in range(200):
        scene = sample_scene(np.random.default_rng(seed))
        if scene.kind == "shapes":
            places = [PLACES.index(item.place) for item in scene.items]
            assert places == sorted(set(places)) and 3 <= len(places) <= 6
        else:
            values = [bar.value for bar in scene.items]
            assert values.count(max(values)) == 1 and values.count(min(values)) == 1
            assert 3 <= len(values) <= 5 and min(values) >= 1 and max(values) <= 8


def test_examples_are_reproducible_and_splits_differ():
    assert [e.answer for e in examples("test", 5)] == [e.answer for e in examples("test", 5)]
    assert [e.answer for e in examples("test", 5)] != [e.answer for e in examples("train", 5)]
    assert numbered_scene("test", 0) != numbered_scene("test", 0, seed=1)
    assert {e.kind for e in examples("test", 6, kinds=["count", "read"])} <= {"count", "read"}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="split must be one of train"):
        examples("held-out", 1)
    with pytest.raises(ValueError, match="kinds must be among"):
        examples("test", 1, kinds=["poem"])


def test_missing_weights_name_the_command_and_the_picture_is_there():
    with pytest.raises(FileNotFoundError, match="train.py"):
        drafter_path("no_such_method")
    assert picture_path().is_file()
