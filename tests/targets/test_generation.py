"""What a folder says about end tokens and sampling counts: it is read from where transformers reads it, and what is not
applied is named."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxspec
from jaxspec.targets.generation import NEUTRAL, GenerationDefaults, stop_tokens
from tests.folders import llava_config

ABSENT = object()
TOKENIZER = SimpleNamespace(eos_token_id=7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spellings")
    llava_config().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def raw(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def write(folder: Path, raw: dict, top=ABSENT, text=ABSENT, generation: dict | None = None) -> None:
    """config.json with end tokens at its top level and in its text config, and generation_config.json."""
    raw = {**raw, "text_config": dict(raw["text_config"])}
    for part, value in ((raw, top), (raw["text_config"], text)):
        part.pop("eos_token_id", None)
        if value is not ABSENT:
            part["eos_token_id"] = value
    (folder / "config.json").write_text(json.dumps(raw))
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not None:
        file.write_text(json.dumps(generation))


def ids_of(folder: Path) -> tuple[int, ...]:
    return stop_tokens(folder, transformers.AutoConfig.from_pretrained(folder), TOKENIZER)


ids = st.integers(0, 98)
spellings = st.one_of(st.just(ABSENT), st.none(), ids, st.lists(ids, min_size=1, max_size=3, unique=True))


@settings(deadline=None, max_examples=40)
@given(top=spellings, text=spellings, generation=spellings, with_file=st.booleans())
def test_end_tokens_are_those_of_transformers(folder, raw, top, text, generation, with_file):
    """And where transformers would have none, or guesses by the model_type, the next place that names some counts."""
    file = {} if generation is ABSENT else {"eos_token_id": generation}
    write(folder, raw, top, text, file if with_file else None)
    if with_file and generation not in (ABSENT, None):
        expected = transformers.GenerationConfig.from_pretrained(folder).eos_token_id
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
        expected = transformers.GenerationConfig.from_model_config(config).eos_token_id
    expected = tuple(expected) if isinstance(expected, list) else (expected,)
    if all(value in (ABSENT, None) for value in (top, text, *([generation] if with_file else []))):
        expected = tuple(dict.fromkeys(token for token in (*expected, TOKENIZER.eos_token_id) if token is not None))
    assert ids_of(folder) == expected


@pytest.mark.parametrize(("value", "expected"), [([], (5,)), (-1, (5,)), ([3, 3, -1, 4], (3, 4))])
def test_ids_that_end_nothing(folder, raw, value, expected):
    write(folder, raw, top=5, generation={"eos_token_id": value})
    assert ids_of(folder) == expected


@pytest.mark.parametrize("value", ["2", 2.5, True, [2, "</s>"], [[2]], {"id": 2}])
@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_end_tokens_of_another_type(folder, raw, value, place):
    write(folder, raw, **({"top": value} if place == "config.json" else {"generation": {"eos_token_id": value}}))
    with pytest.raises(ValueError, match=rf"{folder / place}: eos_token_id must be an integer or a list of integers"):
        stop_tokens(folder, llava_config(), TOKENIZER)


QWEN = {"do_sample": True, "repetition_penalty": 1.05, "temperature": 1e-6, "bos_token_id": 1, "eos_token_id": [2, 3]}


def test_defaults_and_what_is_not_applied(folder, raw):
    asked = QWEN | {"suppress_tokens": [5, 6], "no_repeat_ngram_size": 3, "num_beams": 1, "max_length": 4096}
    write(folder, raw, generation=asked)
    defaults = GenerationDefaults.read(folder)
    assert defaults.repetition_penalty == 1.05 and defaults.do_sample is True and defaults.top_p is None
    assert defaults.not_applied() == {"suppress_tokens": [5, 6], "no_repeat_ngram_size": 3}
    expected = "asks for suppress_tokens [5, 6], no_repeat_ngram_size 3, which is not applied"
    assert defaults.warning() == f"{folder / 'generation_config.json'} {expected}"
    write(folder, raw, generation=QWEN)
    assert GenerationDefaults.read(folder).warning() is None


def test_neutral_values_are_not_named(folder, raw):
    """Those at which transformers changes nothing, as its own classes write them."""
    usual = transformers.GenerationConfig._get_default_generation_params()
    for said in (None, {}, NEUTRAL, usual, dict.fromkeys(NEUTRAL), {"top_k": 50.0, "temperature": 1}):
        write(folder, raw, generation=said)
        assert GenerationDefaults.read(folder).warning() is None, said


def test_defaults_in_older_configs(folder, raw):
    """Without generation_config.json they stand in config.json, where the top level comes before the text config."""
    text = raw["text_config"] | {"top_k": 5, "repetition_penalty": 2.0}
    write(folder, raw | dict(NEUTRAL))
    defaults = GenerationDefaults.read(folder)
    assert (defaults.top_k, defaults.do_sample) == (None, None)  # a list of transformers' own defaults asks for nothing
    write(folder, raw | {"repetition_penalty": 1.2, "text_config": text})
    defaults = GenerationDefaults.read(folder)
    assert (defaults.top_k, defaults.repetition_penalty) == (5, 1.2)
    file = folder / "generation_config.json"
    file.write_text("{}")
    defaults = GenerationDefaults.read(folder)
    assert (defaults.top_k, defaults.repetition_penalty) == (None, None)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("temperature", "hot", "a number"),
        ("repetition_penalty", [1.05], "a number"),
        ("top_k", 2.5, "an integer"),
        ("do_sample", "yes", "true or false"),
        ("bad_words_ids", 5, "a list"),
        ("top_p", True, "a number"),
        ("min_new_tokens", float("inf"), "an integer"),
    ],
)
def test_defaults_of_another_type(folder, raw, name, value, kind):
    write(folder, raw, generation={name: value})
    with pytest.raises(ValueError, match=rf"{folder / 'generation_config.json'}: {name} must be {kind}, got"):
        GenerationDefaults.read(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_broken_file(folder, raw, text):
    write(folder, raw)
    (folder / "generation_config.json").write_text(text)
    for read in (GenerationDefaults.read, ids_of):
        with pytest.raises(ValueError, match="generation_config.json"):
            read(folder)


def test_loading_warns_once(target, tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    for path in target.path.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "generation_config.json").write_text(json.dumps(QWEN | {"num_beams": 3}))
    with pytest.warns(UserWarning, match="asks for num_beams 3, which is not applied") as caught:
        loaded = jaxspec.load_target(folder)
    assert len([each for each in caught if "asks for" in str(each.message)]) == 1
    assert loaded.stop_token_ids == (2, 3) and loaded.generation_defaults.temperature == 1e-6
    (folder / "generation_config.json").write_text('{"top_p": "x"}')
    with pytest.raises(ValueError, match="top_p must be a number"):
        jaxspec.load_target(folder)
    (folder / "generation_config.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jaxspec.load_target(folder).generation_defaults.warning() is None
