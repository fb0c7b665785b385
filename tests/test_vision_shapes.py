"""Images and videos of any size land in few compiled shapes (docs/TARGETS.md gives the bounds)."""

import jax
import numpy as np
import pytest
from PIL import Image

from jaxspec import Generator
from jaxspec.buckets import round_up
from jaxspec.checkpoints.names import abstract
from jaxspec.prompting import encode_prompt
from jaxspec.targets.qwen2_5_vl import Qwen2_5VLConfig, QwenVisionConfig, QwenVisionTower
from jaxspec.targets.qwen2_5_vl_adapter import Qwen2_5VLAdapter, frame_windows
from tests.families import family_target


def picture(rng) -> Image.Image:
    width, height = np.exp(rng.uniform(np.log(8), np.log(160), 2)).astype(int).tolist()
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(("family", "most"), [("llava_next", 2), ("qwen2_5_vl", 12), ("gemma3", 1)])
def test_shapes_of_one_image(family, most):
    """The towers' inputs for 60 images of random sizes."""
    target, rng, shapes, sizes = family_target(family), np.random.default_rng(0), set(), set()
    for _ in range(60):
        image = picture(rng)
        encoded = encode_prompt(target, "What is this?", [image])
        placed = target.adapter.place(encoded.images, encoded.input_ids[None])
        shapes.add(str(jax.tree.map(np.shape, placed.pixels)))
        sizes.add(image.size)
    assert len(sizes) > 50 and len(shapes) <= most, sorted(shapes)


@pytest.mark.parametrize("family", ("llava_next", "qwen2_5_vl", "gemma3"))
def test_no_program_for_another_size(family):
    generator, rng = Generator(family_target(family), max_length=256), np.random.default_rng(1)
    for size in ((44, 61), (47, 60), (45, 58)):
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        generator.generate("What is this?", [image], max_new_tokens=2)
    assert sorted(generator.programs.traced) == ["begin", "decode", "encode_image", "no_images", "place", "read_chunk"]


def test_shapes_of_published_qwen():
    """Every image that Qwen2.5-VL-7B's processor can make of up to 1,280 tokens, and of up to its 16,384."""
    vision = QwenVisionConfig(8, 8, 1, 1, 8, 14, 2, 2, 112, ())
    adapter = Qwen2_5VLAdapter(Qwen2_5VLConfig(None, vision, image_token_id=1, video_token_id=2))
    for limit, most in ((1280, 49), (16384, 69)):
        shapes = set()
        for height in range(1, 129, 9):
            for width in range(1, min(limit // height, 200 * height) + 1, 9):
                grid = (1, 2 * height, 2 * width)
                layout = frame_windows(vision, np.zeros((4 * height * width, 0), np.float32), grid, None)
                shapes.add(str(jax.tree.map(np.shape, adapter.collate([layout]))))
        assert len(shapes) <= most, len(shapes)


def test_rounding_wastes_at_most_half():
    sizes = np.arange(1, 5000)
    rounded = np.array([round_up(int(size)) for size in sizes])
    assert (rounded >= sizes).all() and (rounded <= 1.5 * sizes).all()
    assert len(set(rounded.tolist())) == 25


@pytest.mark.parametrize("grid", [(1, 32, 64), (1, 2, 1026), (96, 16, 32)], ids=["image", "wide image", "video"])
def test_memory_of_the_tower_grows_with_its_patches(grid):
    """Neither a large image nor the frames of a long video hold the scores of all their pairs of patches."""
    vision = QwenVisionConfig(32, 32, 1, 4, 8, 2, 2, 2, 8, (0,))
    adapter = Qwen2_5VLAdapter(Qwen2_5VLConfig(None, vision, image_token_id=1, video_token_id=2))
    patches = np.zeros((np.prod(grid), vision.patch_pixels), np.float32)
    pixels = adapter.collate([frame_windows(vision, patches, grid, 1.0 if grid[0] > 1 else None)])
    tower = abstract(lambda rngs: QwenVisionTower(vision, rngs=rngs))
    compiled = jax.jit(lambda tower, pixels: tower(pixels, np.float32)).lower(tower, pixels).compile()
    frames, longest = pixels["members"].shape
    scores = 4 * vision.num_heads * frames * longest**2
    assert compiled.memory_analysis().temp_size_in_bytes < scores / 2
