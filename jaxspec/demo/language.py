"""Questions about demo scenes, and true answers to them in plain English.

Answers mention things in raster order and name a place before what stands there, so that a small model can learn to
read them off the picture one place at a time. The wording varies freely (templates with uneven weights, optional
remarks), because a drafter that only had to memorise one sentence would make speculation look better than it is.
`jaxspec.demo.scoring` reads the claims of an answer back.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from jaxspec.demo import chart_language, shape_language
from jaxspec.demo.scenes import PLACES, Chart, Scene
from jaxspec.demo.wording import NUMBERS, ORDINALS, pick

SHAPE_KINDS = tuple(shape_language.MAKERS)
CHART_KINDS = tuple(chart_language.MAKERS)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question with its answer; `kind` is one of `SHAPE_KINDS` or `CHART_KINDS`."""

    kind: str
    question: str
    answer: str


def kinds_of(scene: Scene) -> tuple[str, ...]:
    """The kinds of question that there are about such a scene; "describe" is the first."""
    return CHART_KINDS if isinstance(scene, Chart) else SHAPE_KINDS


def ask(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Two or three turns of different kinds about `scene`; the first is "describe" with probability 0.6."""
    order = rng.permutation(kinds_of(scene)[1:]).tolist()
    order.insert(0 if rng.random() < 0.6 else int(rng.integers(1, len(order) + 1)), "describe")
    turns = [turn for kind in order if (turn := ask_kind(scene, kind, rng)) is not None]
    return turns[: int(rng.integers(2, 4))]


def ask_kind(scene: Scene, kind: str, rng: np.random.Generator) -> Turn | None:
    """One turn of the given kind, or None where the scene allows no unambiguous question of that kind.

    Raises:
      ValueError: the kind doesn't belong to this kind of scene.
    """
    kinds = kinds_of(scene)
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)} for a {scene.kind} scene; got {kind!r}.")
    if isinstance(scene, Chart):
        made = chart_language.MAKERS[kind](scene, rng)
    else:
        made = shape_language.MAKERS[kind](scene, rng)
    return None if made is None else Turn(kind, *made)


def inventory(scene: Scene, rng: np.random.Generator) -> Turn:
    """A terse list of every place (or bar) and what it holds: dense supervision for a model that learns to see."""
    question = pick(rng, ("List every place of the picture.", "What is in each place?", "Make a list of the picture."))
    if isinstance(scene, Chart):
        entries = [f"{ORDINALS[index]} bar: {bar.colour} {NUMBERS[bar.value]}" for index, bar in enumerate(scene.items)]
    else:
        held = {item.place: shape_language.full_name(item) for item in scene.items}
        entries = [f"{place}: {held.get(place, 'nothing')}" for place in PLACES]
    return Turn("inventory", question, ". ".join(entries) + ".")
