"""transformers as an arm of the benchmark decodes as the other arms do, whatever its folder asks for."""

import json
import shutil

import numpy as np
import pytest

from jaxspec import SamplingParams, load_target
from jaxspec.benchmark.measure import Question
from jaxspec.benchmark.transformers_arm import transformers_arm

ASKED = {
    "do_sample": True,
    "temperature": 3.0,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(5, 300)),
    "min_new_tokens": 16,
    "num_beams": 3,
}


def test_the_arms_are_equal(target, generators, tmp_path):
    folder = shutil.copytree(target.path, tmp_path / "target")
    (folder / "generation_config.json").write_text(json.dumps(ASKED))
    with pytest.warns(UserWarning, match="repetition_penalty 5.0"):
        asking = load_target(folder)
    question = Question("What is a chart for?")
    expected = generators("autoregressive").generate(question.prompt, max_new_tokens=16)
    arm, _ = transformers_arm(asking, "float32", 16)
    answer = arm.answer(question, SamplingParams())
    assert len(set(answer.tokens)) > 3
    np.testing.assert_array_equal(answer.tokens, expected.tokens)
