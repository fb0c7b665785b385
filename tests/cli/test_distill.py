"""`python -m jaxspec distill`: the answers are the target's own, however the run that made them went."""

import io
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import jaxspec
from jaxspec.cli import main
from jaxspec.cli.distill import shown
from jaxspec.data.answers import AnswerSource
from jaxspec.data.prompts import SUFFIXES, open_prompts
from jaxspec.data.scenes import load_scenes
from jaxspec.demo.generation import numbered_scene
from jaxspec.demo.scenes import render
from jaxspec.distillation import Distiller, DistillSettings, engine_settings
from jaxspec.prompting import encode_prompt
from jaxspec.serving.engine import Engine
from jaxspec.stopping import Stopped

LIMIT = 6
SAMPLED = ("--temperature", "1", "--sampled-share", "0.5", "--seed", "5")


def distill(models, data, output, *arguments) -> int:
    limits = ["--max-new-tokens", str(LIMIT), "--max-length", "256", "--batch-size", "2", "--shard-size", "2"]
    files = ["--data", str(data), "--output", str(output), "--target", str(models[0]), "--compilation-cache", ""]
    return main(["distill", *files, *limits, *arguments])


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a set but the command that made it."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    about = json.loads(files.pop("distill.json"))
    return files | {"distill.json": {name: value for name, value in about.items() if name != "command"}}


def question(index: int) -> str:
    return numbered_scene("test", index)[1][0].question


@pytest.fixture(scope="module", autouse=True)
def generator(models):
    """The autoregressive one, whose programs all engines share: what is compiled for one serves the next."""
    shared = jaxspec.Generator(jaxspec.load_target(models[0]), max_length=256)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jaxspec.serving.engine,
            "Generator",
            lambda target, drafter=None, *rest: jaxspec.Generator(target, drafter, *rest) if drafter else shared,
        )
        yield shared


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(3):
        render(numbered_scene("test", index)[0]).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def jsonl(pictures) -> Path:
    """Five records; with two per part, the last part is a short one."""
    lines = [{"id": f"q{i}", "prompt": question(i), "image": f"{i % 3}.png"} for i in range(5)]
    path = pictures / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def whole(models, jsonl, tmp_path_factory) -> Path:
    """The set of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    assert distill(models, jsonl, output, *SAMPLED) == 0
    return output


def check(source: AnswerSource, generator, asked: list[tuple[str, list]], sampling) -> None:
    """The set holds the target's answers to these questions about these pictures."""
    assert len(source) == len(asked)
    for record, (words, images), params in zip(source, asked, sampling, strict=True):
        expected = generator.generate(words, images, params, LIMIT)
        prompt = encode_prompt(generator.target, words, record["images"])
        np.testing.assert_array_equal(record["prompt_ids"], prompt.input_ids)
        np.testing.assert_array_equal(record["answer_ids"], expected.tokens)
        assert (record["temperature"], record["seed"]) == (params.temperature, params.seed)


def seeds(count: int) -> list[jaxspec.SamplingParams]:
    return [jaxspec.SamplingParams(seed=index) for index in range(count)]


def test_json_lines(whole, generator, pictures):
    source = AnswerSource(whole)
    sampling = [jaxspec.SamplingParams(temperature=index % 2, seed=5 + index) for index in range(5)]
    asked = [(question(index), [pictures / f"{index % 3}.png"]) for index in range(5)]
    check(source, generator, asked, sampling)
    assert [record["id"] for record in source] == ["q0", "q1", "q2", "q3", "q4"]
    assert source.about["target_fingerprint"] == generator.target.fingerprint()
    assert len(list(whole.glob("*.array_record-*-of-00003"))) == 3


def test_llava_json(models, generator, pictures, tmp_path):
    """Text alone, one image, two; images in their own folder, the set moved to another."""
    asked = ("What is a chart for?", f"<image>\n{question(1)}", "<image>\nCompare them.\n<image>")
    turns = [[{"from": "human", "value": words}, {"from": "gpt", "value": "An old answer."}] for words in asked]
    images = [[], "1.png", ["0.png", "2.png"]]
    records = [{"id": str(i), "conversations": turn} for i, turn in enumerate(turns)]
    for record, image in zip(records, images, strict=True):
        record |= {"image": image} if image else {}
    (tmp_path / "llava.json").write_text(json.dumps(records))
    assert distill(models, tmp_path / "llava.json", tmp_path / "set", "--image-folder", str(pictures)) == 0
    moved = pictures.rename(tmp_path / "moved")
    try:
        asked = [
            ("What is a chart for?", []),
            (question(1), [moved / "1.png"]),
            ("Compare them.", [moved / "0.png", moved / "2.png"]),
        ]
        check(AnswerSource(tmp_path / "set", moved), generator, asked, seeds(3))
    finally:
        moved.rename(pictures)


