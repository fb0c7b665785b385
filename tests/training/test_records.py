"""What a drafter's recipe can learn from and be judged by: settings, records, held-out questions."""

from collections import UserList
from types import SimpleNamespace

import numpy as np
import pytest

from jaxspec.data.answers import AnswerEncoder
from jaxspec.layers import TextConfig
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.processors import TextProcessor
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.text import TextTargetConfig
from jaxspec.training import DrafterRecipe, EagleRecipe, MassvRecipe, MedusaRecipe, SpecVLMRecipe, ViSpecRecipe
from jaxspec.training.drafter import check_records, questions_of
from jaxspec.training.held_out import Span, first_questions, pipelines


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
    target = SimpleNamespace(adapter=SimpleNamespace(image_token_ids=image_token_ids))
    with pytest.raises(ValueError, match=message):
        check_records(ViSpecRecipe(name="head", **changes), target, text_only(False), 4)
    check_records(EagleRecipe(name="head"), target, text_only(False), 4)


def text_only(has_images, last=()) -> Span:
    """Twelve records without images but for those of the last one."""
    source = UserList([*[{"images": []}] * 11, {"images": last}])
    source.has_images = has_images
    return Span(source, 0, 12)


def test_an_image_in_any_record_is_one():
    target = SimpleNamespace(adapter=SimpleNamespace(image_token_ids=(7,)))
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


TEXT = TextConfig(97, 32, 64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
# Without pictures and names of tokens.
ENCODER = AnswerEncoder(TextProcessor(None), PromptAdapter(TextTargetConfig(TEXT)))
RECIPE = EagleRecipe(name="head", batch_size=2, sequence_length=16, validation_records=2)


def answers(*sizes) -> list[dict]:
    """Records with `(prompt, answer)` tokens."""
    return [
        {"id": f"r{number}", "prompt_ids": np.ones(prompt, int), "answer_ids": np.ones(answer, int), "images": []}
        for number, (prompt, answer) in enumerate(sizes)
    ]


@pytest.mark.filterwarnings("ignore:left out")
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            [(4, 4), (4, 4), (20, 3), (15, 9)],
            "^none of 2 records can be learned from; .* sequence_length 16",
        ),
        ([(20, 3), (15, 9), (4, 4), (4, 4)], "^validation on the first 2 records: none of 2 records can be learned"),
    ],
)
def test_records_whose_answers_are_all_cut_away_are_refused_before_a_run_begins(sizes, message):
    with pytest.raises(ValueError, match=message):
        pipelines(RECIPE, answers(*sizes), 2, ENCODER, RECIPE.answer_run)


@pytest.mark.filterwarnings("ignore:left out")
def test_one_usable_record_is_learned_from_in_every_step():
    training, validation = pipelines(RECIPE, answers((20, 3), (4, 4), (20, 3), (4, 4), (20, 3)), 2, ENCODER, 2)
    for batch in [*(training[step] for step in range(4)), *validation()]:
        assert batch["loss_mask"].sum() == 4
    assert training.shortfall()["skipped"] > 0


@pytest.mark.parametrize("recipe", [EagleRecipe, ViSpecRecipe, SpecVLMRecipe, MedusaRecipe, MassvRecipe])
def test_recipes_say_what_they_need_of_an_answer(recipe: type[DrafterRecipe]):
    """Those whose loss counts a token only behind another one of the answer."""
    assert recipe.answer_run == (1 if recipe is MassvRecipe else 2)


def test_questions_that_are_all_too_long_are_an_error():
    target = SimpleNamespace(config=SimpleNamespace(text=SimpleNamespace(max_position_embeddings=12)))
    held_out = Span(answers((13, 2), (12, 4)), 0, 2)
    message = "acceptance_prompts is 16, but none of the 2 records held out has a question of up to 11 tokens"
    with pytest.warns(UserWarning, match="its question has 1. tokens"), pytest.raises(ValueError, match=message):
        questions_of(RECIPE, target, held_out, ENCODER)
