"""Prompt sources: what a record asks, in whichever shape it comes, and what is wrong with those that ask nothing."""

import json

import pytest

from jaxspec.data.formats import parse_json
from jaxspec.data.prompts import SUFFIXES, open_prompts, read_conversation, with_suffix

IMAGE = {"type": "image"}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def human(words: str) -> dict:
    return {"from": "human", "value": words}


SHAPES = {
    "prompt": {"prompt": "What?", "image": "a.png"},
    "marked prompt": {"prompt": "<image>\nWhat?", "images": ["a.png"]},
    "messages": {"messages": [{"role": "user", "content": "What?"}], "image": "a.png"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text("What?")]}]},
    "llava": {"conversations": [human("What?\n<image>"), {"from": "gpt", "value": "That."}], "image": "a.png"},
    "marked parts": {"messages": [{"role": "user", "content": [text("<image>\nWhat?")]}], "image": "a.png"},
    "null beside": {"prompt": "What?", "images": None, "image": "a.png"},
    "none beside": {"prompt": "What?", "images": [], "image": "a.png"},
    "empty beside": {"prompt": "What?", "images": ["a.png"], "image": ""},
    "twice": {"prompt": "What?", "images": ["a.png"], "image": "a.png"},
    "parts and list": {
        "messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, text("What?")]}],
        "images": ["a.png"],
    },
}
HALF = "\ud83d"  # of a surrogate pair, as JSON may hold it


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_asks_the_same(shape):
    asked = read_conversation({"id": 7, **SHAPES[shape]}, 0)
    assert (asked.id, asked.system, asked.images) == ("7", (), ("a.png",))
    assert asked.turns == ([IMAGE, text("What?")],)


def test_turns_keep_their_images_and_the_system_message_stays():
    turns = [human("<image>Left?"), {"from": "gpt", "value": "Old answer."}, human("<image><image>These?")]
    asked = read_conversation(
        {"conversations": [{"from": "system", "value": "Be kind."}, *turns], "image": ["a", "b", "c"]}, 4
    )
    assert asked.id == "record 4" and asked.system == ({"role": "system", "content": [text("Be kind.")]},)
    assert asked.turns == ([IMAGE, text("Left?")], [IMAGE, IMAGE, text("These?")])
    assert asked.images == ("a", "b", "c")


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("What?", "a record must be an object, got str"),
        ({"image": "a.png"}, "needs one of prompt, messages, conversations; it has none"),
        ({"prompt": 5}, "a prompt must be text, got int"),
        ({"prompt": "What?", "messages": []}, "it has prompt, messages"),
        ({"prompt": " <image>", "image": "a"}, "a user turn has no text"),
        ({"prompt": "<image><image>What?", "image": "a.png"}, "it has 2 <image> marks for 1 images"),
        ({"prompt": "<image>What?", "images": ["a.png", "b.png"]}, "it has 1 <image> marks for 2 images"),
        (
            {"messages": SHAPES["parts"]["messages"], "images": ["b.png"]},
            r"it has 0 <image> marks \(beside 1 that name their own\) for 1 images",
        ),
        ({"prompt": "What?", "image": 3}, "images must be paths, got 3"),
        ({"prompt": "What?", "images": ["a.png", ""]}, r"images must be paths, got \['a.png', ''\]"),
        ({"prompt": "What?", "image": "a.png", "images": ["b.png"]}, "its image and its images are not the same"),
        ({"conversations": []}, "conversations must be a list of turns"),
        ({"conversations": "Hello"}, "conversations must be a list of turns, got str"),
        ({"conversations": [{"from": "human"}]}, "a turn's words must be a string or a list of parts, got NoneType"),
        ({"conversations": ["Hello"]}, "a turn is no JSON object but str"),
        ({"conversations": [{"from": "gpt", "value": "That."}]}, "no user turn"),
        ({"conversations": [{"from": "robot", "value": "That."}]}, "a turn is by 'robot'; known: human"),
        ({"conversations": [{"from": ["human"], "value": "That."}]}, r"a turn is by \['human'\]; known: human"),
        ({"conversations": [{"value": "That."}]}, "a turn is by None; known: human"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "a content part"),
        (
            {"messages": [{"role": "system", "content": [{"type": "image"}, text("Look.")]}], "image": "a.png"},
            "a turn by system holds an image; only those by user may",
        ),
        ({"conversations": [human("What?"), {"from": "gpt", "value": "<image>"}], "image": "a"}, "turn by assistant"),
        ({"prompt": f"hi {HALF}"}, r"a turn by user cannot be written as UTF-8: character 3 is '\\ud83d'"),
        ({"conversations": [{"from": "system", "value": HALF}, human("What?")]}, "a turn by system cannot be written"),
        ({"prompt": "What?", "image": f"{HALF}.png"}, "an image's path cannot be written as UTF-8: character 0 is"),
        ({"prompt": "What?", "id": f"no. {HALF}"}, "its id cannot be written as UTF-8: character 4 is"),
    ],
)
def test_broken_records(record, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_conversation(record, 0)


def test_suffixes():
    question = [IMAGE, text("What?\nAnswer the question using a single word or phrase.")]
    assert with_suffix(question, "") == question
    assert with_suffix([text("What?")], "vispec") == [text("What? Please answer with at least 1000 words.")]
    assert with_suffix(question, "specvlm") == [IMAGE, text(f"What?\n{SUFFIXES['specvlm']}")]
    assert with_suffix([text("What?")], " In verse.") == [text("What? In verse.")]


def test_files_that_hold_no_records(tmp_path):
    for content, sentence in ((b"{", "is not JSON"), (b'{"a": 1}', "must hold a list"), (b"[]", "has no records")):
        (tmp_path / "data.json").write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            open_prompts(str(tmp_path / "data.json"))
    with pytest.raises(FileNotFoundError, match="no file"):
        open_prompts(str(tmp_path / "other.jsonl"))
    with pytest.raises(FileNotFoundError, match="no image folder"):
        open_prompts(str(tmp_path / "data.json"), image_folder=tmp_path / "pictures")
    with pytest.raises(FileNotFoundError, match="no data set that tensorflow-datasets has prepared"):
        open_prompts("no_such_set")
    with pytest.raises(ValueError, match="split must be one of train, validation, test, got 'dev'"):
        open_prompts("scenes", "dev")
    with pytest.raises(ValueError, match="split is for scenes and tensorflow-datasets; .*.json' has no split 'dev'"):
        open_prompts(str(tmp_path / "data.json"), "dev")
    with pytest.raises(ValueError, match="'scenes' brings its images along"):
        open_prompts("scenes", image_folder=tmp_path)


@pytest.mark.parametrize("line", [b"{", b"[" * 100_000, b'{"prompt": "\xff"}'], ids=["cut", "deep", "latin"])
def test_a_line_that_is_not_json_is_refused_alone(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "What?"}\n' + line)
    source = open_prompts(str(path))
    assert len(source) == 2 and source[0] == {"prompt": "What?"}
    with pytest.raises(ValueError, match="line 2 is not JSON: "):
        source[1]


def test_turns_of_a_prepared_set_that_are_no_text_are_refused():
    with pytest.raises(ValueError, match="conversations is not JSON: .* not list"):
        parse_json([human("What?")], "conversations")


def test_a_source_is_named_after_its_content(tmp_path):
    path, names = tmp_path / "data.jsonl", set()
    for prompts in (["a", "b"], ["a", "c"]):
        path.write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
        source = open_prompts(str(path))
        assert [record["prompt"] for record in source] == prompts and source.image_folder == tmp_path.resolve()
        names.add(source.identity)
    assert len(names) == 2
