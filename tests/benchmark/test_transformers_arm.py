"""transformers as an arm of the benchmark decodes as the other arms do, whatever else its folder asks for."""

import json
import shutil

import numpy as np
import pytest

from jaxspec import SamplingParams, load_target
from jaxspec.benchmark.measure import Question
from jaxspec.benchmark.transformers_arm import transformers_arm
from jaxspec.targets.generation import GenerationDefaults

ASKED = {
    "do_sample": True,
    "temperature": 3.0,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(5, 300)),
    "min_new_tokens": 16,
    "num_beams": 3,
}


@pytest.mark.parametrize("applied", [False, True])
def test_the_arms_are_equal(target, generators, tmp_path, applied):
    folder = shutil.copytree(target.path, tmp_path / "target")
    (folder / "generation_config.json").write_text(json.dumps(ASKED))
    with pytest.warns(UserWarning, match="no_repeat_ngram_size 1"):
        asking = load_target(folder)
    question = Question("What is a chart for?")
    defaults = asking.generation_defaults if applied else GenerationDefaults()
    sampling = SamplingParams(temperature=0).resolved(defaults)
    assert sampling.repetition_penalty == (1.5 if applied else 1)
    expected = generators("autoregressive").generate(question.prompt, (), sampling, 16)
    arm, _ = transformers_arm(asking, "float32", 16, sampling)
    answer = arm.answer(question, SamplingParams())
    assert len(set(answer.tokens)) > 3
    np.testing.assert_array_equal(answer.tokens, expected.tokens)
    with pytest.raises(ValueError, match="generate has no presence_penalty, which the folder sets to 1.5"):
        transformers_arm(asking, "float32", 16, SamplingParams(presence_penalty=1.5))
