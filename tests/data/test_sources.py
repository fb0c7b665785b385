"""Files of conversations in all their shapes become one shape; what is broken is named and left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxspec.data.formats import MARK, check_turns, standard_record
from jaxspec.data.prompts import read_conversation
from jaxspec.data.sources import ConversationFiles, ConversationSource, build_conversations, open_conversations
from jaxspec.demo.generation import conversation_of, numbered_scene
from jaxspec.demo.scenes import FRAME

QUESTION, ANSWER = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}
ASKED = {"from": "human", "value": "Why?"}


@pytest.fixture
def folder(tmp_path):
    for name, size in (("a.png", (8, 6)), ("b.jpg", (5, 9))):
        pixels = np.random.default_rng(size).integers(0, 256, (*size[::-1], 3), np.uint8)
        (tmp_path / "images/sub").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "images/sub" / name)
    (tmp_path / "images/broken.png").write_bytes((tmp_path / "images/sub/a.png").read_bytes()[:50])
    return tmp_path


def written(folder, records, lines=False):
    path = folder / "records.json"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


LAYOUTS = {
    "LLaVA": {"id": "7", "image": "sub/a.png", "conversations": [QUESTION, ANSWER]},
    "several images": {"id": "7", "images": ["sub/a.png"], "conversations": [QUESTION, ANSWER]},
    "messages": {
        "id": 7,
        "images": ["sub/a.png"],
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "That."}],
    },
    "parts": {
        "id": 7,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image", "image": "sub/a.png"}, {"type": "text", "text": "\nWhat?"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        ],
    },
    "user and assistant": {
        "id": "7",
        "image": "sub/a.png",
        "conversations": [{"from": "user", "value": "<image>\nWhat?"}, {"from": "assistant", "value": "That."}],
    },
    "unmarked": {"id": "7", "image": "sub/a.png", "conversations": [{**QUESTION, "value": "What?"}, ANSWER]},
    "none beside": {"id": "7", "image": "sub/a.png", "images": [], "conversations": [QUESTION, ANSWER]},
    "nulls beside": {
        "id": "7",
        "image": None,
        "images": ["sub/a.png"],
        "conversations": [{"from": None, "role": "user", "value": None, "content": "<image>\nWhat?"}, ANSWER],
    },
}


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(folder, layout, lines):
    source = ConversationFiles(written(folder, [LAYOUTS[layout]] * 2, lines), folder / "images")
    assert len(source) == 2 and source.skipped == []
    expected = {"id": "7", "images": [str(folder / "images/sub/a.png")], "conversations": [QUESTION, ANSWER]}
    assert source[0] == source[1] == expected


def test_pieces_of_long_conversations_lose_what_has_no_partner(folder):
    system = {"from": "system", "value": "Be brief."}
    records = [
        {"conversations": [ANSWER, ASKED, ANSWER]},
        {"conversations": [ASKED, ANSWER, ASKED]},
        {"conversations": [ASKED, ANSWER, {"role": "user", "content": [{"type": "image", "image": "lost.png"}]}]},
        {"conversations": [system, ASKED, ANSWER]},
    ]
    source = ConversationFiles(written(folder, records))
    assert [record["conversations"] for record in source] == [[ASKED, ANSWER]] * 3 + [[system, ASKED, ANSWER]]
    assert [record["id"] for record in source] == ["0", "1", "2", "3"]


BROKEN = {
    "missing": ({"image": "none.png", "conversations": [QUESTION, ANSWER]}, "none.png does not exist"),
    "silent": ({"conversations": []}, "it has no turns"),
    "twice": ({"conversations": [ASKED, ASKED, ANSWER]}, "turns must alternate"),
    "asked": ({"conversations": [ASKED]}, "turns must alternate"),
    "stranger": ({"conversations": [{"from": "bard", "value": "Hm."}]}, "a turn is by 'bard'; known: human"),
    "empty": ({"conversations": [ASKED, {"from": "gpt", "value": ""}]}, "an answer is empty"),
    "number": ({"conversations": [ASKED, {"from": "gpt", "value": 3}]}, "must be a string or a list of parts, got int"),
    "marks": ({"image": "sub/a.png", "conversations": [QUESTION, ANSWER] * 2}, "it has 2 <image> marks for 1 images"),
    "blind": ({"conversations": [QUESTION, ANSWER]}, "it has 1 <image> marks for 0 images"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "got {'type': 'audio'}"),
    "two": ({"image": "sub/a.png", "images": ["sub/b.jpg"], "conversations": [ASKED, ANSWER]}, "are not the same"),
    "other": (
        {"images": ["sub/a.png"], "messages": [{"role": "user", "content": [{"type": "image", "image": "b"}]}, ANSWER]},
        "it has 0 <image> marks (beside 1 that name their own) for 1 images",
    ),
    "group": ({"conversations": [{"from": ["human"], "value": "Why?"}, ANSWER]}, "a turn is by ['human']; known"),
    "half": ({"conversations": [ASKED, {"from": "gpt", "value": "\ud800"}]}, "a gpt turn cannot be written as UTF-8"),
    "half path": ({"image": "\ud800", "conversations": [ASKED, ANSWER]}, "an image's path cannot be written as UTF-8"),
    "half \ud800": ({"conversations": [ASKED, ANSWER]}, "its id cannot be written as UTF-8: character 5 is '\\ud800'"),
}


def test_broken_records_are_left_out_and_named(folder):
    good = {"id": "good", "conversations": [ASKED, ANSWER]}
    records = [good, "words", *({"id": name, **record} for name, (record, _) in BROKEN.items())]
    source = ConversationFiles(written(folder, records), folder / "images")
    assert len(source) == 1 and source[0]["id"] == "good"
    reasons = dict(source.skipped)
    assert list(reasons) == ["1", *BROKEN] and reasons["1"] == "it is no JSON object but str"
    for name, (_, message) in BROKEN.items():
        assert message in reasons[name]


def test_turns_that_an_encoder_is_given_are_checked_for_their_text():
    with pytest.raises(ValueError, match="a human turn cannot be written as UTF-8: character 1 is"):
        check_turns([{"from": "human", "value": "a\udfff"}, ANSWER])


def test_files_that_are_no_json(folder):
    for content, reason in (
        (b'{"conversations": []}\n{"conver', "line 2 is not JSON"),
        (b"[" * 100_000, "the list is not JSON: .*recursion"),
        (b'["\xff"]', "'utf-8' codec can't decode"),
    ):
        (folder / "records.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"records.json is neither a JSON list nor JSON lines: {reason}"):
            ConversationFiles(folder / "records.json")


TURN_KEYS = ["from", "role", "value", "content", "type", "text"]
KEYS = ["prompt", "conversations", "messages", *TURN_KEYS, "image", "images", "id"]
HALVES = ["\ud800", "a\udc80"]  # of surrogate pairs, as JSON may hold them
WORDS = st.sampled_from(
    ["human", "gpt", "user", "image", "text", "<image>", "sub/a.png", "x" * 5000, "a\0b", "", *HALVES]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=12,
)


PARTS = st.lists(VALUES | st.fixed_dictionaries({"type": WORDS}, optional={"text": WORDS, "image": WORDS}), max_size=3)


def turns(speakers):
    return st.fixed_dictionaries({"from": speakers, "value": WORDS | PARTS | VALUES})


PAIRS = st.lists(st.tuples(turns(st.just("human")), turns(st.just("gpt"))).map(list), min_size=1, max_size=2)
RECORDS = VALUES | st.fixed_dictionaries(
    {"conversations": PAIRS.map(lambda pairs: sum(pairs, [])) | st.lists(VALUES | turns(WORDS | VALUES), max_size=4)},
    optional={"id": WORDS | VALUES, "image": WORDS | VALUES, "images": st.lists(WORDS) | VALUES},
)
FUZZ = settings(deadline=None, max_examples=500, suppress_health_check=list(HealthCheck))


@FUZZ
@given(RECORDS)
def test_whatever_a_record_is_it_is_read_or_refused(folder, value):
    try:
        record = standard_record(value, 0, folder / "images")
    except ValueError as error:
        str(error).encode()
    else:
        check_turns(record["conversations"])
        assert sum(turn["value"].count(MARK) for turn in record["conversations"]) == len(record["images"])
        json.dumps(record, ensure_ascii=False).encode()


@FUZZ
@given(RECORDS)
def test_whatever_a_prompt_is_it_is_read_or_refused(value):
    try:
        asked = read_conversation(value, 0)
    except ValueError as error:
        str(error).encode()
    else:
        parts = [part for turn in asked.turns for part in turn]
        assert parts.count({"type": "image"}) == len(asked.images)
        assert all(part.keys() == {"type", "text"} for part in parts if part != {"type": "image"})
        json.dumps([asked.id, asked.system, asked.turns, asked.images], ensure_ascii=False).encode()


def test_a_built_set_holds_the_records_and_needs_the_files_no_more(folder):
    records = [
        {"id": "one", "image": "sub/a.png", "conversations": [QUESTION, ANSWER]},
        {"id": "two", "image": ["sub/b.jpg", "sub/a.png"], "conversations": [QUESTION, ANSWER, QUESTION, ANSWER]},
        {"id": "text é", "conversations": [ASKED, {"from": "gpt", "value": "Darum. 😀"}]},
        {"id": "damaged", "image": "broken.png", "conversations": [QUESTION, ANSWER]},
        {"id": "half \ud800", "conversations": [ASKED, ANSWER]},
    ]
    path, told = written(folder, records), []
    build_conversations(folder / "data", "mix", path, folder / "images", told.append)
    assert told[0] == "mix: 3 records, 2 with images; 2 skipped"
    assert [line.split(":")[0] for line in told[1:]] == [r"  skipped half \ud800", "  skipped damaged"]

    files = ConversationFiles(path, folder / "images")
    expected = {
        record["id"]: {**record, "images": [Path(image).read_bytes() for image in record["images"]]}
        for record in files
        if record["id"] != "damaged"
    }
    path.unlink()
    source, again = ConversationSource(folder / "data", "mix"), []
    assert source.has_images and len(source) == 3 and {record["id"]: record for record in source} == expected
    build_conversations(folder / "data", "mix", path, folder / "images", again.append)
    assert again[0].startswith("mix was made before; to make it anew, delete ") and again[1:] == told


def test_conversations_are_opened_by_what_they_are(folder):
    path = written(folder, [{"id": "one", "image": "sub/a.png", "conversations": [QUESTION, ANSWER]}])
    build_conversations(folder / "data", "pair", path, folder / "images", report=str)
    (prepared,) = (folder / "data/conversations/pair").iterdir()
    for source in (open_conversations(path, folder / "images"), open_conversations(prepared)):
        assert len(source) == 1 and source[0]["id"] == "one" and len(source[0]["images"]) == 1
        assert source.has_images is True
    scenes = open_conversations("scenes")
    assert scenes.has_images is True
    (picture,) = scenes[17]["images"]
    assert picture.size == (FRAME, FRAME) and len(scenes) == 40_000
    assert scenes[17]["conversations"] == conversation_of(numbered_scene("train", 17)[1])
    with pytest.raises(ValueError, match="image_folder is for .json and .jsonl files; scenes brings its images"):
        open_conversations("scenes", folder)
    with pytest.raises(FileNotFoundError, match="no file"):
        open_conversations(folder / "none.json")
    other = folder / "data/answers/pair/1.0.0"
    other.mkdir(parents=True)
    (other / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no conversations made by build_conversations, but answers"):
        open_conversations(other)


def test_images_that_come_late_are_seen(folder):
    late = [{"conversations": [ASKED, ANSWER]}] * 80 + [{"image": "sub/a.png", "conversations": [QUESTION, ANSWER]}]
    source = open_conversations(written(folder, late), folder / "images")
    assert source.has_images is True and len(source) == 81


def test_refusals(folder):
    text = written(folder, [{"id": 1, "conversations": [ASKED, ANSWER]}])
    prepared = build_conversations(folder / "data", "text", text, report=str)
    for data in (text, prepared):
        assert open_conversations(data).has_images is False
    (prepared / "metadata.json").unlink()
    assert open_conversations(prepared).has_images is None
    with pytest.raises(FileNotFoundError, match="no data set 'other' in .*; make it with: python -m jaxspec prepare"):
        ConversationSource(folder / "data", "other")
    with pytest.raises(FileNotFoundError, match="no file"):
        ConversationFiles(folder / "none.json")
    with pytest.raises(ValueError, match="can be used; the first, 0: it has no turns"):
        ConversationFiles(written(folder, [{"conversations": []}]))
    damaged = written(folder, [{"id": 9, "image": "broken.png", "conversations": [QUESTION, ANSWER]}])
    with pytest.raises(ValueError, match="none of the 1 records can be used; the last, 9: image 1 .* cannot be read"):
        build_conversations(folder / "data", "damaged", damaged, folder / "images", str)
    with pytest.raises(FileNotFoundError, match="no data set 'damaged'"):
        ConversationSource(folder / "data", "damaged")
