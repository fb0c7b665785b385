"""Encoded conversations equal what the processor makes, and the loss falls on the answers alone."""

import io

import numpy as np
import pytest

from jaxspec.data.conversations import ConversationEncoder, to_messages
from jaxspec.demo.generation import conversation_of, numbered_scene
from jaxspec.demo.processor import build_processor
from jaxspec.demo.scenes import render
from jaxspec.targets.llava import LlavaAdapter, LlavaConfig
from tests.helpers import config_for


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return build_processor(tmp_path_factory.mktemp("processor"), scenes=1500)


def encoder_of(processor):
    return ConversationEncoder(processor, LlavaAdapter(LlavaConfig.from_hf(config_for(processor))))


def _example(index):
    scene, turns = numbered_scene("test", index)
    picture = io.BytesIO()
    render(scene).save(picture, format="PNG")
    return scene, picture.getvalue(), conversation_of(turns)


def test_tokens_and_pixels_equal_the_processors(processor):
    encoder = encoder_of(processor)
    for index in range(10):
        scene, picture, conversation = _example(index)
        encoded = encoder([picture], conversation)
        text = processor.apply_chat_template(to_messages(conversation, 1))
        expected = processor(text=text, images=[render(scene)], return_tensors="np")
        np.testing.assert_array_equal(encoded.prompt.input_ids, expected["input_ids"][0])
        np.testing.assert_allclose(encoded.prompt.images[0].pixels, expected["pixel_values"], atol=1e-6)
        assert (encoded.prompt.input_ids.dtype, encoded.prompt.images[0].pixels.dtype) == (np.int32, np.float32)


def test_loss_mask_covers_exactly_the_answers(processor):
    encoder = encoder_of(processor)
    for index in range(20):
        _, picture, conversation = _example(index)
        encoded = encoder([picture], conversation)
        answers = "".join(f" {turn['value']}</s>" for turn in conversation if turn["from"] == "gpt")
        assert processor.tokenizer.decode(encoded.prompt.input_ids[encoded.loss_mask]) == answers


def test_a_question_is_what_comes_before_the_first_answer(processor):
    encoder = encoder_of(processor)
    for index in range(4):
        _, picture, conversation = _example(index)
        whole = encoder([picture], conversation)
        prompt, tokens = encoder.encode_question({"images": [picture], "conversations": conversation})
        start = int(whole.loss_mask.argmax())
        np.testing.assert_array_equal(prompt.input_ids, whole.prompt.input_ids[:start])
        np.testing.assert_array_equal(prompt.images[0].pixels, whole.prompt.images[0].pixels)
        assert whole.loss_mask[start : start + tokens].all() and not whole.loss_mask[start + tokens]
    later = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello"}, *conversation]
    prompt, _ = encoder.encode_question({"images": [picture], "conversations": later})
    assert prompt.images == [] and not encoder.adapter.is_image(prompt.input_ids).any()


def test_a_template_without_end_of_text_still_trains_it(processor, monkeypatch):
    # llava-hf's own template puts a space where LLaVA's training text has the end-of-text token.
    monkeypatch.setattr(processor, "chat_template", processor.chat_template.replace("'</s>'", "' '"))
    _, picture, conversation = _example(0)
    encoded = encoder_of(processor)([picture], conversation)
    answers = "".join(f" {turn['value']}</s>" for turn in conversation if turn["from"] == "gpt")
    assert processor.tokenizer.decode(encoded.prompt.input_ids[encoded.loss_mask]) == answers


def test_text_alone_has_no_images(processor):
    conversation = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Yes."}]
    assert encoder_of(processor)([], conversation).prompt.images == []


def test_bad_conversations_are_named():
    question, answer = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}
    with pytest.raises(ValueError, match="must alternate"):
        to_messages([question, answer, question], 2)
    with pytest.raises(ValueError, match="got 1 for 2 pictures"):
        to_messages([question, answer], 2)
