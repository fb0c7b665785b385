"""Reads what a "describe" answer claims about a scene and scores it against the truth.

Speed is only worth reporting beside a quality that a broken verifier would lose. Because the truth of a demo scene is
known, that quality is exact: precision and recall over objects, compared as multisets.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from jaxspec.demo.scenes import COLOURS, PLACES, SHAPES, SIZES, Bar, Scene, SceneObject
from jaxspec.demo.wording import NUMBERS

_COLOUR = "|".join(COLOURS)
_OBJECT = re.compile(rf"\b({'|'.join(SIZES)}) ({_COLOUR}) ({'|'.join(SHAPES)})\b")
# Longer names first, or "center" would be found inside "top center".
_PLACE = re.compile(rf"\b({'|'.join(sorted(PLACES, key=len, reverse=True))})\b")
_BAR = re.compile(rf"\bbar\b.*?\b({_COLOUR})\b.*?\b({'|'.join(NUMBERS[1:])})$")


@dataclasses.dataclass(frozen=True)
class Score:
    """Counts of claimed and actual objects; scores of several scenes add up, also with `sum(scores, Score())`."""

    true_positives: int = 0
    predicted: int = 0
    actual: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(
            self.true_positives + other.true_positives, self.predicted + other.predicted, self.actual + other.actual
        )

    @property
    def precision(self) -> float:
        """Share of the claims that are true; 1.0 where nothing was claimed."""
        return self.true_positives / self.predicted if self.predicted else 1.0

    @property
    def recall(self) -> float:
        """Share of the actual objects that were claimed; 1.0 where there are none."""
        return self.true_positives / self.actual if self.actual else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0.0 where both are zero."""
        total = self.predicted + self.actual
        return 2 * self.true_positives / total if total else 1.0


def objects_of(scene: Scene) -> list[SceneObject | Bar]:
    """The truth: the scene's objects in raster order, or its bars from left to right."""
    return list(scene.items)


def parse_objects(answer: str) -> list[SceneObject | Bar]:
    """The objects and bars that a "describe" answer claims, in the order of mention.

    A sentence claims an object if it names one place and one "size colour shape", and a bar if it names a bar, its
    colour and, at its end, a value. Any other sentence claims nothing, so any text at all can be read.
    """
    claims: list[SceneObject | Bar] = []
    for sentence in re.split(r"[.!?]", answer.lower()):
        objects, places = _OBJECT.findall(sentence), _PLACE.findall(sentence)
        if len(objects) == 1 and len(places) == 1:
            size, colour, shape = objects[0]
            claims.append(SceneObject(places[0], colour, shape, size))
        elif bar := _BAR.search(sentence.strip()):
            claims.append(Bar(bar[1], NUMBERS.index(bar[2])))
    return claims


def score_objects(
    predicted: Sequence[SceneObject | Bar], truth: Sequence[SceneObject | Bar], strict: bool = False
) -> Score:
    """Compares claims with the truth as multisets.

    Args:
      predicted: what an answer claims, as `parse_objects` reads it.
      truth: what the scene holds, as `objects_of` gives it.
      strict: whether an object's size must be right too. Place, colour and shape (a bar's colour and value) always are.
    """
    claims = Counter(_key(item, strict) for item in predicted)
    facts = Counter(_key(item, strict) for item in truth)
    return Score((claims & facts).total(), claims.total(), facts.total())


def _key(item: SceneObject | Bar, strict: bool) -> tuple:
    if isinstance(item, Bar):
        return (item.colour, item.value)
    return (item.place, item.colour, item.shape, item.size) if strict else (item.place, item.colour, item.shape)
