"""`python -m jaxspec bench`: the report's fields, and the arithmetic behind them."""

import json
import math
import os

import numpy as np
import pytest

import jaxspec
from jaxspec.benchmark import host, measure
from jaxspec.benchmark.identity import first_difference
from jaxspec.benchmark.measure import Timing, interleaved, speedup, speedup_of_run
from jaxspec.benchmark.run import example_prompts
from jaxspec.cli import main
from jaxspec.metrics import Acceptance, pooled

PROMPTS, SCORED = 2, 3


@pytest.fixture(scope="module")
def output(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    target, drafter = map(str, models)
    numbers = ["--num-prompts", str(PROMPTS), "--score-prompts", str(SCORED), "--runs", "2", "--max-new-tokens", "12"]
    files = ["--target", target, "--drafters", drafter, "--output", str(folder), "--compilation-cache", ""]
    assert main(["bench", *files, *numbers, "--temperatures", "0", "1"]) == 0
    return folder


def test_json_has_every_number(output):
    results = json.loads((output / "results.json").read_text())
    arms = [(entry["temperature"], entry["arm"]) for entry in results["speed"]]
    assert arms == [
        (0, "autoregressive"),
        (0, "vispec"),
        (1, "autoregressive"),
        (1, "vispec"),
        (1, "vispec (noise off)"),
    ]
    for entry in results["speed"]:
        assert entry["identical"] == len(entry["prompts"]) == PROMPTS and entry["differences"] == []
        assert entry["compilations_while_measuring"] == 0 < entry["compilations"]
        assert entry["decode_tokens_per_second"] > 0 and entry["end_to_end_tokens_per_second"] > 0
        assert entry["time_to_first_token"] > 0
        assert math.isclose(entry["efficiency"], entry["speedup"] / entry["mean_acceptance_length"])
        assert math.isclose(entry["mean_acceptance_length"], entry["mean_accepted_draft_tokens"] + 1)
        assert len(entry["speedup_runs"]) == 2
        assert len(entry["acceptance_at_position"]) == (0 if entry["arm"] == "autoregressive" else 2)
        for prompt in entry["prompts"]:
            assert len(prompt["decode_seconds"]) == len(prompt["prefill_seconds"]) == 2
            assert 1 < prompt["tokens"] <= 12 and prompt["kind"] and prompt["speedup"] > 0
    assert results["speed"][0]["speedup"] == 1 and results["speed"][0]["mean_acceptance_length"] == 1
    assert results["speed"][1]["warning"] and not results["speed"][3]["warning"]
    for entry in results["quality"]:
        assert entry["identical"] == SCORED and entry["scenes"]["all"]["scenes"] == SCORED
        assert set(entry["scenes"]["all"]["main"]) == {"precision", "recall", "f1"}
    facts = results["environment"]
    assert len(facts["target_fingerprint"]) == 16 and facts["command"].startswith("python -m jaxspec bench --target")
    assert facts["dtype"] == "float32" and facts["versions"]["jax"] and facts["device"]


def test_markdown_and_plot(output):
    text = (output / "results.md").read_text()
    for heading in ("## Speed", "## Acceptance by position", "## Quality", "templated text"):
        assert heading in text
    assert (output / "results.png").read_bytes().startswith(b"\x89PNG")


def test_prompt_lookup_needs_no_folder(models, tmp_path):
    few = ["--num-prompts", "1", "--score-prompts", "0", "--runs", "1", "--max-new-tokens", "12", "--temperatures", "0"]
    where = ["--target", str(models[0]), "--output", str(tmp_path), "--compilation-cache", ""]
    assert main(["bench", *where, *few, "--drafters", "lookup"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(entry["arm"], entry["identical"]) for entry in results["speed"]] == [("autoregressive", 1), ("lookup", 1)]


def test_many_at_once(models, tmp_path, capsys):
    """Two slots for three questions: one is filled again."""
    few = ["--num-prompts", "3", "--score-prompts", "0", "--runs", "2", "--max-new-tokens", "12", "--temperatures", "1"]
    where = ["--target", str(models[0]), "--output", str(tmp_path), "--compilation-cache", ""]
    assert main(["bench", *where, *few, "--drafters", str(models[1]), "--concurrency", "2", "--no-noise-off"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    entries = results["throughput"]
    assert [entry["arm"] for entry in entries] == ["autoregressive", "vispec", "vispec (whole tree)"]
    alone = sum(prompt["tokens"] for prompt in results["speed"][0]["prompts"])
    for entry in entries:
        assert entry["temperature"] == 1 and entry["identical"] == entry["answers"] == 3
        assert entry["tokens"] == alone and entry["compilations_while_measuring"] == 0 < entry["compilations"]
        rates = [alone / seconds for seconds in entry["seconds"]]
        np.testing.assert_allclose(entry["tokens_per_second_runs"], rates)
        assert entry["tokens_per_second"] == pytest.approx(np.median(rates)) and len(entry["speedup_runs"]) == 2
        assert math.isclose(entry["speedup"], entry["tokens_per_second"] / entries[0]["tokens_per_second"])
    assert entries[0]["mean_acceptance_length"] == 1 <= entries[2]["mean_acceptance_length"] <= 3
    assert results["settings"]["concurrency"] == 2
    text = (tmp_path / "results.md").read_text()
    assert "## Throughput, 2 at once" in text and "| vispec (whole tree) | 1 |" in text
    assert "draft as much as pays" in " ".join(capsys.readouterr().out.split())


def test_what_the_folder_asks_for_applies_in_every_arm(asking, tmp_path, capsys):
    """But for its temperature: the benchmark has its own."""
    few = ["--num-prompts", "1", "--score-prompts", "0", "--runs", "1", "--max-new-tokens", "12", "--temperatures", "0"]
    where = ["--target", str(asking), "--output", str(tmp_path), "--compilation-cache", "", "--drafters", "lookup"]
    assert main(["bench", *where, *few, "--presence-penalty", "1"]) == 0
    settings = json.loads((tmp_path / "results.json").read_text())["settings"]
    assert settings["generation_config"] == {"repetition_penalty": 1.5}
    assert settings["penalties"] == {"presence_penalty": 1}
    text = (tmp_path / "results.md").read_text()
    assert "* in every arm: presence_penalty 1\n* from generation_config.json: repetition_penalty 1.5\n" in text
    assert "repetition_penalty 1.5 (--no-generation-config turns that off)" in capsys.readouterr().err
    results = json.loads((tmp_path / "results.json").read_text())
    assert [entry["identical"] for entry in results["speed"]] == [1, 1]
    words = results["speed"][0]["prompts"][0]["text"]
    target = jaxspec.load_target(asking)
    sampling = jaxspec.SamplingParams(temperature=0, presence_penalty=1)
    question = example_prompts(1, 0)[0]
    expected = jaxspec.Generator(target).generate(question.question, [question.image], sampling, 12)
    assert words == expected.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--temperatures", "1", "--drafters", "DRAFTER", "DRAFTER"], "two drafters are called vispec"),
        (["--drafters", "DRAFTER", "--runs", "0"], "runs must be at least 1"),
        (["--drafters", "DRAFTER", "--num-prompts", "0"], "num_prompts must be at least 1"),
        (["--drafters", "DRAFTER", "--concurrency", "-1"], "concurrency must be at least 0, got -1"),
        (["--drafters", "DRAFTER", "--concurrency", "21"], "concurrency must lie in 1..20, the number of prompts"),
        (["--drafters", "DRAFTER", "--temperatures", "-1"], "temperature must be finite"),
    ],
)
def test_bad_input_is_one_sentence(models, capsys, arguments, sentence):
    target, drafter = map(str, models)
    arguments = [drafter if argument == "DRAFTER" else argument for argument in arguments]
    assert main(["bench", "--target", target, "--compilation-cache", "", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_help_and_unknown_flags(capsys):
    assert main(["bench", "--help"]) == 0
    assert "--drafters" in capsys.readouterr().out
    assert main(["bench", "--fast"]) == 2


def test_pooled_acceptance_is_that_of_all_rounds():
    histograms = np.random.default_rng(0).integers(0, 40, (7, 5))
    one_by_one = [Acceptance.from_histogram(each) for each in histograms]
    assert pooled(one_by_one) == Acceptance.from_histogram(histograms.sum(axis=0))


def test_speedup_sums_before_it_divides():
    baseline = [Timing(11, (1.0, 2.0, 3.0), (0.1,) * 3), Timing(21, (4.0,) * 3, (0.1,) * 3)]
    timings = [Timing(11, (1.0,) * 3, (0.1,) * 3), Timing(21, (1.0,) * 3, (0.1,) * 3)]
    assert speedup(baseline, timings) == pytest.approx((2 + 4) / 2)
    assert speedup_of_run(baseline, timings, 0) == pytest.approx((1 + 4) / 2)
    assert timings[0].decode_tokens_per_second == 10
    assert math.isnan(Timing(1, (0.0,), (0.1,)).decode_tokens_per_second)


@pytest.mark.parametrize(
    ("stolen", "patience", "kept", "repeated"),
    [
        ([0.0, 0.005, 0.01, 0.0], 10, [0, 1, 2], 0),  # calm: no more than was asked
        ([0.3, 0.0, 0.2, 0.004, 0.002, 0.0], 10, [1, 4, 3], 2),
        ([0.3, 0.0, 0.2, 0.1, 0.5, 0.4, 0.0], 2, [1, 3, 2], 3),  # patience ends
        ([0.3, 0.2, 0.1], 1, [2, 1, 0], 0),
    ],
)
def test_runs_that_the_host_disturbed_are_repeated(monkeypatch, stolen, patience, kept, repeated):
    shares, calls = iter(stolen), {"a": [], "b": []}
    monkeypatch.setattr(measure, "StolenShare", lambda: lambda: next(shares))
    arms = {name: lambda made=made: made.append(None) or len(made) - 1 for name, made in calls.items()}
    made = interleaved(arms, 3, patience)
    assert made.answers == {"a": kept, "b": kept} and made.repeated == repeated
    assert made.stolen == [stolen[index] for index in kept]


def test_share_of_the_machine_that_the_host_took(monkeypatch, tmp_path):
    """A quarter of two cores' time: one second between the looks, half a second stolen."""
    stat, ticks, clock = tmp_path / "stat", os.sysconf("SC_CLK_TCK"), iter([7.0, 8.0])
    monkeypatch.setattr(host, "PROC_STAT", stat)
    monkeypatch.setattr(host.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(host.os, "cpu_count", lambda: 2)
    assert host.stolen_seconds() == 0.0  # no such file
    stat.write_text(f"cpu  1 2 3 4 5 6 7 {3 * ticks} 9 10\ncpu0 1\n")
    share = host.StolenShare()
    stat.write_text(f"cpu  1 2 3 4 5 6 7 {3 * ticks + ticks // 2} 9 10\ncpu0 1\n")
    assert share() == 0.25


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
