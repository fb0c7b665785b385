"""Questions and answers about scenes of shapes: describe, count, locate, compare."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxspec.demo.scenes import COLOURS, PLACES, SHAPES, SceneObject, ShapeScene
from jaxspec.demo.wording import NUMBERS, amount, background, describe_question, join, maybe, pick, plural, say


def full_name(item: SceneObject) -> str:
    return f"{item.size} {item.colour} {item.shape}"


def _stands(rng: np.random.Generator, item: SceneObject) -> str:
    """The sentence that states one object; `jaxspec.demo.scoring` reads every one of these templates."""
    return say(rng, (
        "at the {place} there is a {full}.",
        "in the {place} I see a {full}.",
        "the {place} holds a {full}.",
        "the {place} is filled by a {full}.",
        "a {full} stands at the {place}.",
    ), place=item.place, full=full_name(item))  # fmt: skip


def _rows(scene: ShapeScene) -> str:
    """A true remark on which rows of the grid are empty."""
    used = {PLACES.index(item.place) // 3 for item in scene.items}
    empty = [name for row, name in enumerate(("top", "middle", "bottom")) if row not in used]
    if not empty:
        return "No row of the picture is empty."
    return f"The {join(empty)} {plural('row', len(empty))} of the picture {'is' if len(empty) == 1 else 'are'} empty."


def _describe(scene: ShapeScene, rng: np.random.Generator) -> tuple[str, str]:
    items = scene.items
    parts = [say(rng, (
        "The picture shows {amount} on a grid of nine places.",
        "There are {amount} in this picture, and I go through them from the top to the bottom.",
        "I can see {amount}, each in a different place.",
        "This is a simple picture with {amount}.",
    ), amount=amount(len(items), "object"))]  # fmt: skip
    behind = background(rng, scene)
    behind_first = rng.random() < 0.7
    parts += behind if behind_first else []
    parts += [_stands(rng, item) for item in items]
    parts += [] if behind_first else behind
    # Short scenes need the remarks: an answer of two sentences would leave speculation nothing to do.
    likely = 1.0 if len(items) < 4 else 0.4
    if rng.random() < likely:
        parts.append(_rows(scene))
    large = sum(item.size == "large" for item in items)
    parts += maybe(rng, likely, (
        "In total, {large} large and {small} small.",
        "Of all the objects, {large} large and {small} small.",
        "By size, {large} large and {small} small.",
    ), large=_are(large), small=_are(len(items) - large))  # fmt: skip
    parts += maybe(rng, 0.3, (
        "Nothing else is in the picture.", "All the other places are empty.", "That is all I can see.",
    ))  # fmt: skip
    return describe_question(rng), " ".join(parts)


def _are(count: int) -> str:
    return ("none are", "one is")[count] if count < 2 else f"{NUMBERS[count]} are"


def _count(scene: ShapeScene, rng: np.random.Generator) -> tuple[str, str]:
    by_shape = rng.random() < 0.6
    attribute = "shape" if by_shape else "colour"
    wanted = getattr(pick(rng, scene.items), attribute)
    if rng.random() < 0.15:
        wanted = pick(rng, SHAPES if by_shape else tuple(COLOURS))
    noun = wanted if by_shape else f"{wanted} object"
    found = [item for item in scene.items if getattr(item, attribute) == wanted]
    rest = [item for item in scene.items if getattr(item, attribute) != wanted]
    question = say(rng, (
        "How many {nouns} are there in the picture?",
        "Count the {nouns} in the picture.",
        "How many {nouns} do you see?",
        "What is the number of {nouns} in this picture?",
    ), nouns=plural(noun))  # fmt: skip
    parts = [say(rng, (
        "I look for {nouns} from the top to the bottom of the picture.",
        "To count the {nouns}, I go through the picture row by row.",
        "Let me go through all nine places and look for {nouns}.",
    ), nouns=plural(noun))]  # fmt: skip
    parts += [_stands(rng, item) for item in found]
    if not found:
        parts.append(say(rng, (
            "There are no {nouns} in any of the nine places.",
            "I do not see any {nouns} in the picture.",
        ), nouns=plural(noun)))  # fmt: skip
    if rest and (len(found) < 3 or rng.random() < 0.4):
        parts.append(
            say(
                rng,
                (
                    "The other objects do not count, since they are {rest}.",
                    "Everything else has a different {attribute}: {rest}.",
                    "Besides that, the picture shows {rest}.",
                ),
                rest=join([f"a {full_name(item)}" for item in rest]),
                attribute="color" if not by_shape else "shape",
            )
        )
    parts += background(rng, scene)
    parts.append(say(rng, (
        "So the total is {amount}.",
        "That makes {amount} in total.",
        "So I count {amount} in the picture.",
        "In total, the number of {nouns} is {number}.",
    ), amount=amount(len(found), noun), nouns=plural(noun), number=NUMBERS[len(found)]))  # fmt: skip
    return question, " ".join(parts)


def _unique(scene: ShapeScene) -> list[SceneObject]:
    """The objects that "the red circle" names without doubt."""
    names = [(item.colour, item.shape) for item in scene.items]
    return [item for item in scene.items if names.count((item.colour, item.shape)) == 1]


def _locate(scene: ShapeScene, rng: np.random.Generator) -> tuple[str, str] | None:
    candidates = _unique(scene)
    if not candidates:
        return None
    target = pick(rng, candidates)
    name = f"{target.colour} {target.shape}"
    question = say(rng, (
        "Where is the {name}?", "In which place do you see the {name}?",
        "Where in the picture is the {name}, and what else is there?", "Please find the {name}.",
    ), name=name)  # fmt: skip
    row, column = divmod(PLACES.index(target.place), 3)
    parts = [
        say(rng, (
            "I look for the {name} in all nine places of the picture.",
            "Let me find the {name}.",
            "To find the {name}, I go through the picture row by row.",
        ), name=name),
        say(rng, (
            "at the {place} I find the {full}.",
            "the {place} is the place of the {full}.",
            "at the {place}, there it is, the {full}.",
        ), place=target.place, full=full_name(target)),
        say(rng, (
            "This is in the {row} row and the {column} column.",
            "So it stands in the {row} row and the {column} column.",
            "That means the {row} row and the {column} column.",
        ), row=("top", "middle", "bottom")[row], column=("left", "middle", "right")[column]),
        say(rng, (
            "Now the other objects.",
            "Elsewhere in the picture there is more to see.",
            "The other places are as follows.",
        )),
    ]  # fmt: skip
    parts += [_stands(rng, item) for item in scene.items if item is not target]
    parts += background(rng, scene)
    return question, " ".join(parts)


def _compare(scene: ShapeScene, rng: np.random.Generator) -> tuple[str, str] | None:
    candidates = _unique(scene)
    if len(candidates) < 2:
        return None
    chosen = rng.permutation(len(candidates))[:2].tolist()
    names = [f"{candidates[index].colour} {candidates[index].shape}" for index in chosen]
    question = say(rng, (
        "Compare the {one} and the {two}.",
        "How does the {one} compare with the {two}?",
        "Which is larger, the {one} or the {two}, and where are they?",
        "What is different between the {one} and the {two}?",
    ), one=names[0], two=names[1])  # fmt: skip
    first, second = (candidates[index] for index in sorted(chosen))
    one, two = f"{first.colour} {first.shape}", f"{second.colour} {second.shape}"
    parts = [_stands(rng, first), _stands(rng, second)]
    if first.size == second.size:
        parts.append(say(rng, (
            "Both objects have the same size, since both are {size}.",
            "So they do not differ in size, and both are {size}.",
            "By size they are the same: both are {size}.",
        ), size=first.size))  # fmt: skip
    else:
        big, little = (one, two) if first.size == "large" else (two, one)
        parts.append(say(rng, (
            "So the {big} is larger than the {little}.",
            "By size, the {big} is the larger object and the {little} is the smaller object.",
            "The {big} is clearly larger than the {little}.",
        ), big=big, little=little))  # fmt: skip
    (row, column), (other_row, other_column) = (divmod(PLACES.index(item.place), 3) for item in (first, second))
    height = "is in the same row as" if row == other_row else "is above"
    side = "is in the same column" if column == other_column else f"is more to the {_side(column, other_column)}"
    parts.append(say(rng, (
        "The {one} {height} the {two} and {side}.",
        "As for the place, the {one} {height} the {two} and {side}.",
        "In the picture, the {one} {height} the {two} and {side}.",
    ), one=one, two=two, height=height, side=side))  # fmt: skip
    same = [name for name in ("colour", "shape") if getattr(first, name) == getattr(second, name)]
    same_words = ["color" if name == "colour" else name for name in same]
    parts += maybe(rng, 0.8, (
        f"They have the same {same_words[0]}." if same else "They have a different color and a different shape.",
        f"Both share the same {same_words[0]}." if same else "They share neither color nor shape.",
    ))  # fmt: skip
    rest = [f"a {full_name(item)}" for item in scene.items if item not in (first, second)]
    parts += maybe(rng, 0.7, (
        "Besides these two, the picture shows {rest}.",
        "The rest of the picture is made of {rest}.",
        "Not asked for, but there too: {rest}.",
    ), rest=join(rest))  # fmt: skip
    parts += background(rng, scene)
    return question, " ".join(parts)


def _side(column: int, other: int) -> str:
    return "left" if column < other else "right"


MAKERS: dict[str, Callable[[ShapeScene, np.random.Generator], tuple[str, str] | None]] = {
    "describe": _describe,
    "count": _count,
    "compare": _compare,
    "locate": _locate,
}
"""By kind of question; each makes one with its answer, or None where the scene allows no unambiguous one."""
