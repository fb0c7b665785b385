"""In bfloat16 a token may differ from autoregressive decoding only where the target itself can hardly decide.

Matrix products round differently for one row and for many, by a few units in the last of bfloat16's eight bits. So the
answers of speculative decoding are those of autoregressive decoding up to the first position at which the best two
tokens are nearer to each other than that; further differences follow from it.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec import Drafter, Generator, SamplingParams, Target, demo, load_drafter, load_target
from jaxspec.benchmark.identity import choice_margin, first_difference, rounding
from jaxspec.benchmark.measure import Question
from tests.drafting import DRAFTERS

NEW_TOKENS = 32
NODES = 8
UNITS = 4
"""Logits may differ by so many units of rounding (eps of the dtype) of the largest of them."""


@dataclasses.dataclass(frozen=True)
class Flips:
    """What was seen over a few answers."""

    answers: int
    margins: list[float]  # at the first difference of each answer that has one, times the temperature
    difference: float  # of logits between one node and many
    largest: float  # logit

    def check(self, dtype: str) -> None:
        """A difference that rounding does not explain is an error."""
        unit = float(jnp.finfo(dtype).eps) * self.largest
        assert self.difference <= UNITS * unit, self
        assert all(margin <= 2 * max(self.difference, unit) for margin in self.margins), self


def flips(target: Target, drafters: dict[str, Drafter], questions: list[Question], temperatures) -> Flips:
    """Every drafter against autoregressive decoding of the same target."""
    plain = Generator(target, max_length=512)
    speculative = [Generator(target, drafter, max_length=512) for drafter in drafters.values()]
    margins, sizes = [], []
    for seed, question in enumerate(questions):
        for temperature in temperatures:
            sampling = SamplingParams(temperature, seed=seed)
            expected = plain.generate(*question, sampling, NEW_TOKENS).tokens
            sizes.append(rounding(target, question, expected, NODES))
            for generator in speculative:
                tokens = generator.generate(*question, sampling, NEW_TOKENS).tokens
                position = first_difference(tokens, expected)
                if position is not None:
                    margin = choice_margin(target, question, sampling, expected, position)
                    margins.append(margin * (temperature or 1.0))
    difference, largest = np.max(sizes, axis=0)
    return Flips(len(questions) * len(temperatures) * len(speculative), margins, difference, largest)


def linked(target, dtype: str) -> tuple[Target, dict[str, Drafter]]:
    """The linked target in that dtype, and drafters of different kinds."""
    own = load_target(target.path, dtype)
    return own, {name: DRAFTERS[name](own) for name in ("eagle2", "lookup")}


@pytest.fixture(scope="module")
def questions(pictures) -> list[Question]:
    """Of one shape: every other would be compiled anew."""
    asked = ("What is a chart for?", "How many shapes are there?", "Compare the two.")
    return [Question(prompt, tuple(pictures[:1])) for prompt in asked]


def test_tokens_differ_only_at_near_ties(target, questions):
    seen = flips(*linked(target, "bfloat16"), questions, (0.0, 1.0))
    seen.check("bfloat16")


def test_the_demo_differs_only_at_near_ties():
    own = load_target(demo.target_path(), "bfloat16")
    drafter = load_drafter(demo.drafter_path("vispec"), own)
    questions = [Question(each.question, (each.image,)) for each in demo.examples("test", 2, 0)]
    seen = flips(own, {"vispec": drafter}, questions, (0.0, 1.0))
    seen.check("bfloat16")


def test_an_error_is_no_near_tie(target, questions):
    """Positions that are one too high where a tree is read."""
    own, drafters = linked(target, "bfloat16")
    ours = type(own.model)

    class Shifted(ours):
        def forward(self, embeds, position_ids, *args, **kwargs):
            return super().forward(embeds, position_ids + (1 < embeds.shape[1] <= NODES), *args, **kwargs)

    own.model = nnx.merge(*nnx.split(own.model))
    own.model.__class__ = Shifted
    seen = flips(own, {"lookup": drafters["lookup"]}, questions[:1], (0.0, 1.0))
    with pytest.raises(AssertionError):
        seen.check("bfloat16")
