"""docs/SERVING.md is true: what it asks is answered, and the flags, keys and metrics that it names are there."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jaxspec.cli.commands import read_command
from jaxspec.serving.http.app import make_app
from jaxspec.serving.http.settings import HttpSettings
from jaxspec.serving.speculative import KEYS
from tests.serving.listening import Listening

TEXT = (Path(__file__).parents[2] / "docs/SERVING.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
WRITTEN = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with Listening(make_app(engine, HttpSettings(served_model_name="demo"))) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_curl_command_is_answered(url):
    (command,) = [block for kind, block in BLOCKS if kind == "bash" and block.startswith("curl ")]
    program, address, header, content_type, data, body = shlex.split(command)
    assert (program, header, data) == ("curl", "-H", "-d") and address.startswith(WRITTEN)
    name, _, value = content_type.partition(": ")
    response = httpx.post(address.replace(WRITTEN, url), content=body.encode(), headers={name: value}, timeout=120)
    assert response.status_code == 200, response.text
    assert (
        response.text.endswith("data: [DONE]\n\n") and json.loads(response.text.split("\n")[0][6:])["model"] == "demo"
    )


def test_the_program_runs(url, capsys):
    (program,) = [block for kind, block in BLOCKS if kind == "python" and WRITTEN in block]
    exec(compile(program.replace(WRITTEN, url), "SERVING.md", "exec"), {})
    *answer, metrics = capsys.readouterr().out.splitlines()
    assert len(" ".join(answer)) > 20 and "mean_acceptance_length" in metrics


def test_the_engine_is_used_as_it_is_written(capsys):
    (program,) = [block for kind, block in BLOCKS if kind == "python" and WRITTEN not in block]
    exec(compile(program, "SERVING.md", "exec"), {})
    *answers, length = capsys.readouterr().out.splitlines()
    assert len(answers) == 3 and all(len(answer) > 40 for answer in answers) and float(length) >= 1


def test_every_command_has_flags_that_exist():
    commands = [
        shlex.split(line, comments=True)
        for kind, block in BLOCKS
        if kind == "bash"
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("jaxspec serve")
    ]
    assert len(commands) == 2
    for command in commands:
        assert read_command(command[1:], "jaxspec").port == 8000


def test_flags_and_keys_that_are_named_exist_and_all_keys_are_named(capsys):
    with pytest.raises(SystemExit):
        read_command(["serve", "--help"], "jaxspec")
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    named = {flag for flag in re.findall(r"--[a-z]+[a-z-]*", TEXT) if flag not in ("--build-arg", "--rm")}
    assert named <= known, named - known
    assert all(f"`{key}`" in TEXT for key in KEYS)


def test_metrics_that_are_named_are_served_and_the_other_way_round(url):
    served = set(re.findall(r"^# TYPE (\w+)", httpx.get(f"{url}/metrics").text, re.MULTILINE))
    served = {name for name in served if not name.endswith("_created")}
    table = TEXT[TEXT.index("## Metrics") : TEXT.index("## Containers")]
    named = set(re.findall(r"`(jaxspec_[a-z0-9_]+)(?:\{[a-z_,]+\})?`", table))
    assert named == served