def test_scenes_and_a_prepared_data_set(models, generator, tmp_path):
    assert distill(models, "scenes", tmp_path / "scenes", "--split", "test", "--start", "1", "--count", "2") == 0
    asked = [(question(index), [render(numbered_scene("test", index)[0])]) for index in (1, 2)]
    check(AnswerSource(tmp_path / "scenes"), generator, asked, seeds(3)[1:])
    records = load_scenes(tmp_path / "data", "test", train_size=1, validation_size=1, test_size=2)
    folder = next((tmp_path / "data").glob("jaxspec_scenes/*/*"))
    assert distill(models, folder, tmp_path / "tfds", "--split", "test") == 0
    asked = [(question(record["index"]), record["images"]) for record in records]
    check(AnswerSource(tmp_path / "tfds"), generator, asked, seeds(2))


@pytest.mark.parametrize("stop", ["killed", "SIGTERM"])
def test_a_stopped_run_goes_on_without_loss_or_repetition(models, jsonl, whole, tmp_path, monkeypatch, capsys, stop):
    answer, asked, engines = Distiller.answer, [], set()

    def stopping(self, dialogue, *rest):
        asked.append(dialogue.record)
        engines.add(self.engine)
        if dialogue.record == 3 and stop == "killed":
            raise RuntimeError("killed")
        if dialogue.record == 3 and stop == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, dialogue, *rest)

    monkeypatch.setattr(Distiller, "answer", stopping)
    if stop == "killed":
        with pytest.raises(RuntimeError, match="killed"):
            distill(models, jsonl, tmp_path, *SAMPLED)
    else:
        assert distill(models, jsonl, tmp_path, *SAMPLED) == 130
        expected = f"jaxspec: stopped with 2 of 5 records in {tmp_path}; run the same command to go on\n"
        assert capsys.readouterr().err == expected
    assert asked == [0, 1, 2, 3]
    (engine,) = engines
    assert not any(thread.is_alive() for thread in threading.enumerate() if thread.name.startswith("jaxspec-"))
    assert sum(engine.stats().finished.values()) == (3 if stop == "killed" else 4)
    with pytest.raises(ValueError, match="are not finished"):
        AnswerSource(tmp_path)
    asked.clear()
    stop = None
    (tmp_path / ".self_distilled-train.array_record-00001-of-00003.1.tmp").write_bytes(b"half a file")
    assert distill(models, jsonl, tmp_path, *SAMPLED) == 0
    assert asked == [2, 3, 4]
    assert "going on after 2 of 5 records" in capsys.readouterr().out
    assert contents(tmp_path) == contents(whole)


def test_a_stop_gives_up_what_is_being_answered(generator, jsonl):
    """Slots are free again at once, and the part can be made anew."""
    source, settings = open_prompts(str(jsonl)), DistillSettings(max_new_tokens=100)
    with Engine(generator.target, settings=engine_settings(settings, len(source), 2, max_length=256)) as engine:
        distiller, looks = Distiller(engine, source, settings), iter([False] * 6)
        with pytest.raises(Stopped):
            distiller.part(range(5), stopping=lambda: next(looks, True))
        done = []
        part = distiller.part(range(4, 5), done.append)
        finished = engine.stats().finished
        assert sum(finished.values()) == 6 and finished["cancelled"] >= 3 and done == [1]
    expected = generator.generate(question(4), [jsonl.with_name("1.png")], settings.sampling(4), 100)
    assert part.answers[0].answer_ids.tolist() == expected.tokens.tolist()


def test_two_processes_make_the_set_of_one(models, jsonl, whole, tmp_path, capsys):
    share = [*SAMPLED, "--process-count", "2", "--process-index"]
    assert distill(models, jsonl, tmp_path, *share, "1") == 0
    assert "process 1 of 2 has finished its parts; 2 of 3 are still missing" in capsys.readouterr().out
    assert distill(models, jsonl, tmp_path, *share, "0") == 0
    assert contents(tmp_path) == contents(whole)


def test_a_drafter_changes_no_answer(models, jsonl, whole, tmp_path):
    assert distill(models, jsonl, tmp_path, *SAMPLED, "--drafter", str(models[1])) == 0
    assert contents(tmp_path) == contents(whole)


