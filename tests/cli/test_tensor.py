"""`--tensor N`: what the commands answer on two devices, which must be what they answer on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jaxspec
from jaxspec import demo
from jaxspec.cli import main
from jaxspec.colours import visible
from jaxspec.data.answers import AnswerSource

ROOT = Path(__file__).parents[2]
ON_TWO = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
from jaxspec.cli import main
sys.exit(main(sys.argv[1:]))
"""


def on_two(*arguments: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, since JAX must learn of its devices before it first uses one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_TWO, *arguments, "--compilation-cache", ""]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_generate(models):
    target, drafter = models
    expected = jaxspec.Generator(jaxspec.load_target(target)).generate(
        "Describe the picture.", [demo.picture_path()], max_new_tokens=16
    )
    files = ["--target", str(target), "--drafter", str(drafter)]
    done = on_two("generate", *files, "--max-new-tokens", "16", "--no-stream", "--tensor", "2")
    assert done.returncode == 0, done.stderr
    assert "".join(visible(expected.text).split()) in "".join(done.stdout.split())
    assert " yes " in done.stdout and " no " not in done.stdout  # speculative = autoregressive


def test_distill(models, tmp_path):
    questions = [{"id": str(index), "prompt": f"What is {index} + 1?"} for index in range(3)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    asked = ["--data", str(tmp_path / "questions.jsonl"), "--target", str(models[0]), "--max-length", "256"]
    asked += ["--max-new-tokens", "8", "--batch-size", "2", "--temperature", "1", "--sampled-share", "0.5"]
    assert main(["distill", *asked, "--output", str(tmp_path / "one"), "--compilation-cache", ""]) == 0
    options = ["--drafter", str(models[1]), "--tensor-parallel-size", "2"]
    done = on_two("distill", *asked, "--output", str(tmp_path / "two"), *options)
    assert done.returncode == 0, done.stderr
    ours, expected = (
        [each["answer_ids"].tolist() for each in AnswerSource(tmp_path / name)] for name in ("two", "one")
    )
    assert ours == expected and len(ours) == 3


def test_bench(models, tmp_path):
    few = ["--num-prompts", "2", "--score-prompts", "0", "--runs", "1", "--max-new-tokens", "12", "--temperatures", "1"]
    files = ["--target", str(models[0]), "--drafters", str(models[1]), "--output", str(tmp_path)]
    done = on_two("bench", *files, *few, "--tensor", "2")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {entry["identical"] for entry in results["speed"]} == {2}
    assert results["settings"]["devices"] == 2


@pytest.mark.parametrize(
    ("size", "sentence"),
    [("2", "tensor is 2, but there is 1 device"), ("0", "tensor must be at least 1, got 0")],
)
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_what_cannot_be(models, capsys, command, size, sentence):
    options = ["--target" if command == "generate" else "--model", str(models[0]), "--compilation-cache", ""]
    assert main([command, *options, "--tensor", size]) == 2
    assert sentence in capsys.readouterr().err
