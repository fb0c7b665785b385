"""Files of conversations in all their shapes become one shape; what is broken is named and left out."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from jaxspec.data.formats import check_turns, standard_record
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
        {"conversations": [system, ASKED, ANSWER]},
    ]
    source = ConversationFiles(written(folder, records))
    assert [source[index]["conversations"] for index in range(3)] == [[ASKED, ANSWER]] * 2 + [[system, ASKED, ANSWER]]
    assert [source[index]["id"] for index in range(3)] == ["0", "1", "2"]


BROKEN = {
    "missing": ({"image": "none.png", "conversations": [QUESTION, ANSWER]}, "none.png does not exist"),
    "silent": ({"conversations": []}, "it has no turns"),
    "twice": ({"conversations": [ASKED, ASKED, ANSWER]}, "turns must alternate"),
    "asked": ({"conversations": [ASKED]}, "turns must alternate"),
    "stranger": ({"conversations": [{"from": "bard", "value": "Hm."}]}, "a turn is by 'bard'; known: human"),
    "empty": ({"conversations": [ASKED, {"from": "gpt", "value": ""}]}, "an answer is empty"),
    "number": ({"conversations": [ASKED, {"from": "gpt", "value": 3}]}, "words are no string but int"),
    "marks": ({"image": "sub/a.png", "conversations": [QUESTION, ANSWER] * 2}, "it has 2 <image> marks for 1 images"),
    "blind": ({"conversations": [QUESTION, ANSWER]}, "it has 1 <image> marks for 0 images"),
    "audio": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type 'audio'"),
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


KEYS = ["conversations", "messages", "from", "role", "value", "content", "type", "image", "images", "id", "text"]
WORDS = st.sampled_from(["human", "gpt", "user", "image", "text", "<image>", "sub/a.png", "x" * 5000, "a\0b", ""])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(VALUES)
def test_whatever_a_record_is_it_is_read_or_refused(folder, value):
    try:
        record = standard_record({"conversations": value} if isinstance(value, list) else value, 0, folder / "images")
    except ValueError as error:
        assert str(error)
    else:
        check_turns(record["conversations"])


def test_a_built_set_holds_the_records_and_needs_the_files_no_more(folder):
    records = [
        {"id": "one", "image": "sub/a.png", "conversations": [QUESTION, ANSWER]},
        {"id": "two", "image": ["sub/b.jpg", "sub/a.png"], "conversations": [QUESTION, ANSWER, QUESTION, ANSWER]},
        {"id": "text é", "conversations": [ASKED, {"from": "gpt", "value": "Darum. 😀"}]},
        {"id": "damaged", "image": "broken.png", "conversations": [QUESTION, ANSWER]},
        {"id": "missing", "image": "none.png", "conversations": [QUESTION, ANSWER]},
    ]
    path, told = written(folder, records), []
    build_conversations(folder / "data", "mix", path, folder / "images", told.append)
    assert told[0] == "mix: 3 records, 2 with images; 2 skipped"
    assert [line.split(":")[0] for line in told[1:]] == ["  skipped missing", "  skipped damaged"]

    files = ConversationFiles(path, folder / "images")
    expected = {
        record["id"]: {**record, "images": [Path(image).read_bytes() for image in record["images"]]}
        for record in files
        if record["id"] != "damaged"
    }
    path.unlink()
    source, again = ConversationSource(folder / "data", "mix", needs_images=True), []
    assert len(source) == 3 and {record["id"]: record for record in source} == expected
    build_conversations(folder / "data", "mix", path, folder / "images", again.append)
    assert again[0].startswith("mix was made before; to make it anew, delete ") and again[1:] == told


def test_conversations_are_opened_by_what_they_are(folder):
    path = written(folder, [{"id": "one", "image": "sub/a.png", "conversations": [QUESTION, ANSWER]}])
    build_conversations(folder / "data", "pair", path, folder / "images", report=str)
    (prepared,) = (folder / "data/conversations/pair").iterdir()
    for source in (open_conversations(path, folder / "images"), open_conversations(prepared, needs_images=True)):
        assert len(source) == 1 and source[0]["id"] == "one" and len(source[0]["images"]) == 1
    scenes = open_conversations("scenes")
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


def test_refusals(folder):
    text = written(folder, [{"id": 1, "conversations": [ASKED, ANSWER]}])
    build_conversations(folder / "data", "text", text, report=str)
    with pytest.raises(ValueError, match="the data set 'text' in .* has no images, which this recipe needs"):
        ConversationSource(folder / "data", "text", needs_images=True)
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
    (folder / "records.json").write_text('{"conversations": []}\n{"conver')
    with pytest.raises(ValueError, match="neither a JSON list nor JSON lines: line 2"):
        ConversationFiles(folder / "records.json")
