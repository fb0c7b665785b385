"""Questions and answers about bar charts: describe, count, compare, read a value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxspec.demo.scenes import Bar, Chart
from jaxspec.demo.wording import NUMBERS, ORDINALS, amount, background, describe_question, join, maybe, say


def _bar_is(rng: np.random.Generator, index: int, bar: Bar) -> str:
    """The sentence that states one bar; `jaxspec.demo.scoring` reads every one of these templates."""
    return say(rng, (
        "the {nth} bar is {colour} and reaches {value}.",
        "the {nth} bar is {colour} with a value of {value}.",
        "the {nth} bar, in {colour}, goes up to {value}.",
        "in the {nth} place there is a bar in {colour} that reaches {value}.",
        "the {nth} bar is {colour}, and its top is at {value}.",
    ), nth=ORDINALS[index], colour=bar.colour, value=NUMBERS[bar.value])  # fmt: skip


def _extremes(scene: Chart) -> tuple[Bar, Bar]:
    return max(scene.items, key=lambda bar: bar.value), min(scene.items, key=lambda bar: bar.value)


def _describe(scene: Chart, rng: np.random.Generator) -> tuple[str, str]:
    parts = [say(rng, (
        "The picture shows a bar chart with {amount}.",
        "This is a chart with {amount}, and I go through them from left to right.",
        "I can see a chart of {amount}, each in a different color.",
        "There are {amount} in this simple chart.",
    ), amount=amount(len(scene.items), "bar"))]  # fmt: skip
    parts += background(rng, scene)
    parts += [_bar_is(rng, index, bar) for index, bar in enumerate(scene.items)]
    tallest, shortest = _extremes(scene)
    parts += maybe(rng, 0.85, (
        "So the {tall} bar is the tallest and the {short} bar is the shortest.",
        "The tallest bar is {tall}, and the shortest bar is {short}.",
        "Clearly the {tall} bar is the tallest and the {short} bar is the shortest.",
    ), tall=tallest.colour, short=shortest.colour)  # fmt: skip
    parts += maybe(
        rng, 0.3, ("That is all the chart shows.", "Nothing else is in the chart.", "That is all I can see.")
    )
    return describe_question(rng), " ".join(parts)


def _walk(scene: Chart, rng: np.random.Generator) -> list[str]:
    colours = join([bar.colour for bar in scene.items])
    return [say(rng, (
        "From left to right, the bars are {colours}.",
        "I go through the bars from left to right: {colours}.",
        "The colors of the bars from left to right are {colours}.",
    ), colours=colours)]  # fmt: skip


def _count(scene: Chart, rng: np.random.Generator) -> tuple[str, str]:
    limit = int(rng.integers(2, 7))
    found = [bar for bar in scene.items if bar.value > limit]
    question = say(rng, (
        "How many bars are taller than {limit}?",
        "Count the bars that reach more than {limit}.",
        "What is the number of bars with a value of more than {limit}?",
    ), limit=NUMBERS[limit])  # fmt: skip
    parts = _walk(scene, rng) + [_bar_is(rng, index, bar) for index, bar in enumerate(scene.items)]
    if found:
        parts.append(say(rng, (
            "The bars taller than {limit} are {names}.",
            "More than {limit} is reached by {names}.",
        ), limit=NUMBERS[limit], names=join([bar.colour for bar in found])))  # fmt: skip
    else:
        parts.append(say(rng, ("None of the bars is taller than {limit}.", "No bar reaches more than {limit}."),
                          limit=NUMBERS[limit]))  # fmt: skip
    parts.append(say(rng, (
        "So the total is {amount}.", "That makes {amount} in total.", "So I count {amount} in the chart.",
    ), amount=amount(len(found), "bar")))  # fmt: skip
    return question, " ".join(parts)


def _compare(scene: Chart, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < 0.5:
        return _compare_extremes(scene, rng)
    chosen = rng.permutation(len(scene.items))[:2].tolist()
    question = say(rng, (
        "How much do the {one} bar and the {two} bar differ?",
        "Compare the {one} bar and the {two} bar.",
        "What is the difference between the {one} bar and the {two} bar?",
    ), one=scene.items[chosen[0]].colour, two=scene.items[chosen[1]].colour)  # fmt: skip
    left, right = sorted(chosen)
    first, second = scene.items[left], scene.items[right]
    parts = _walk(scene, rng) + [_bar_is(rng, left, first), _bar_is(rng, right, second)]
    if first.value == second.value:
        parts.append(say(rng, (
            "So both bars have the same value, and the difference is zero.",
            "Both reach the same value, so they differ by zero.",
        )))  # fmt: skip
    else:
        high, low = (first, second) if first.value > second.value else (second, first)
        parts.append(say(rng, (
            "So the {high} bar is taller than the {low} bar, and the difference is {amount}.",
            "The {high} bar is the taller bar, and the {low} bar is lower by {amount}.",
            "So the {high} bar is taller, and they differ by {amount}.",
        ), high=high.colour, low=low.colour, amount=NUMBERS[high.value - low.value]))  # fmt: skip
    parts += background(rng, scene)
    return question, " ".join(parts)


def _compare_extremes(scene: Chart, rng: np.random.Generator) -> tuple[str, str]:
    question = say(rng, (
        "Which bar is the tallest?", "Which bar is the tallest, and which is the shortest?",
        "Please compare the bars.", "Where is the tallest bar?",
    ))  # fmt: skip
    tallest, shortest = _extremes(scene)
    parts = _walk(scene, rng) + [_bar_is(rng, index, bar) for index, bar in enumerate(scene.items)]
    parts.append(say(rng, (
        "So the {colour} bar is the tallest with a value of {value}.",
        "The tallest bar is {colour}, since it reaches {value}.",
        "So the {colour} bar goes up the most, to {value}.",
    ), colour=tallest.colour, value=NUMBERS[tallest.value]))  # fmt: skip
    parts.append(say(rng, (
        "The {colour} bar is the shortest with a value of {value}.",
        "The shortest bar is {colour}, since it only reaches {value}.",
    ), colour=shortest.colour, value=NUMBERS[shortest.value]))  # fmt: skip
    return question, " ".join(parts)


def _read(scene: Chart, rng: np.random.Generator) -> tuple[str, str]:
    index = int(rng.integers(len(scene.items)))
    bar = scene.items[index]
    question = say(rng, (
        "What is the value of the {colour} bar?", "How tall is the {colour} bar?",
        "What value does the {colour} bar have?", "Please read the {colour} bar.",
    ), colour=bar.colour)  # fmt: skip
    parts = _walk(scene, rng)
    parts.append(say(rng, (
        "So the {colour} bar is the {nth} bar.", "The {colour} bar is the {nth} bar from the left.",
    ), colour=bar.colour, nth=ORDINALS[index]))  # fmt: skip
    parts.append(say(rng, (
        "Its top is at the line for {value}, so its value is {value}.",
        "It goes up to the line for {value}, and so it has a value of {value}.",
        "The top of it reaches the line for {value}, which means a value of {value}.",
    ), value=NUMBERS[bar.value]))  # fmt: skip
    tall = [other.colour for other in scene.items if other.value > bar.value]
    short = [other.colour for other in scene.items if other.value < bar.value]
    if tall:
        parts.append(say(rng, ("It is lower than {names}.", "It does not reach as high as {names}."), names=join(tall)))
    else:
        parts.append(say(rng, ("No other bar is taller.", "It is the tallest bar in the chart.")))
    if short:
        parts.append(say(rng, ("It is taller than {names}.", "It goes up higher than {names}."), names=join(short)))
    else:
        parts.append(say(rng, ("No other bar is shorter.", "It is the shortest bar in the chart.")))
    parts += background(rng, scene)
    return question, " ".join(parts)


MAKERS: dict[str, Callable[[Chart, np.random.Generator], tuple[str, str]]] = {
    "describe": _describe,
    "count": _count,
    "compare": _compare,
    "read": _read,
}
"""By kind of question; each makes one with its answer."""
