"""The models that ship with the package: what transformers makes of the same folder, and what the answers are worth."""

from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import jaxspec
from jaxspec import demo
from jaxspec.benchmark.quality import score_answers
from jaxspec.benchmark.run import example_prompts
from jaxspec.cli.options import EMBEDDED_DRAFTERS

LIMIT = 160
LEAST = {"medusa": (2.5, 1.5)}
"""Mean acceptance length on every question at temperature 0 and 1, where a method cannot reach the others'."""


@pytest.fixture(scope="module")
def target():
    return jaxspec.load_target(demo.target_path())


@pytest.fixture(scope="module")
def autoregressive(target):
    return jaxspec.Generator(target)


@pytest.mark.usefixtures("optimized")
def test_transformers_gives_the_same_greedy_tokens(target, autoregressive):
    model = LlavaForConditionalGeneration.from_pretrained(demo.target_path(), dtype=torch.float32).eval()
    examples = example_prompts(20, seed=0)
    assert {example.kind for example in examples} == {"describe", "count", "compare", "locate", "read"}
    for example in examples:
        ours = autoregressive.generate(example.question, [example.image], max_new_tokens=LIMIT)
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}]
        text = target.processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = target.processor(text=[text], images=[example.image], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT)
        theirs = output[0, inputs["input_ids"].shape[1] :].numpy()
        np.testing.assert_array_equal(ours.tokens, theirs, err_msg=example.question)
        assert ours.finish_reason == "stop"
        assert 40 <= len(ours.tokens) <= LIMIT


@pytest.mark.parametrize("method", EMBEDDED_DRAFTERS)
def test_embedded_drafters_change_no_token_and_save_rounds(target, autoregressive, method):
    generator = jaxspec.Generator(target, jaxspec.load_drafter(demo.drafter_path(method), target))
    for index, example in enumerate(example_prompts(6, seed=1)):
        for temperature, length in zip((0.0, 1.0), LEAST.get(method, (3.0, 2.0)), strict=True):
            sampling = jaxspec.SamplingParams(temperature, seed=index)
            one, two = (
                each.generate(example.question, [example.image], sampling, LIMIT)
                for each in (autoregressive, generator)
            )
            np.testing.assert_array_equal(one.tokens, two.tokens)
            assert two.stats.mean_acceptance_length > length


def test_answers_about_held_out_scenes_are_right(target):
    (entry,) = score_answers(target, {}, 32, seed=0, max_new_tokens=LIMIT, progress=MagicMock())
    assert entry["scenes"]["all"]["main"]["f1"] >= 0.9
