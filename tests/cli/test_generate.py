"""`python -m jaxspec generate`: what it prints, and what it refuses."""

import io
import re
import shutil

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

import jaxspec
from jaxspec import demo
from jaxspec.cli import main
from jaxspec.cli.output import coloured
from jaxspec.colours import TokenColours, visible
from jaxspec.detokenizer import Detokenizer, TokenReader
from jaxspec.metrics import AcceptanceWarning

LIMIT = "24"


def run(models, *arguments) -> int:
    target, drafter = models
    common = ["--target", str(target), "--compilation-cache", "", "--max-new-tokens", LIMIT]
    return main(
        ["generate", *common, *(["--drafter", str(drafter)] if "--drafter" not in arguments else []), *arguments]
    )


@pytest.fixture(scope="module")
def expected(models):
    target = jaxspec.load_target(models[0])
    return jaxspec.Generator(target).generate("Describe the picture.", [demo.picture_path()], max_new_tokens=int(LIMIT))


def test_answer_table_and_warning(models, expected, capsys, recwarn):
    assert run(models) == 0
    assert not [each for each in recwarn if issubclass(each.category, AcceptanceWarning)]  # it is printed
    out = capsys.readouterr().out
    assert "\x1b" not in out
    shown = "scene.png, 288 x 288 pixels\nDescribe the picture.\n\n" + visible(expected.text)
    assert out.split()[: len(shown.split())] == shown.split()  # but for tabs, which a console expands
    assert re.search(rf"autoregressive\D+{len(expected.tokens)} .* 1\.00 .* 1\.00 .* 0\.00 ", out)
    assert re.search(rf"speculative\D+{len(expected.tokens)} .* yes ", out)
    assert re.search(r"\d+ of \d+ tokens came from the drafter", out)
    assert out.count("warning: mean_acceptance_length is") == 1  # the head is random, its record is not


def test_prompt_lookup_needs_no_folder(models, expected, capsys):
    assert run(models, "--drafter", "lookup") == 0
    assert re.search(rf"speculative\D+{len(expected.tokens)} .* yes ", capsys.readouterr().out)


def test_without_a_drafter_it_says_so(models, capsys):
    target = str(models[0])
    arguments = ["--no-stream", "--max-new-tokens", "4", "--compilation-cache", ""]
    assert main(["generate", "--target", target, "--prompt", "Hello?", *arguments]) == 0
    out = capsys.readouterr().out
    assert "autoregressive decoding only" in out
    assert "scene.png" not in out and "speculative" not in out


def test_what_the_folder_asks_for_is_said_and_done(asking, capsys):
    """Unless the command line says otherwise, or that nothing of it counts."""
    target = jaxspec.load_target(asking)
    plain, sampled = jaxspec.SamplingParams(), jaxspec.SamplingParams(0.7, top_k=20, repetition_penalty=1.5)
    cases = [
        ((), "temperature 0.7, top_k 20, repetition_penalty 1.5", sampled),
        (("--temperature", "0", "--repetition-penalty", "1"), None, plain),
        (("--no-generation-config",), None, plain),
    ]
    arguments = ["--target", str(asking), "--prompt", "Hello?", "--max-new-tokens", "8", "--compilation-cache", ""]
    for more, said, sampling in cases:
        generator = jaxspec.Generator(target, generation_config=False)
        expected = generator.generate("Hello?", (), sampling, 8)
        assert main(["generate", *arguments, *more]) == 0
        captured = capsys.readouterr()
        assert visible(expected.text).split() == captured.out.split()[1:][: len(visible(expected.text).split())]
        source = asking / "generation_config.json"
        line = "" if said is None else f"from {source}: {said} (--no-generation-config turns that off)\n"
        assert [each for each in captured.err.splitlines(True) if each.startswith("from ")] == [line] * bool(line)


