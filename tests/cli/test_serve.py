"""`python -m jaxspec serve` up to where it serves: its flags, --speculative-config, and every sentence of refusal."""

import json
import re
import socket
import subprocess
import sys

import pytest

import jaxspec
from jaxspec.cli import main
from jaxspec.cli.commands import read_command
from jaxspec.serving.speculative import SpeculativeConfig
from jaxspec.speculation.tree import TreeConfig


@pytest.fixture(scope="module")
def target(models):
    return jaxspec.load_target(models[0])


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("JAXSPEC_API_KEY", raising=False)


def refusal(arguments: list[str], capsys) -> str:
    """The one line on stderr with which the command ends."""
    assert main(["serve", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxspec: ")
    return line.removeprefix("jaxspec: ")


def test_names_that_people_know_are_flags():
    options = (
        "--model folder --host ::1 --port 9000 --api-key k --max-model-len 700 --max-num-seqs 3 "
        "--max-queued-requests 4 --served-model-name m --allowed-media-domains a.example "
        "--allowed-media-domains b.example "
        "--shutdown-timeout 5 --request-timeout 6 --max-body-mib 7 --image-cache-mib 8 --prefix-cache-mib 9 "
        "--prefill-chunk 64 --dtype bfloat16 --compilation-cache x"
    )
    serve = read_command(
        ["serve", *options.split(), "--limit-mm-per-prompt", '{"image": 4}', "--speculative-config", "null"], "test"
    )
    assert (serve.model.target, serve.model.max_length, serve.model.dtype) == ("folder", 700, "bfloat16")
    assert serve.allowed_media_domains == ("a.example", "b.example") and serve.limits() == {"max_images": 4}
    settings = serve.engine_settings(adaptive=False)
    assert (settings.max_length, settings.max_num_seqs, settings.max_queued_requests) == (700, 3, 4)
    assert (settings.image_cache_bytes, settings.prefix_cache_bytes) == (8 * 2**20, 9 * 2**20)
    assert settings.prefill_chunk == 64 and not settings.adaptive


@pytest.mark.parametrize(
    ("flags", "config", "tree"),
    [
        ("--speculative-num-steps 3 --speculative-eagle-topk 4 --speculative-num-draft-tokens 16", None, (3, 4, 16)),
        ("--depth 3 --tree-top-k 4 --total-tokens 16", None, (3, 4, 16)),
        ("--speculative-num-steps 3", '{"method": "vispec", "eagle_topk": 4}', (3, 4, None)),
        ("--speculative-num-draft-tokens 16", '{"method": "vispec", "num_draft_tokens": 16}', (None, None, 16)),
        ("", '{"method": "vispec", "num_steps": 3}', (3, None, None)),
    ],
)
def test_the_tree_is_told_by_flags_as_well_as_by_json(flags, config, tree):
    given = [] if config is None else ["--speculative-config", config]
    speculative = read_command(["serve", *flags.split(), *given], "test").speculative
    assert speculative.method == "vispec"
    names = ("depth", "top_k", "total_tokens")
    assert speculative.tree == {name: value for name, value in zip(names, tree, strict=True) if value is not None}


def test_the_key_is_in_no_representation():
    assert "sk-given" not in repr(read_command(["serve", "--api-key", "sk-given"], "test"))


def test_help_says_something_of_every_flag(capsys):
    with pytest.raises(SystemExit) as left:
        read_command(["serve", "--help"], "test")
    assert left.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    flags = re.split(r" (?=--[a-z-]+ (?:[A-Z|a-z{}]+,? )?)", shown)
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in shown
    for flag in ("--model", "--speculative-config", "--api-key", "--allowed-media-domains", "--shutdown-timeout"):
        assert any(part.startswith(flag) for part in flags), flag


def test_the_key_comes_from_the_environment_too(monkeypatch):
    serve = read_command(["serve"], "test")
    assert serve.key() is None
    monkeypatch.setenv("JAXSPEC_API_KEY", "from-outside")
    assert serve.key() == "from-outside"
    assert read_command(["serve", "--api-key", "given"], "test").key() == "given"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", ""], "the API key is empty"),
        (["--api-key", "schlüssel"], "printable ASCII"),
        (["--port", "70000"], "port must be between 0 and 65535, got 70000"),
        (["--port", "-1"], "port must be between 0 and 65535, got -1"),
        (["--host", "no such host"], "cannot listen on no such host port 8000"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1 port 8000"),
        (["--max-num-seqs", "0"], "max_num_seqs must be at least 1, got 0"),
        (["--max-queued-requests", "-1"], "max_queued_requests must be at least 0"),
        (["--max-body-mib", "0"], "max_body_bytes must be at least 1"),
        (["--image-cache-mib", "-1"], "image_cache_mib must be at least 0"),
        (["--request-timeout", "0"], "request_timeout must be greater than 0"),
        (["--shutdown-timeout", "-1"], "shutdown_timeout must be at least 0"),
        (["--shutdown-timeout", "nan"], "shutdown_timeout must be at least 0"),
        (["--limit-mm-per-prompt", "4"], 'limit-mm-per-prompt must be JSON such as {"image": 4'),
        (["--limit-mm-per-prompt", '{"audio": 4}'], "limit-mm-per-prompt must be JSON such as"),
        (["--limit-mm-per-prompt", '{"image": -4}'], "limit-mm-per-prompt: image must be at least 0"),
        (["--limit-mm-per-prompt", '{"image": "many"}'], "limit-mm-per-prompt: image must be an integer"),
        (["--allowed-media-domains", "https://a.example"], "an allowed media domain is a host name"),
        (["--allowed-hosts", "a.example:8000"], "an allowed host is a name such as example.org, without a port"),
        (["--max-body-mib", "600"], "max_total_body_bytes must be at least 629145600, got 536870912"),
        (["--speculative-config", '{"metod": "vispec"}'], "speculative-config has unknown keys: metod"),
        (
            ["--depth", "3", "--speculative-config", '{"method": "vispec", "num_steps": 4}'],
            "depth is 3, but 4 in speculative-config; give it once",
        ),
        (
            [
                "--speculative-num-steps",
                "3",
                "--speculative-config",
                '{"method": "vispec", "num_speculative_tokens": 3}',
            ],
            "depth of a tree and num_speculative_tokens in speculative-config, a chain: give one",
        ),
        (["--total-tokens", "8", "--speculative-config", "null"], "total_tokens of a tree needs a drafter"),
        (["--total-tokens", "8", "--model", "some/repo"], "total_tokens of a tree needs a drafter"),
    ],
)
def test_what_cannot_be_served_is_one_sentence_before_anything_is_loaded(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr("jaxspec.cli.options.load_target", lambda *args, **options: pytest.fail("loaded"))
    assert said in refusal(arguments, capsys)


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal(["--port", str(port)], capsys) == (
            f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        )


def test_without_a_key_a_server_for_everybody_is_warned_of(capsys, monkeypatch):
    def stop(*args, **options):
        raise ValueError("far enough")

    monkeypatch.setattr("jaxspec.cli.options.load_target", stop)
    assert refusal(["--host", "0.0.0.0", "--port", "0"], capsys) == "far enough"
    main(["serve", "--host", "0.0.0.0", "--port", "0"])
    assert "warning: without a key (JAXSPEC_API_KEY) anybody who reaches 0.0.0.0 is answered" in capsys.readouterr().out
    main(["serve", "--host", "0.0.0.0", "--port", "0", "--api-key", "k"])
    main(["serve", "--port", "0"])
    assert "warning" not in capsys.readouterr().out


PACKAGES = ("fastapi", "gradio", "httpx", "llguidance", "prometheus_client", "ray", "starlette", "uvicorn")


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_package_that_is_missing_is_named_with_what_to_install(package, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxspec.serving.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert refusal([], capsys) == f"serve needs {package}: pip install 'jaxspec-vlm[serve]'"


def test_the_engine_and_the_command_line_need_none_of_the_extra():
    code = f"import sys, jaxspec.serving.engine, jaxspec.cli.serve; print([p for p in {PACKAGES} if p in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must be a JSON object"),
        ('"vispec"', "must be a JSON object"),
        ("{}", "needs a method, a model or both"),
        ('{"adaptive": false}', "needs a method, a model or both"),
        ('{"method": "eagle3"}', "method 'eagle3' is not known; known: eagle2, vispec"),
        ('{"method": 1}', "method must be a string, got 1"),
        ('{"model": ["a"]}', "model must be a string"),
        ('{"method": "vispec", "adaptive": "yes"}', "adaptive must be true or false"),
        ('{"method": "vispec", "quantization": "fp8", "x": 1}', "unknown keys: quantization, x; known: method, model"),
        ('{"method": "vispec", "depth": 3, "num_steps": 3}', "num_steps is another name of depth"),
        ('{"method": "vispec", "depth": 3, "num_speculative_tokens": 3}', "makes a chain"),
        ('{"method": "none", "depth": 3}', "nothing else can be given, got depth"),
    ],
)
def test_configs_that_are_refused(text, said):
    with pytest.raises(ValueError, match="^speculative-config") as refused:
        SpeculativeConfig.parse(text)
    assert said in str(refused.value)


