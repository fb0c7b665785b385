"""README's blocks run as they stand there, one after another, in a folder that stands for a fresh clone.

What a block cannot have here is in the tables below, each entry with its reason; nothing else is changed. Long commands
run with a few steps, records or tokens: flags behind what is written.
"""

import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import jax
import numpy as np
import pytest

from jaxspec import demo
from jaxspec.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)

NOT_RUN = {
    "make demo": "makes an environment, which takes a package index; test_make_demo looks at what it runs in there",
    "make test": "is what runs this",
    "make serve": "makes an environment, too, and goes on until it is told to stop; tests/serving has what it runs",
}
IN_PLACE_OF = {
    '"llava-hf/llava-1.5-7b-hf"': ('"demo"', "13 GB of download"),
    '"JLKang/ViSpec-llava-1.5-7b-hf"': ('"demo:vispec"', "the drafter of that target"),
}
TRAINING = "--steps 1 --warmup-steps 0 --batch-size 2 --eval-batches 0 --checkpoint-every 9999 --eval-every 9999"
TARGET = f"{TRAINING} --dataset-size 8 --hidden-size 16 --intermediate-size 16 --num-heads 2"
WITH_TOWER = "--vision-hidden-size 16 --vision-intermediate-size 16 --vision-heads 2 --vision-layers 2"
DRAFTER = f"{TRAINING} --acceptance-prompts 0 --acceptance-every 0 --validation-records 2"
FEWER = {
    "generate": "--max-new-tokens 8 --no-stream",
    "bench": "--drafters lookup --num-prompts 1 --runs 1 --score-prompts 0 --max-new-tokens 8 --temperatures 0",
    "distill": "--count 6 --max-new-tokens 4 --max-length 256 --batch-size 6",
    "configs/demo_vision.py": f"{TARGET} --num-layers 2",
    "configs/demo_target_align.py": f"{TARGET} {WITH_TOWER} --num-layers 1",
    "configs/demo_target_shallow.py": f"{TARGET} {WITH_TOWER} --num-layers 1",
    "configs/demo_target.py": f"{TARGET} {WITH_TOWER} --num-layers 2",
    "configs/demo_eagle2.py": DRAFTER,
    "configs/demo_vispec1.py": DRAFTER,
    "configs/demo_vispec.py": DRAFTER,
}
"""What is added to a command (by its name, or by the first recipe that it trains), so that it takes seconds: fewer
steps and records, smaller models, fewer programs to compile."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Iterator[Path]:
    """A checkout without what training leaves behind, in it the files that README's user has."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "configs", "jaxspec"):
        (folder / name).symlink_to(ROOT / name)
    write_files(folder)
    cache = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield folder
    jax.config.update("jax_compilation_cache_dir", cache)


def write_files(folder: Path) -> None:
    (folder / "images").mkdir()
    for path in (folder / "photo.jpg", folder / "images/1.jpg"):
        next(iter(demo.examples("test", 1))).image.save(path)
    prompts = [{"prompt": "What is this?", "image": "photo.jpg"}, {"prompt": "What is a chart for?"}] * 3
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A picture."}]
    conversations = [{"id": "1", "image": "1.jpg", "conversations": turns}]
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(conversations))
    with av.open(folder / "clip.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for value in (0, 80, 160):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), value, np.uint8), format="rgb24")))
        file.mux(stream.encode())


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(words: list[str]) -> int:
    """A command line in this process. What `jaxspec` and `python -m jaxspec` do is tested elsewhere."""
    match words:
        case ["jaxspec", name, *options]:
            return main([name, *options, *shlex.split(FEWER.get(name, ""))])
        case ["python", "train.py", *options]:
            arguments = ["train.py", *options, *shlex.split(FEWER[options[0]])]
            with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
                patch.setattr(sys, "argv", arguments)
                runpy.run_path("train.py", run_name="__main__")
            return done.value.code
    raise AssertionError(f"README has a command that this test does not know: {shlex.join(words)}")


@pytest.mark.parametrize("number", [pytest.param(n, id=f"{n}-{language}") for n, (language, _) in enumerate(BLOCKS)])
def test_a_block_runs_as_it_is_written(clone, number, capsys):
    language, text = BLOCKS[number]
    if language == "python":
        for written, (instead, _) in IN_PLACE_OF.items():
            assert text.count(written) == 1
            text = text.replace(written, instead)
        exec(compile(text, "README.md", "exec"), {})
        assert "picture" in capsys.readouterr().out
        return
    assert language == "bash"
    for words in commands(text):
        if shlex.join(words) not in NOT_RUN:
            code = run(words)
            told = capsys.readouterr()
            assert code == 0, f"{shlex.join(words)}: {told.err}"


def test_make_demo(capsys):
    recipe = re.search(r"^demo:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert recipe == "$(BIN)/python -m jaxspec generate"


def test_every_exception_is_still_needed():
    written = [shlex.join(words) for language, text in BLOCKS if language == "bash" for words in commands(text)]
    assert set(NOT_RUN) <= set(written)
    assert all(any(name in command.split() for command in written) for name in FEWER)
