"""The host half of every family: what marks an image, and a processor's padded batch as prompts."""

import numpy as np
import pytest
from PIL import Image

from jaxspec.prompting import encode_prompt
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.processors import process
from jaxspec.targets.prompts import prompts_of, stack_prompts
from tests.families import FAMILIES, family_target
from tests.folders import padded

PICTURES = [Image.fromarray(np.random.default_rng(4).integers(0, 256, (60, 20 * i, 3), np.uint8)) for i in (1, 2, 3)]
MARKS = {
    "llava_next": ("<image>", None),
    "qwen2_5_vl": ("<|image_pad|>", "<|video_pad|>"),
    "gemma3": ("<start_of_image>", None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_marks(family):
    """A raw prompt with the mark has the image's tokens there, and no other ones."""
    target = family_target(family)
    adapter, (image, video) = target.adapter, MARKS.get(family, (None, None))
    assert (adapter.image_mark(target.processor), adapter.video_mark(target.processor)) == (image, video)
    assert type(adapter) is not PromptAdapter or image is None
    prompt = encode_prompt(target, f"What is {image}?", PICTURES[:1] if image else (), raw=True)
    assert adapter.is_image(prompt.input_ids).sum() == sum(layout.tokens for layout in prompt.images)
    assert bool(prompt.images) == bool(image)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_padded_batch_is_its_prompts(family, side):
    """Rows with one image, none and two, whose pixels the processor gives one after another."""
    target = family_target(family)
    mark = target.adapter.image_mark(target.processor)
    texts, images = (f"What is {mark}?", "What?", f"{mark} or, perhaps, {mark}"), (PICTURES[:1], [], PICTURES[1:])
    each = [
        process(target.processor, text, **({"images": own} if own else {}))
        for text, own in zip(texts, images, strict=True)
    ]
    inputs = padded([row["input_ids"][0] for row in each], side)
    for name in ("pixel_values", "image_grid_thw"):
        if name in each[0]:
            inputs[name] = np.concatenate([each[0][name], each[2][name]])
    prompts = prompts_of(target.adapter, inputs)
    for text, own, prompt in zip(texts, images, prompts, strict=True):
        alone = encode_prompt(target, text, own, raw=True)
        np.testing.assert_array_equal(prompt.input_ids, alone.input_ids)
        np.testing.assert_array_equal(prompt.position_ids, alone.position_ids)
        assert [layout.key for layout in prompt.images] == [layout.key for layout in alone.images]
    without = {name: inputs[name][:2] if name in ("input_ids", "attention_mask") else inputs[name] for name in inputs}
    with pytest.raises(ValueError, match="the prompts have image tokens for 1 images, 3 were given"):
        prompts_of(target.adapter, without)


@pytest.mark.parametrize("family", MARKS)
def test_images_stand_where_their_tokens_are(family):
    """In each row counted from 0; the index leads every token to the row of its own image in the table."""
    target = family_target(family)
    adapter = target.adapter
    mark = adapter.image_mark(target.processor)
    prompts = [
        encode_prompt(target, text, own, raw=True)
        for text, own in ((f"What is {mark}?", PICTURES[:1]), ("What?", ()), (f"{mark} or {mark}", PICTURES[1:]))
    ]
    longest = max(len(prompt.input_ids) for prompt in prompts)
    images = stack_prompts(adapter, prompts, longest).images
    start = adapter.shared_features
    for row, prompt in enumerate(prompts):
        ids = images.ids[row, : len(prompt.input_ids)]
        np.testing.assert_array_equal(ids >= 0, adapter.is_image(prompt.input_ids))
        assert (images.ids[row, len(ids) :] == -1).all()
        for number, layout in enumerate(prompt.images):
            expected = np.where(layout.index < 0, -1 - layout.index, start + layout.index)
            np.testing.assert_array_equal(images.index[row, : len(ids)][ids == number], expected)
            start += layout.table_size
    layouts = [layout for prompt in prompts for layout in prompt.images]
    with pytest.raises(ValueError, match=r"the prompts have \d+ image tokens, the images \d+"):
        adapter.place(layouts[1:], prompts[0].input_ids[None])
    assert adapter.place([], prompts[0].input_ids[None]) is None
