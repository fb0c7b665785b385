"""What the tests of the HTTP layer ask, in the client's words and in the library's: an answer over HTTP equals the one
that `Generator` gives to the same request."""

import base64
import functools
import io
from typing import Any, NamedTuple

from jaxspec import Generator, Result, SamplingParams, demo

MODEL = "jaxspec"
TOKENS = 24
"""Of an answer, where nothing else is said."""
END, GRAY, BARS = 2, 531, 414
"""The embedded model's end of sequence; " gray" and " bars", which a description of a chart has early."""


@functools.cache
def picture(number: int) -> str:
    """A scene of the demo as a data: URL."""
    file = io.BytesIO()
    demo.examples("test", number + 1)[number].image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user(text: str, *pictures: int) -> dict[str, Any]:
    """A turn about some pictures."""
    parts = [{"type": "image_url", "image_url": {"url": picture(number)}} for number in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}


TEXT = [user("What is a chart for?")]
ONE = [user("Describe the picture.", 0)]
THREE = [user("How many shapes are there?", 0, 1, 2)]
TURNS = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "a bar?"}]},
    {"role": "assistant", "content": "A part of a chart."},
    user("And what is this?", 1),
]


class Case(NamedTuple):
    messages: list[dict[str, Any]]
    options: dict[str, Any]  # of the client; what OpenAI does not know goes into the body all the same
    sampling: dict[str, Any]  # the same as SamplingParams


def sampled(messages: list[dict[str, Any]], seed: int, **both: Any) -> Case:
    options = {"temperature": 1.0, "seed": seed, **both}
    return Case(messages, options, options)


CASES = {
    "text": Case(TEXT, {}, {}),
    "one image": Case(ONE, {}, {}),
    "three images": Case(THREE, {}, {}),
    "turns": Case(TURNS, {}, {}),
    "sampled": sampled(ONE, 11),
    "filtered": sampled(TEXT, 11, top_p=0.9, top_k=20, min_p=0.01),
    "stop string": Case(ONE, {"stop": " plain"}, {"stop": " plain"}),
    "stop strings": Case(ONE, {"stop": ["nowhere", " gray", " chart"]}, {"stop": ("nowhere", " gray", " chart")}),
    "stop token": Case(ONE, {"stop_token_ids": [GRAY]}, {"stop_token_ids": (GRAY,)}),
    "penalties": sampled(TURNS, 5, presence_penalty=1.5, frequency_penalty=1.5, repetition_penalty=1.5),
    "bias": Case(ONE, {"logit_bias": {str(GRAY): -100, str(BARS): -100}}, {"logit_bias": {GRAY: -100, BARS: -100}}),
    "least length": Case(
        ONE, {"stop_token_ids": [GRAY], "min_tokens": 20}, {"stop_token_ids": (GRAY,), "min_tokens": 20}
    ),
}  # fmt: skip
SEEDS = {f"seed {seed}": sampled(ONE, seed) for seed in (2**32 - 2, 2**32 - 1, 0, 1)}
"""Those of the choices of one request, and one more."""
TOLD = {f"{count} alternatives": Case(ONE, {}, {"logprobs": count}) for count in (0, 5)}


def answers(generator: Generator) -> dict[str, Result]:
    """The library's own answers to all of them, in one batch: it answers each as it would alone."""
    cases = CASES | SEEDS | TOLD
    sampling = [SamplingParams(**case.sampling) for case in cases.values()]
    results = generator.generate_batch([case.messages for case in cases.values()], None, sampling, TOKENS)
    return dict(zip(cases, results, strict=True))
