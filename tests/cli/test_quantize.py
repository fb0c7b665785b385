"""`--quantize int8` and `--quantize-drafter int8` with every command, and what it says of wrong ones."""

import json

import pytest

import jaxspec
from jaxspec.cli import main
from jaxspec.cli.commands import read_command
from jaxspec.data.answers import AnswerEncoder, AnswerSource
from jaxspec.drafters.vocabulary import most_frequent
from jaxspec.quantization import is_quantized

BOTH = ("--quantize", "int8", "--quantize-drafter", "int8", "--compilation-cache", "")


def test_generate(models, capsys):
    target, drafter = map(str, models)
    assert main(["generate", "--target", target, "--drafter", drafter, "--max-new-tokens", "12", *BOTH]) == 0
    (speculative,) = [line for line in capsys.readouterr().out.splitlines() if "speculative" in line]
    assert " yes " in speculative


def test_bench(models, tmp_path):
    target, drafter = map(str, models)
    numbers = ["--num-prompts", "1", "--score-prompts", "0", "--runs", "1", "--max-new-tokens", "12", "--no-noise-off"]
    files = ["--target", target, "--drafters", drafter, "--output", str(tmp_path)]
    assert main(["bench", *files, *numbers, *BOTH]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["environment"]["dtype"] == "float32 with int8 weights"
    assert results["settings"]["drafters"]["vispec"]["quantize"] == "int8"
    assert [entry["identical"] for entry in results["speed"]] == [1, 1, 1, 1]
    assert "float32 with int8 weights" in (tmp_path / "results.md").read_text()


def test_serve(models):
    target, drafter = map(str, models)
    config = json.dumps({"method": "vispec", "model": drafter})
    serve = read_command(["serve", "--model", target, "--speculative-config", config, *BOTH], "test")
    serve.check()
    engine = serve.load_engine()
    assert is_quantized(engine.target.model) and is_quantized(engine.drafter.model)
    other = read_command(["serve", "--model", target, "--quantization", "int8"], "test")  # as vLLM calls it
    assert other.model.quantize == "int8"


def test_distill(models, tmp_path, capsys):
    """Answers are the int8 target's, and a set that was begun with the float one is not gone on with."""
    target, drafter = map(str, models)
    files = ["distill", "--data", "scenes", "--target", target, "--output", str(tmp_path), "--drafter", drafter]
    numbers = ["--count", "2", "--batch-size", "2", "--max-new-tokens", "8", "--max-length", "256"]
    assert main([*files, *numbers, *BOTH]) == 0
    made = AnswerSource(tmp_path)
    assert made.about["settings"]["quantize"] == "int8"
    small = jaxspec.load_target(target, quantize="int8")
    encoder = AnswerEncoder(small.processor, small.adapter)
    for record in (made[index] for index in range(len(made))):
        prompt, _ = encoder.encode_question(record)
        (again,) = jaxspec.Generator(small).generate_encoded([prompt], max_new_tokens=8)
        assert again.tokens.tolist() == record["answer_ids"].tolist()
    assert main([*files, *numbers, "--compilation-cache", ""]) == 2
    assert "quantize (there 'int8', here None)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["generate", "--target", "TARGET", "--quantize", "int4"], "quantize must be one of int8, or None, got 'int4'"),
        (["generate", "--target", "TARGET", "--drafter", "lookup", "--quantize-drafter", "fp8"],
         "quantize_drafter must be one of int8, or None, got 'fp8'"),
        (["generate", "--target", "TARGET", "--quantize-drafter", "int8"],
         "quantize-drafter needs a drafter: give --drafter"),
        (["distill", "--data", "scenes", "--output", "out", "--target", "TARGET", "--quantize-drafter", "int8"],
         "quantize-drafter needs a drafter: give --drafter"),
        (["serve", "--model", "TARGET", "--quantize-drafter", "int8"],
         "quantize-drafter needs a drafter: give --speculative-config"),
    ],
)  # fmt: skip
def test_refusals(models, tmp_path, monkeypatch, capsys, command, sentence):
    monkeypatch.chdir(tmp_path)
    given = [str(models[0]) if each == "TARGET" else each for each in command]
    assert main([*given, "--compilation-cache", ""]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def answers(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    numbers = ["--count", "4", "--batch-size", "2", "--max-new-tokens", "12", "--max-length", "256"]
    files = ["--data", "scenes", "--target", str(models[0]), "--output", str(folder), "--compilation-cache", ""]
    assert main(["distill", *files, *numbers]) == 0
    return folder


def test_a_draft_vocabulary_from_answers(models, answers, tmp_path, capsys):
    """One command makes of any head one that drafts the most frequent tokens, untrained and lossless."""
    target, drafter = models
    output, size = tmp_path / "narrow", 12
    flags = ["--target", str(target), "--answers-dir", str(answers), "--draft-vocab-size", str(size)]
    assert main(["export", str(drafter), str(output), *flags]) == 0
    said = capsys.readouterr().out
    loaded = jaxspec.load_target(target)
    narrow, whole = jaxspec.load_drafter(output, loaded), jaxspec.load_drafter(drafter, loaded)
    made = AnswerSource(answers)
    ids = most_frequent(made.said(), loaded.model.vocab_size, size)
    assert narrow.model.draft_ids.tolist() == ids.tolist() and whole.model.draft_ids is None
    assert narrow.tree == whole.tree and "mean_acceptance_length" in whole.about.keys() - narrow.about.keys()
    spoken = [token for answer in made.said() for token in answer.tolist()]
    share = sum(token in ids for token in spoken) / len(spoken)
    assert narrow.about["draft_vocab_coverage"] == pytest.approx(share)
    assert f"drafting 12 tokens, {share:.2%} of what the answers are made of" in said
    plain, drafted = (
        jaxspec.Generator(loaded, each).generate("What is a chart for?", max_new_tokens=24) for each in (None, narrow)
    )
    assert plain.tokens.tolist() == drafted.tokens.tolist()
    assert main(["export", str(output), str(tmp_path / "again"), *flags]) == 2
    assert "the drafter has a draft vocabulary already, of 12 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--draft-vocab-size", "12"], "needs the target and its own answers: give --target and --answers-dir"),
        (["--answers-dir", "."], "answers-dir tells the tokens of a draft vocabulary: give --draft-vocab-size"),
        (["--target", "TARGET", "--answers-dir", "ANSWERS", "--draft-vocab-size", "3"],
         "top_k (4) is larger than the vocabulary (3)"),
        (["--target", "TARGET", "--answers-dir", "ANSWERS", "--draft-vocab-size", "99999"],
         "draft_vocab_size (99999) is larger than the target's vocabulary"),
        (["--target", "TARGET", "--answers-dir", "nowhere", "--draft-vocab-size", "12"],
         "no self-distilled answers in nowhere"),
    ],
)  # fmt: skip
def test_refused_draft_vocabularies(models, answers, tmp_path, capsys, flags, sentence):
    names = {"TARGET": str(models[0]), "ANSWERS": str(answers)}
    assert main(["export", str(models[1]), str(tmp_path / "out"), *(names.get(each, each) for each in flags)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_methods_have_no_draft_vocabulary(answers, tmp_path, capsys):
    flags = ["--target", "demo", "--answers-dir", str(answers), "--draft-vocab-size", "12"]
    assert main(["export", "demo:medusa", str(tmp_path / "out"), *flags]) == 2
    assert "a Medusa drafter can have no draft vocabulary" in capsys.readouterr().err
