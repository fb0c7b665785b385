"""Answers are true, can be read back, and keep to a small vocabulary."""

import re

import pytest

from jaxspec.demo.generation import numbered_scene
from jaxspec.demo.language import CHART_KINDS, SHAPE_KINDS, ask_kind
from jaxspec.demo.scenes import Bar, SceneObject
from jaxspec.demo.scoring import Score, objects_of, parse_objects, score_objects
from jaxspec.demo.wording import NUMBERS


def test_every_describe_answer_reads_back_as_the_truth():
    found = 0
    for index in range(900):
        scene, turns = numbered_scene("validation", index)
        for turn in turns:
            if turn.kind == "describe":
                found += 1
                assert parse_objects(turn.answer) == objects_of(scene), turn.answer
    assert found >= 500


def test_turns_differ_in_kind_and_suit_the_scene():
    first = 0
    for index in range(500):
        scene, turns = numbered_scene("train", index)
        kinds = [turn.kind for turn in turns]
        assert 2 <= len(turns) <= 3 and len(set(kinds)) == len(kinds)
        assert set(kinds) <= set(SHAPE_KINDS if scene.kind == "shapes" else CHART_KINDS)
        first += kinds[0] == "describe"
    assert 250 < first < 350


def test_counts_and_values_are_true():
    checked = 0
    for index in range(400):
        scene, turns = numbered_scene("test", index)
        for turn in turns:
            if turn.kind == "count" and scene.kind == "shapes":
                noun = re.search(r"(circle|square|triangle|star|cross|ring)|(\w+) objects", turn.question)
                name = noun[1] or noun[2]
                total = sum(name in (item.shape, item.colour) for item in scene.items)
                assert re.findall("|".join(NUMBERS), turn.answer.split(". ")[-1]) == [NUMBERS[total]], turn
                checked += 1
            elif turn.kind == "read":
                value = next(bar.value for bar in scene.items if f"the {bar.colour} bar" in turn.question)
                assert f"the line for {NUMBERS[value]}" in turn.answer
                checked += 1
    assert checked > 100


def test_the_vocabulary_is_small():
    text = " ".join(t.question + " " + t.answer for i in range(1500) for t in numbered_scene("train", i)[1])
    assert 120 < len(set(re.findall("[a-z]+", text.lower()))) <= 250


def test_scores_count_multisets_and_add_up():
    truth = [SceneObject("center", "red", "star", "large"), Bar("blue", 3), Bar("blue", 3)]
    claims = [SceneObject("center", "red", "star", "small"), Bar("blue", 3), Bar("green", 3)]
    assert score_objects(claims, truth) == Score(2, 3, 3)
    assert score_objects(claims, truth, strict=True) == Score(1, 3, 3)
    total = sum([Score(2, 3, 3), Score(1, 1, 3)], Score())
    assert (total.precision, total.recall) == (0.75, 0.5) and total.f1 == pytest.approx(0.6)
    assert score_objects([], truth).f1 == 0.0 and parse_objects("Nothing. A red bar? <s>") == []


def test_an_unsuitable_kind_is_named():
    scene, _ = numbered_scene("train", 0)
    with pytest.raises(ValueError, match="kind must be one of"):
        ask_kind(scene, "poem", None)