def test_every_turn_follows_the_targets_own_answers(models, generator, pictures, tmp_path):
    turns = [f"<image>\n{question(0)}", "Are you sure?"]
    talk = [{"from": role, "value": words} for words in turns for role, words in (("human", words), ("gpt", "Old."))]
    records = [{"id": "talk", "conversations": talk, "image": "0.png"}, {"prompt": question(1), "image": "1.png"}]
    (tmp_path / "talk.json").write_text(json.dumps(records))
    assert (
        distill(models, tmp_path / "talk.json", tmp_path / "set", "--image-folder", str(pictures), "--turns", "all")
        == 0
    )
    source = AnswerSource(tmp_path / "set")
    assert [record["id"] for record in source] == ["talk", "talk#2", "record 1"]
    first, second, _ = source
    said = generator.target.tokenizer.decode(first["answer_ids"], skip_special_tokens=True).lstrip(" ")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question(0)}]},
        {"role": "assistant", "content": said},
        {"role": "user", "content": "Are you sure?"},
    ]
    prompt = encode_prompt(generator.target, messages, second["images"])
    np.testing.assert_array_equal(second["prompt_ids"], prompt.input_ids)


def test_what_cannot_be_answered_is_named(models, pictures, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    render(numbered_scene("test", 0)[0]).save(tmp_path / "0.png")
    lines = [
        {"id": "good", "prompt": question(0), "image": "0.png"},
        {"id": "empty", "image": "0.png"},
        {"id": "broken picture", "prompt": question(0), "image": "broken.png"},
        {"id": "no picture", "prompt": question(0), "image": "missing.png"},
        {"id": "marks", "prompt": "<image><image>What?", "image": "0.png"},
        {"id": "long", "prompt": "word " * 300},
        {"id": "half text", "prompt": "hi \ud800"},
        {"id": "half \ud800", "prompt": question(0)},
        {"id": "group", "conversations": [{"from": ["human"], "value": "What?"}]},
        {"id": "no other picture", "prompt": question(0), "images": None, "image": "missing.png"},
        {"id": "shown", "messages": [{"role": "system", "content": [{"type": "image", "image": "0.png"}]}]},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join([*map(json.dumps, lines), "{"]))
    assert distill(models, tmp_path / "data.jsonl", tmp_path / "set") == 0
    source = AnswerSource(tmp_path / "set")
    assert [record["id"] for record in source] == ["good"]
    reasons = {each["id"]: each["reason"] for each in source.about["refused"]}
    expected = {
        "empty": "needs one of prompt, messages, conversations",
        "broken picture": "broken.png) cannot be read",
        "no picture": "missing.png) does not exist",
        "marks": "it has 2 <image> marks for 1 images",
        "long": "with max_length 256 it may have at most 255",
        "half text": "a turn by user cannot be written as UTF-8",
        r"half \ud800": "its id cannot be written as UTF-8",
        "group": "a turn is by ['human']; known: human",
        "no other picture": "missing.png) does not exist",
        "shown": "a turn by system holds an image",
        "record 11": "line 12 is not JSON",
    }
    assert reasons.keys() == expected.keys() and all(part in reasons[name] for name, part in expected.items())
    out = capsys.readouterr().out
    assert "12 records, 11 refused: 1 answers" in out and all(f"refused: {name} (record" in out for name in expected)
    assert distill(models, tmp_path / "data.jsonl", tmp_path / "none", "--start", "1") == 2
    assert "none of the 11 records could be answered; the first: empty" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "expected"), [("ascii", r"\xe9 \ud800 \u241b"), ("utf-8", "é \\ud800 ␛")])
def test_what_a_console_cannot_print_is_escaped(encoding, expected):
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    console.print(shown(console, "é \ud800 \x1b"), markup=False)
    console.file.flush()
    assert console.file.buffer.getvalue().decode(encoding) == expected + "\n"


def test_penalties_are_the_folders_and_filters_are_not(models, asking, jsonl, pictures, tmp_path, monkeypatch, capsys):
    """A set says what applied, and is not gone on with where something else would."""
    monkeypatch.setattr(jaxspec.serving.engine, "Generator", jaxspec.Generator)
    ask = (asking, models[1]), jsonl, tmp_path / "set", "--count", "2"
    assert distill(*ask) == 0
    assert f"from {asking / 'generation_config.json'}: repetition_penalty 1.5 (" in capsys.readouterr().err
    source = AnswerSource(tmp_path / "set")
    assert source.about["settings"]["generation_config"] == {"repetition_penalty": 1.5}
    plain = jaxspec.Generator(jaxspec.load_target(models[0]), max_length=256)
    sampling = [jaxspec.SamplingParams(seed=seed, repetition_penalty=1.5) for seed in range(2)]
    check(source, plain, [(question(index), [pictures / f"{index}.png"]) for index in range(2)], sampling)
    assert distill(*ask, "--no-generation-config") == 2
    expected = "made with other settings: generation_config (there {'repetition_penalty': 1.5}, here None)"
    assert expected in capsys.readouterr().err
    given = distill(*ask[:2], tmp_path / "given", *ask[3:], "--repetition-penalty", "1.5", "--no-generation-config")
    assert given == 0 and capsys.readouterr().err == ""
    for ours, theirs in zip(AnswerSource(tmp_path / "given"), source, strict=True):
        np.testing.assert_array_equal(ours["answer_ids"], theirs["answer_ids"])


