"""The processor is an ordinary LLaVA-1.5 one, and its tokenizer loses nothing."""

import numpy as np
import pytest
from transformers import AutoProcessor

from jaxspec.demo.generation import numbered_scene
from jaxspec.demo.processor import VOCABULARY_SIZE, build_processor
from jaxspec.demo.scenes import render


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processor")
    build_processor(folder, scenes=1500)
    return AutoProcessor.from_pretrained(folder)


def test_vocabulary(processor):
    tokenizer = processor.tokenizer
    assert len(tokenizer) == tokenizer.vocab_size == VOCABULARY_SIZE
    assert processor.image_token_id < VOCABULARY_SIZE
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}) == 4


def test_chat_template_and_image_tokens(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "There."}]},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == "USER: <image>\nWhere? ASSISTANT: There.</s>USER: Why? ASSISTANT:"
    inputs = processor(text=text, images=[render(numbered_scene("test", 0)[0])], return_tensors="np")
    assert int(np.sum(inputs["input_ids"] == processor.image_token_id)) == 36
    assert inputs["pixel_values"].shape == (1, 3, 144, 144)


def test_any_text_round_trips(processor):
    tokenizer = processor.tokenizer
    texts = ["Héllo ☃ 日本\t12 <b>  x\n", *(t.answer for i in range(100) for t in numbered_scene("test", i)[1])]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_segments_encode_as_within_the_whole(processor):
    def encode(text):
        return processor.tokenizer(text, add_special_tokens=False).input_ids

    for index in range(50):
        for turn in numbered_scene("test", index)[1]:
            prompt, answer = f"USER: <image>\n{turn.question} ASSISTANT:", f" {turn.answer}</s>"
            assert encode(prompt + answer) == encode(prompt) + encode(answer)


def test_most_words_are_one_token(processor):
    words = [" " + w.strip(".,:") for i in range(300) for t in numbered_scene("test", i)[1] for w in t.answer.split()]
    single = sum(len(processor.tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words)
    assert single / len(words) > 0.9