def test_autoregressive_decoding_has_two_names(target):
    for text in ("null", '{"method": "none"}'):
        assert SpeculativeConfig.parse(text).load(target, embedded=False) == (None, None)
    assert SpeculativeConfig.default("some/repo").load(target, embedded=False) == (None, None)
    assert SpeculativeConfig.default("demo") == SpeculativeConfig("vispec")


@pytest.mark.parametrize(
    ("given", "tree"),
    [
        ({}, TreeConfig(1, 4, 6)),
        ({"num_speculative_tokens": 3}, TreeConfig.chain(3)),
        ({"depth": 2}, TreeConfig(2, 4, 6)),
        ({"num_steps": 2, "eagle_topk": 3, "num_draft_tokens": 9}, TreeConfig(2, 3, 9)),
        ({"total_tokens": 4, "noise_weight": 0.5}, TreeConfig(1, 4, 4, noise_weight=0.5)),
        ({"depth": None}, TreeConfig(1, 4, 6)),
    ],
)
def test_a_drafter_with_its_own_tree_or_another(models, target, given, tree):
    config = SpeculativeConfig.parse(json.dumps({"method": "vispec", "model": str(models[1])} | given))
    drafter, made = config.load(target, embedded=False)
    assert drafter.method == "vispec" and made == tree and config.adaptive