def test_penalties_and_log_probabilities(models, capsys):
    flags = ["--repetition-penalty", "1.3", "--presence-penalty", "0.5", "--frequency-penalty", "0.5"]
    assert run(models, *flags, "--min-tokens", "3", "--logprobs", "2") == 0
    sampling = jaxspec.SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5, min_tokens=3, logprobs=2
    )
    target = jaxspec.load_target(models[0])
    request = "Describe the picture.", [demo.picture_path()], sampling, int(LIMIT)
    expected = jaxspec.Generator(target).generate(*request)
    out = capsys.readouterr().out
    assert re.search(rf"speculative\D+{len(expected.tokens)} .* yes ", out)
    listed = re.findall(r"^ *'.*' +(-?\d+\.\d{3})  +'.* (-?\d+\.\d{3})  +'.* (-?\d+\.\d{3})", out, re.MULTILINE)
    own, tops = expected.logprobs.token_logprobs, expected.logprobs.top_logprobs
    numbers = np.array(listed, float)
    np.testing.assert_allclose(numbers, np.concatenate([own[:, None], tops], axis=1), atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "missing.png"], "image 1 (missing.png) does not exist"),
        (["--temperature", "-1"], "temperature must be finite and at least 0"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--presence-penalty", "3"], "presence_penalty must be between -2 and 2, got 3.0"),
        (["--logprobs", "21"], "logprobs must be between 0 and 20, got 21"),
        (["--min-tokens", "25"], "min_tokens must be at most max_new_tokens (24), got 25"),
        (["--drafter", "/nowhere/drafter"], "no folder /nowhere/drafter"),
        (["--speculative-num-draft-tokens", "1000"], "total_tokens must lie in"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--drafter", "lookup", "--tree-top-k", "2"], "prompt lookup drafts a chain"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_bad_input_is_one_sentence(models, capsys, arguments, sentence):
    assert run(models, *arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and "Traceback" not in captured.err
    assert captured.err.startswith("jaxspec: ") and captured.err.count("\n") == 1


def test_a_target_that_overflows(models, tmp_path, capsys):
    """Weights that are numbers, and activations that are none any more."""
    folder = tmp_path / "target"
    shutil.copytree(models[0], folder)
    tensors = load_file(folder / "model.safetensors")
    (norm,) = (name for name in tensors if name.endswith("model.norm.weight"))
    tensors[norm] = np.full_like(tensors[norm], 3e38)
    save_file(tensors, folder / "model.safetensors")
    arguments = ["--prompt", "Hello?", "--max-new-tokens", "4", "--compilation-cache", ""]
    assert main(["generate", "--target", str(folder), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("jaxspec: prompt 0: the logits of the token at position ")
    assert captured.err.count("\n") == 1


def test_help_and_unknown_flags(capsys):
    assert main(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    for flag in ("--image", "--speculative-num-steps", "--depth", "--tree-top-k", "--total-tokens", "--no-stream"):
        assert flag in out
    assert main(["generate", "--colour", "red"]) == 2
    assert "--colour" in capsys.readouterr().err
    assert main([]) == 2


def test_coloured_pieces_join_to_the_text():
    """Tokens that are half a character, and a text that is shown later than its tokens are known."""
    colours = TokenColours()
    colours.add([1, 1], [True, False])  # A, half of é
    assert colours.split("A") == [("A", True)]
    colours.add([2, 2, 5], [True, False, False])  # the other half, nothing, " bc"
    assert colours.split("é b") == [("é", True), (" b", False)]
    assert colours.split("c") == [("c", False)]

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system="standard", no_color=False, highlight=False)
    console.print(coloured([("[red]", True), ("b", False)]), end="")
    assert file.getvalue() == "\x1b[32m[red]\x1b[0mb"
    assert visible("a\x1b[31m\r\x9b\n") == "a␛[31m␍␡\n"


def test_colours_follow_a_real_tokenizer(models):
    """Random bytes of a byte-level tokenizer: every character has an owner and none is lost."""
    tokenizer = jaxspec.load_target(models[0]).tokenizer
    rng = np.random.default_rng(0)
    ids, accepted = rng.integers(5, len(tokenizer), 200), rng.integers(0, 2, 200).astype(bool)
    colours, row = TokenColours(), Detokenizer(TokenReader(tokenizer))
    row.add(ids)
    row.finish()
    colours.add(row.ends, accepted)
    runs = colours.split(row.text)
    assert "".join(part for part, _ in runs) == row.text
    # Who completes a character, found by decoding the answer again for every token.
    lengths = [len(tokenizer.decode(ids[:n], skip_special_tokens=True).lstrip(" ")) for n in range(1, len(ids) + 1)]
    text = tokenizer.decode(ids, skip_special_tokens=True).lstrip(" ")
    shown = [drafted for part, drafted in runs for _ in part]
    for position, character in enumerate(text):
        if character != "\ufffd":
            assert shown[position] == accepted[next(n for n, length in enumerate(lengths) if length > position)]