def test_suffix_and_progress(models, jsonl, generator, tmp_path, capsys):
    assert distill(models, jsonl, tmp_path, "--suffix", "vispec", "--count", "2") == 0
    words = question(0) + SUFFIXES["vispec"]
    record = AnswerSource(tmp_path)[0]
    np.testing.assert_array_equal(
        record["prompt_ids"], encode_prompt(generator.target, words, record["images"]).input_ids
    )
    out = capsys.readouterr().out
    assert "distill: 2/2, " in out and "/s, 0 s left" in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seed", "6"], "made with other settings: temperature (there 1.0, here 0.0)"),
        (["--data", "/nowhere.jsonl"], "no file /nowhere.jsonl"),
        (["--count", "6"], "count must be at most 5"),
        (["--start", "5"], "start must lie in 0..4"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--sampled-share", "2"], "sampled_share must lie in 0..1"),
        (["--process-index", "1"], "process_index must lie in 0..0"),
        (["--depth", "2"], "a tree needs a drafter"),
        (["--split", "nonsense"], "split is for scenes and tensorflow-datasets"),
        (["--top-p", "0.5"], "top_p has no effect at temperature 0, got 0.5"),
        (["--sampled-share", "0.5"], "sampled_share has no effect at temperature 0, got 0.5"),
        (["--temperature", "1", "--sampled-share", "0"], "temperature has no effect at sampled_share 0, got 1.0"),
        (["--suffix", "\udc80"], "suffix cannot be written as UTF-8: character 0 is '\\udc80'"),
        (["--temperature", "-1"], "temperature must be finite"),
        (["--repetition-penalty", "0"], "repetition_penalty must be between 1e-05 and 100000, got 0.0"),
        (["--min-tokens", "7"], "min_tokens must be at most max_new_tokens (6), got 7"),
    ],
)
def test_bad_input_is_one_sentence(models, jsonl, whole, capsys, arguments, sentence):
    before = contents(whole)
    assert distill(models, jsonl, whole, *arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("jaxspec: ") and error.count("\n") == 1
    assert contents(whole) == before


def test_a_short_batch_needs_no_program_of_its_own(models, jsonl, whole, generator, tmp_path):
    before = generator.compilations
    assert distill(models, jsonl, tmp_path, *SAMPLED, "--count", "3") == 0
    assert generator.compilations == before
    for ours, theirs in zip(AnswerSource(tmp_path), AnswerSource(whole), strict=False):
        np.testing.assert_array_equal(ours["answer_ids"], theirs["answer_ids"])


def test_an_answer_that_is_not_finite_is_refused_by_its_record(models, tmp_path, monkeypatch):
    """A token of one question breaks the target: that record is named with the reason, the others are answered."""
    target = jaxspec.load_target(models[0])
    prompts = [{"id": f"q{i}", "prompt": f"What is {mark}?"} for i, mark in enumerate("a§b")]
    bad = target.tokenizer("§", add_special_tokens=False).input_ids[-1]
    embedding = target.model.language_model.embed_tokens.embedding
    embedding[...] = embedding[...].at[bad].set(np.nan)
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, prompts)))
    source, settings = open_prompts(str(path), "train", None), DistillSettings(max_new_tokens=LIMIT)
    monkeypatch.setattr(jaxspec.serving.engine, "Generator", jaxspec.Generator)
    with Engine(target, settings=engine_settings(settings, len(source), 2, max_length=256)) as engine:
        part = Distiller(engine, source, settings).part(range(3))
    assert [answer.id for answer in part.answers] == ["q0", "q2"]
    assert [each.id for each in part.refused] == ["q1"]
    assert part.refused[0].reason.startswith("the logits of the token at position ")
    assert "after 0 generated tokens" in part.refused[0].reason


def test_a_failure_of_the_machine_is_no_records_fault(generator, jsonl, monkeypatch):
    """Were it refused, a set would lack what the next run could answer."""

    def failing(*arguments):
        raise RuntimeError("out of memory")

    source, settings = open_prompts(str(jsonl)), DistillSettings(max_new_tokens=LIMIT)
    monkeypatch.setattr(generator.programs, "begin", failing)
    with Engine(generator.target, settings=engine_settings(settings, len(source), 2, max_length=256)) as engine:
        sentence = r"record 0 \(q0\) could not be answered: reading the prompt failed: RuntimeError: out of memory"
        with pytest.raises(RuntimeError, match=sentence):
            Distiller(engine, source, settings).part(range(1))