def test_the_method_may_be_left_to_the_folder(models, target):
    config = SpeculativeConfig.parse(json.dumps({"model": str(models[1]), "adaptive": False}))
    drafter, _ = config.load(target, embedded=False)
    assert drafter.method == "vispec" and not config.adaptive


def test_lookup_needs_no_model(target):
    drafter, tree = SpeculativeConfig.parse('{"method": "lookup", "num_speculative_tokens": 4}').load(target, False)
    assert drafter.method == "lookup" and tree == TreeConfig.chain(4)


@pytest.mark.parametrize(
    ("given", "embedded", "said"),
    [
        ({"method": "vispec"}, False, '"vispec" needs a model'),
        ({"method": "eagle2", "model": "{folder}"}, False, 'is a "vispec" drafter, not a "eagle2" one'),
        ({"model": "{folder}", "total_tokens": 10_000}, False, "total_tokens must lie in 1.."),
        ({"model": "{folder}", "depth": "3"}, False, "depth must be an integer, got '3'"),
        ({"model": "{folder}", "num_speculative_tokens": 0}, False, "num_speculative_tokens must be at least 1"),
        ({"method": "vispec"}, True, "was trained for the target"),
    ],
)
def test_drafters_that_cannot_be_loaded(models, target, given, embedded, said):
    text = json.dumps(given).replace("{folder}", str(models[1]))
    with pytest.raises(ValueError) as refused:
        SpeculativeConfig.parse(text).load(target, embedded)
    assert said in str(refused.value)
