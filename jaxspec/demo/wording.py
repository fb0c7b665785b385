"""The words that all questions and answers about demo scenes share: numbers, templates with uneven weights, lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jaxspec.demo.scenes import Scene

Option = TypeVar("Option")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth", "fifth")

_WEIGHTS = {
    2: (0.7, 0.3), 3: (0.55, 0.3, 0.15), 4: (0.5, 0.25, 0.15, 0.1), 5: (0.45, 0.25, 0.15, 0.1, 0.05),
}  # fmt: skip


def describe_question(rng: np.random.Generator) -> str:
    """One of the phrasings of "describe the picture"; the same ones serve shapes and charts."""
    return say(rng, (
        "Describe the picture in detail.",
        "What do you see in the picture?",
        "Please describe this picture.",
        "What is in the picture, and where?",
        "Tell me what the picture shows.",
    ))  # fmt: skip


def say(rng: np.random.Generator, templates: Sequence[str], **fields: object) -> str:
    """One of the templates, the first ones most often, filled in and begun with a capital."""
    draw, chosen = rng.random(), 0
    for weight in _WEIGHTS[len(templates)][:-1]:
        draw -= weight
        if draw < 0:
            break
        chosen += 1
    text = templates[chosen].format(**fields)
    return text[0].upper() + text[1:]


def maybe(rng: np.random.Generator, probability: float, templates: Sequence[str], **fields: object) -> list[str]:
    """A list of one such sentence, or of none."""
    return [say(rng, templates, **fields)] if rng.random() < probability else []


def pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(rng.integers(len(options)))]


def join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def plural(noun: str, count: int = 2) -> str:
    if count == 1:
        return noun
    return noun + ("es" if noun == "cross" else "s")


def amount(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {plural(noun, count)}"


def background(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Mostly a sentence about the background."""
    return maybe(rng, 0.8, (
        "The background is plain {name}.",
        "Everything stands on a {name} background.",
        "Behind it all the background is {name}.",
    ), name=scene.background)  # fmt: skip
