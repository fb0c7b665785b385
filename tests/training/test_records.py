"""What a drafter's recipe can learn from and be judged by: settings, records, held-out questions."""

from collections import UserList
from types import SimpleNamespace

import numpy as np
import pytest

from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.training import EagleRecipe, ViSpecRecipe
from jaxspec.training.drafter import check_records
from jaxspec.training.held_out import Span, first_questions


def test_a_draft_vocabulary_that_is_too_small_to_rank():
    with pytest.raises(ValueError, match="draft_vocab_size must be at least 10, got 9"):
        EagleRecipe(name="head", draft_vocab_size=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acceptance_every": 6}, r"acceptance_every must be a multiple of eval_every \(4\), got 6"),
        ({"acceptance_every": 4, "acceptance_prompts": 0}, "acceptance_every is 4, but acceptance_prompts is 0"),
        ({"max_records": 0}, "max_records must be at least 1, got 0"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        EagleRecipe(name="head", eval_every=4, **changes)


@pytest.mark.parametrize(
    ("changes", "image_token_ids", "message"),
    [
        ({"batch_size": 9}, (7,), "gives 12 records, 4 of them held out: the others do not fill a batch of 9"),
        ({}, (7,), "method vispec learns from images, but no record of .* has one"),
        ({}, (), "method vispec learns from images, but the target .* reads none"),
    ],
)
def test_answers_that_a_recipe_cannot_learn_from(changes, image_token_ids, message):
    target = SimpleNamespace(config=SimpleNamespace(image_token_ids=image_token_ids))
    with pytest.raises(ValueError, match=message):
        check_records(ViSpecRecipe(name="head", **changes), target, text_only(False), 4)
    check_records(EagleRecipe(name="head"), target, text_only(False), 4)


def text_only(has_images, last=()) -> Span:
    """Twelve records without images but for those of the last one."""
    source = UserList([*[{"images": []}] * 11, {"images": last}])
    source.has_images = has_images
    return Span(source, 0, 12)


def test_an_image_in_any_record_is_one():
    target = SimpleNamespace(config=SimpleNamespace(image_token_ids=(7,)))
    recipe = ViSpecRecipe(name="head")
    check_records(recipe, target, text_only(True), 4)
    check_records(recipe, target, text_only(None, ["image"]), 4)
    with pytest.raises(ValueError, match="no record of .* has one"):
        check_records(recipe, target, text_only(None), 4)


def test_questions_that_cannot_be_asked_are_left_out_by_name():
    def encode_question(record):
        if record["question"] is None:
            raise ValueError("image 1 cannot be read")
        return EncodedPrompt(np.zeros(record["question"], np.int32), []), 5

    records = [{"id": name, "question": size} for name, size in (("a", None), ("b", 9), ("c", 8), ("d", 3), ("e", 2))]
    with pytest.warns(UserWarning) as told:
        found = first_questions(records, SimpleNamespace(encode_question=encode_question), 2, room=8)
    assert [(len(prompt.input_ids), tokens) for prompt, tokens in found] == [(8, 5), (3, 5)]
    assert [str(each.message) for each in told] == [
        "acceptance is measured without record a: image 1 cannot be read",
        "acceptance is measured without record b: its question has 9 tokens, of which 8 fit",
    ]
