"""Questions about demo scenes, and true answers to them in plain English.

Answers mention things in raster order and name a place before what stands there, so that a small model can learn to
read them off the picture one place at a time. The wording varies freely (templates with uneven weights, optional
remarks), because a drafter that only had to memorise one sentence would make speculation look better than it is.
`jaxspec.demo.scoring` reads the claims of an answer back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxspec.demo.scenes import COLOURS, PLACES, SHAPES, Bar, Scene, SceneObject

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
SHAPE_KINDS = ("describe", "count", "compare", "locate")
CHART_KINDS = ("describe", "count", "compare", "read")

_WEIGHTS = {
    2: (0.7, 0.3), 3: (0.55, 0.3, 0.15), 4: (0.5, 0.25, 0.15, 0.1), 5: (0.45, 0.25, 0.15, 0.1, 0.05),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question with its answer; `kind` is one of `SHAPE_KINDS` or `CHART_KINDS`."""

    kind: str
    question: str
    answer: str


def ask(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Two or three turns of different kinds about `scene`; the first is "describe" with probability 0.6."""
    kinds = list(SHAPE_KINDS if scene.kind == "shapes" else CHART_KINDS)
    order = rng.permutation(kinds[1:]).tolist()
    order.insert(0 if rng.random() < 0.6 else int(rng.integers(1, len(order) + 1)), "describe")
    turns = [turn for kind in order if (turn := ask_kind(scene, kind, rng)) is not None]
    return turns[: int(rng.integers(2, 4))]


def ask_kind(scene: Scene, kind: str, rng: np.random.Generator) -> Turn | None:
    """One turn of the given kind, or None where the scene allows no unambiguous question of that kind.

    Raises:
      ValueError: the kind doesn't belong to this kind of scene.
    """
    makers = _SHAPE_MAKERS if scene.kind == "shapes" else _CHART_MAKERS
    if kind not in makers:
        raise ValueError(f"kind must be one of {', '.join(makers)} for a {scene.kind} scene; got {kind!r}.")
    made = makers[kind](scene, rng)
    return None if made is None else Turn(kind, *made)


def inventory(scene: Scene, rng: np.random.Generator) -> Turn:
    """A terse list of every place (or bar) and what it holds: dense supervision for a model that learns to see."""
    question = _pick(rng, ("List every place of the picture.", "What is in each place?", "Make a list of the picture."))
    if scene.kind == "chart":
        entries = [f"{ORDINALS[index]} bar: {bar.colour} {NUMBERS[bar.value]}" for index, bar in enumerate(scene.items)]
    else:
        held = {item.place: item for item in scene.items}
        entries = [f"{place}: {_full(held[place]) if place in held else 'nothing'}" for place in PLACES]
    return Turn("inventory", question, ". ".join(entries) + ".")


def describe_question(rng: np.random.Generator) -> str:
    """One of the phrasings of "describe the picture"; the same ones serve shapes and charts."""
    return _say(rng, (
        "Describe the picture in detail.",
        "What do you see in the picture?",
        "Please describe this picture.",
        "What is in the picture, and where?",
        "Tell me what the picture shows.",
    ))  # fmt: skip


def _say(rng: np.random.Generator, templates: Sequence[str], **fields: object) -> str:
    draw, chosen = rng.random(), 0
    for weight in _WEIGHTS[len(templates)][:-1]:
        draw -= weight
        if draw < 0:
            break
        chosen += 1
    text = templates[chosen].format(**fields)
    return text[0].upper() + text[1:]


def _maybe(rng: np.random.Generator, probability: float, templates: Sequence[str], **fields: object) -> list[str]:
    return [_say(rng, templates, **fields)] if rng.random() < probability else []


def _pick(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _plural(noun: str, count: int = 2) -> str:
    if count == 1:
        return noun
    return noun + ("es" if noun == "cross" else "s")


def _amount(count: int, noun: str) -> str:
    return f"{NUMBERS[count]} {_plural(noun, count)}"


def _full(item: SceneObject) -> str:
    return f"{item.size} {item.colour} {item.shape}"


def _stands(rng: np.random.Generator, item: SceneObject) -> str:
    """The sentence that states one object; `jaxspec.demo.scoring` reads every one of these templates."""
    return _say(rng, (
        "at the {place} there is a {full}.",
        "in the {place} I see a {full}.",
        "the {place} holds a {full}.",
        "the {place} is filled by a {full}.",
        "a {full} stands at the {place}.",
    ), place=item.place, full=_full(item))  # fmt: skip


def _background(rng: np.random.Generator, scene: Scene) -> list[str]:
    return _maybe(rng, 0.6, (
        "The background is plain {name}.",
        "Everything stands on a {name} background.",
        "Behind it all the background is {name}.",
    ), name=scene.background)  # fmt: skip


def _rows(scene: Scene) -> str:
    """A true remark on which rows of the grid are empty."""
    used = {PLACES.index(item.place) // 3 for item in scene.items}
    empty = [name for row, name in enumerate(("top", "middle", "bottom")) if row not in used]
    if not empty:
        return "No row of the picture is empty."
    return f"The {_join(empty)} {_plural('row', len(empty))} of the picture {'is' if len(empty) == 1 else 'are'} empty."


def _describe_shapes(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    items = scene.items
    parts = [_say(rng, (
        "The picture shows {amount} on a grid of nine places.",
        "There are {amount} in this picture, and I go through them from the top to the bottom.",
        "I can see {amount}, each in a different place.",
        "This is a simple picture with {amount}.",
    ), amount=_amount(len(items), "object"))]  # fmt: skip
    background = _background(rng, scene)
    background_first = rng.random() < 0.7
    parts += background if background_first else []
    parts += [_stands(rng, item) for item in items]
    parts += [] if background_first else background
    # Short scenes need the remarks: an answer of two sentences would leave speculation nothing to do.
    likely = 1.0 if len(items) < 4 else 0.4
    if rng.random() < likely:
        parts.append(_rows(scene))
    large = sum(item.size == "large" for item in items)
    parts += _maybe(rng, likely, (
        "In total, {large} large and {small} small.",
        "Of all the objects, {large} large and {small} small.",
        "By size, {large} large and {small} small.",
    ), large=_are(large), small=_are(len(items) - large))  # fmt: skip
    parts += _maybe(rng, 0.3, (
        "Nothing else is in the picture.", "All the other places are empty.", "That is all I can see.",
    ))  # fmt: skip
    return describe_question(rng), " ".join(parts)


def _are(count: int) -> str:
    return ("none are", "one is")[count] if count < 2 else f"{NUMBERS[count]} are"


def _count_shapes(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    by_shape = rng.random() < 0.6
    attribute = "shape" if by_shape else "colour"
    wanted = getattr(_pick(rng, scene.items), attribute)
    if rng.random() < 0.15:
        wanted = _pick(rng, SHAPES if by_shape else tuple(COLOURS))
    noun = wanted if by_shape else f"{wanted} object"
    found = [item for item in scene.items if getattr(item, attribute) == wanted]
    rest = [item for item in scene.items if getattr(item, attribute) != wanted]
    question = _say(rng, (
        "How many {nouns} are there in the picture?",
        "Count the {nouns} in the picture.",
        "How many {nouns} do you see?",
        "What is the number of {nouns} in this picture?",
    ), nouns=_plural(noun))  # fmt: skip
    parts = [_say(rng, (
        "I look for {nouns} from the top to the bottom of the picture.",
        "To count the {nouns}, I go through the picture row by row.",
        "Let me go through all nine places and look for {nouns}.",
    ), nouns=_plural(noun))]  # fmt: skip
    parts += [_stands(rng, item) for item in found]
    if not found:
        parts.append(_say(rng, (
            "There are no {nouns} in any of the nine places.",
            "I do not see any {nouns} in the picture.",
        ), nouns=_plural(noun)))  # fmt: skip
    if rest and (len(found) < 3 or rng.random() < 0.4):
        parts.append(
            _say(
                rng,
                (
                    "The other objects do not count, since they are {rest}.",
                    "Everything else has a different {attribute}: {rest}.",
                    "Besides that, the picture shows {rest}.",
                ),
                rest=_join([f"a {_full(item)}" for item in rest]),
                attribute="color" if not by_shape else "shape",
            )
        )
    parts.append(_say(rng, (
        "So the total is {amount}.",
        "That makes {amount} in total.",
        "So I count {amount} in the picture.",
        "In total, the number of {nouns} is {number}.",
    ), amount=_amount(len(found), noun), nouns=_plural(noun), number=NUMBERS[len(found)]))  # fmt: skip
    return question, " ".join(parts)


def _unique(scene: Scene) -> list[SceneObject]:
    """The objects that "the red circle" names without doubt."""
    names = [(item.colour, item.shape) for item in scene.items]
    return [item for item in scene.items if names.count((item.colour, item.shape)) == 1]


def _locate(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    candidates = _unique(scene)
    if not candidates:
        return None
    target = _pick(rng, candidates)
    name = f"{target.colour} {target.shape}"
    question = _say(rng, (
        "Where is the {name}?", "In which place do you see the {name}?",
        "Where in the picture is the {name}, and what else is there?", "Please find the {name}.",
    ), name=name)  # fmt: skip
    row, column = divmod(PLACES.index(target.place), 3)
    parts = [
        _say(rng, (
            "I look for the {name} in all nine places of the picture.",
            "Let me find the {name}.",
            "To find the {name}, I go through the picture row by row.",
        ), name=name),
        _say(rng, (
            "at the {place} I find the {full}.",
            "the {place} is the place of the {full}.",
            "at the {place}, there it is, the {full}.",
        ), place=target.place, full=_full(target)),
        _say(rng, (
            "This is in the {row} row and the {column} column.",
            "So it stands in the {row} row and the {column} column.",
            "That means the {row} row and the {column} column.",
        ), row=("top", "middle", "bottom")[row], column=("left", "middle", "right")[column]),
        _say(rng, (
            "Now the other objects.",
            "Elsewhere in the picture there is more to see.",
            "The other places are as follows.",
        )),
    ]  # fmt: skip
    parts += [_stands(rng, item) for item in scene.items if item is not target]
    parts += _background(rng, scene)
    return question, " ".join(parts)


def _compare_shapes(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    candidates = _unique(scene)
    if len(candidates) < 2:
        return None
    chosen = rng.permutation(len(candidates))[:2].tolist()
    names = [f"{candidates[index].colour} {candidates[index].shape}" for index in chosen]
    question = _say(rng, (
        "Compare the {one} and the {two}.",
        "How does the {one} compare with the {two}?",
        "Which is larger, the {one} or the {two}, and where are they?",
        "What is different between the {one} and the {two}?",
    ), one=names[0], two=names[1])  # fmt: skip
    first, second = (candidates[index] for index in sorted(chosen))
    one, two = f"{first.colour} {first.shape}", f"{second.colour} {second.shape}"
    parts = [_stands(rng, first), _stands(rng, second)]
    if first.size == second.size:
        parts.append(_say(rng, (
            "Both objects have the same size, since both are {size}.",
            "So they do not differ in size, and both are {size}.",
            "By size they are the same: both are {size}.",
        ), size=first.size))  # fmt: skip
    else:
        big, little = (one, two) if first.size == "large" else (two, one)
        parts.append(_say(rng, (
            "So the {big} is larger than the {little}.",
            "By size, the {big} is the larger object and the {little} is the smaller object.",
            "The {big} is clearly larger than the {little}.",
        ), big=big, little=little))  # fmt: skip
    (row, column), (other_row, other_column) = (divmod(PLACES.index(item.place), 3) for item in (first, second))
    height = "is in the same row as" if row == other_row else "is above"
    side = "is in the same column" if column == other_column else f"is more to the {_side(column, other_column)}"
    parts.append(_say(rng, (
        "The {one} {height} the {two} and {side}.",
        "As for the place, the {one} {height} the {two} and {side}.",
        "In the picture, the {one} {height} the {two} and {side}.",
    ), one=one, two=two, height=height, side=side))  # fmt: skip
    same = [name for name in ("colour", "shape") if getattr(first, name) == getattr(second, name)]
    same_words = ["color" if name == "colour" else name for name in same]
    parts += _maybe(rng, 0.8, (
        f"They have the same {same_words[0]}." if same else "They have a different color and a different shape.",
        f"Both share the same {same_words[0]}." if same else "They share neither color nor shape.",
    ))  # fmt: skip
    return question, " ".join(parts)


def _side(column: int, other: int) -> str:
    return "left" if column < other else "right"


def _bar_is(rng: np.random.Generator, index: int, bar: Bar) -> str:
    """The sentence that states one bar; `jaxspec.demo.scoring` reads every one of these templates."""
    return _say(rng, (
        "the {nth} bar is {colour} and reaches {value}.",
        "the {nth} bar is {colour} with a value of {value}.",
        "the {nth} bar, in {colour}, goes up to {value}.",
        "in the {nth} place there is a bar in {colour} that reaches {value}.",
        "the {nth} bar is {colour}, and its top is at {value}.",
    ), nth=ORDINALS[index], colour=bar.colour, value=NUMBERS[bar.value])  # fmt: skip


def _extremes(scene: Scene) -> tuple[Bar, Bar]:
    return max(scene.items, key=lambda bar: bar.value), min(scene.items, key=lambda bar: bar.value)


def _describe_chart(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    parts = [_say(rng, (
        "The picture shows a bar chart with {amount}.",
        "This is a chart with {amount}, and I go through them from left to right.",
        "I can see a chart of {amount}, each in a different color.",
        "There are {amount} in this simple chart.",
    ), amount=_amount(len(scene.items), "bar"))]  # fmt: skip
    parts += _background(rng, scene)
    parts += [_bar_is(rng, index, bar) for index, bar in enumerate(scene.items)]
    tallest, shortest = _extremes(scene)
    parts += _maybe(rng, 0.85, (
        "So the {tall} bar is the tallest and the {short} bar is the shortest.",
        "The tallest bar is {tall}, and the shortest bar is {short}.",
        "Clearly the {tall} bar is the tallest and the {short} bar is the shortest.",
    ), tall=tallest.colour, short=shortest.colour)  # fmt: skip
    parts += _maybe(
        rng, 0.3, ("That is all the chart shows.", "Nothing else is in the chart.", "That is all I can see.")
    )
    return describe_question(rng), " ".join(parts)


def _walk(scene: Scene, rng: np.random.Generator) -> list[str]:
    colours = _join([bar.colour for bar in scene.items])
    return [_say(rng, (
        "From left to right, the bars are {colours}.",
        "I go through the bars from left to right: {colours}.",
        "The colors of the bars from left to right are {colours}.",
    ), colours=colours)]  # fmt: skip


def _count_chart(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    limit = int(rng.integers(2, 7))
    found = [bar for bar in scene.items if bar.value > limit]
    question = _say(rng, (
        "How many bars are taller than {limit}?",
        "Count the bars that reach more than {limit}.",
        "What is the number of bars with a value of more than {limit}?",
    ), limit=NUMBERS[limit])  # fmt: skip
    parts = _walk(scene, rng) + [_bar_is(rng, index, bar) for index, bar in enumerate(scene.items)]
    if found:
        parts.append(_say(rng, (
            "The bars taller than {limit} are {names}.",
            "More than {limit} is reached by {names}.",
        ), limit=NUMBERS[limit], names=_join([bar.colour for bar in found])))  # fmt: skip
    else:
        parts.append(_say(rng, ("None of the bars is taller than {limit}.", "No bar reaches more than {limit}."),
                          limit=NUMBERS[limit]))  # fmt: skip
    parts.append(_say(rng, (
        "So the total is {amount}.", "That makes {amount} in total.", "So I count {amount} in the chart.",
    ), amount=_amount(len(found), "bar")))  # fmt: skip
    return question, " ".join(parts)


def _compare_chart(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return _compare_extremes(scene, rng)
    chosen = rng.permutation(len(scene.items))[:2].tolist()
    question = _say(rng, (
        "How much do the {one} bar and the {two} bar differ?",
        "Compare the {one} bar and the {two} bar.",
        "What is the difference between the {one} bar and the {two} bar?",
    ), one=scene.items[chosen[0]].colour, two=scene.items[chosen[1]].colour)  # fmt: skip
    left, right = sorted(chosen)
    first, second = scene.items[left], scene.items[right]
    parts = _walk(scene, rng) + [_bar_is(rng, left, first), _bar_is(rng, right, second)]
    if first.value == second.value:
        parts.append(_say(rng, (
            "So both bars have the same value, and the difference is zero.",
            "Both reach the same value, so they differ by zero.",
        )))  # fmt: skip
    else:
        high, low = (first, second) if first.value > second.value else (second, first)
        parts.append(_say(rng, (
            "So the {high} bar is taller than the {low} bar, and the difference is {amount}.",
            "The {high} bar is the taller bar, and the {low} bar is lower by {amount}.",
            "So the {high} bar is taller, and they differ by {amount}.",
        ), high=high.colour, low=low.colour, amount=NUMBERS[high.value - low.value]))  # fmt: skip
    parts += _background(rng, scene)
    return question, " ".join(parts)


def _compare_extremes(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    question = _say(rng, (
        "Which bar is the tallest?", "Which bar is the tallest, and which is the shortest?",
        "Please compare the bars.", "Where is the tallest bar?",
    ))  # fmt: skip
    tallest, shortest = _extremes(scene)
    parts = _walk(scene, rng) + [_bar_is(rng, index, bar) for index, bar in enumerate(scene.items)]
    parts.append(_say(rng, (
        "So the {colour} bar is the tallest with a value of {value}.",
        "The tallest bar is {colour}, since it reaches {value}.",
        "So the {colour} bar goes up the most, to {value}.",
    ), colour=tallest.colour, value=NUMBERS[tallest.value]))  # fmt: skip
    parts.append(_say(rng, (
        "The {colour} bar is the shortest with a value of {value}.",
        "The shortest bar is {colour}, since it only reaches {value}.",
    ), colour=shortest.colour, value=NUMBERS[shortest.value]))  # fmt: skip
    return question, " ".join(parts)


def _read(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    index = int(rng.integers(len(scene.items)))
    bar = scene.items[index]
    question = _say(rng, (
        "What is the value of the {colour} bar?", "How tall is the {colour} bar?",
        "What value does the {colour} bar have?", "Please read the {colour} bar.",
    ), colour=bar.colour)  # fmt: skip
    parts = _walk(scene, rng)
    parts.append(_say(rng, (
        "So the {colour} bar is the {nth} bar.", "The {colour} bar is the {nth} bar from the left.",
    ), colour=bar.colour, nth=ORDINALS[index]))  # fmt: skip
    parts.append(_say(rng, (
        "Its top is at the line for {value}, so its value is {value}.",
        "It goes up to the line for {value}, and so it has a value of {value}.",
        "The top of it reaches the line for {value}, which means a value of {value}.",
    ), value=NUMBERS[bar.value]))  # fmt: skip
    tall = [other.colour for other in scene.items if other.value > bar.value]
    short = [other.colour for other in scene.items if other.value < bar.value]
    if tall:
        parts.append(
            _say(rng, ("It is lower than {names}.", "It does not reach as high as {names}."), names=_join(tall))
        )
    else:
        parts.append(_say(rng, ("No other bar is taller.", "It is the tallest bar in the chart.")))
    if short:
        parts.append(_say(rng, ("It is taller than {names}.", "It goes up higher than {names}."), names=_join(short)))
    else:
        parts.append(_say(rng, ("No other bar is shorter.", "It is the shortest bar in the chart.")))
    parts += _background(rng, scene)
    return question, " ".join(parts)


_SHAPE_MAKERS = {"describe": _describe_shapes, "count": _count_shapes, "compare": _compare_shapes, "locate": _locate}
_CHART_MAKERS = {"describe": _describe_chart, "count": _count_chart, "compare": _compare_chart, "read": _read}
