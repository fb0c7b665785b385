"""How near a tie an answer was, under the penalties that chose its tokens."""

import numpy as np
import pytest

from jaxspec import SamplingParams
from jaxspec.benchmark.identity import choice_margin
from jaxspec.benchmark.measure import Question
from jaxspec.prompting import encode_prompt
from tests.plain_penalties import penalised_logits


@pytest.mark.parametrize("position", [0, 5])
def test_the_margin_is_of_the_penalised_logits(target, position):
    question, answer = Question("What is a chart for?"), np.array([7, 8, 7, 9, 8, 7])
    sampling = SamplingParams(repetition_penalty=1.4, frequency_penalty=1.5, logit_bias={7: 30.0}, min_tokens=3)
    prompt = encode_prompt(target, question.prompt, ()).input_ids
    ids = np.concatenate([prompt, answer[:position]])
    logits = np.asarray(target.logits({"input_ids": ids[None]}))[0, -1]
    second, best = np.sort(penalised_logits(logits, sampling, prompt, answer[:position], target.stop_token_ids))[-2:]
    margins = [choice_margin(target, question, each, answer, position) for each in (sampling, SamplingParams())]
    np.testing.assert_allclose(margins[0], best - second, atol=1e-4)
    assert abs(margins[1] - margins[0]) > 1
