"""A benchmark in words: `results.json` with every number, `results.md` with the tables."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxspec.targets.target import Target

TEMPLATED = (
    "The embedded model answers in templated text about rendered scenes, which flatters acceptance and speed-up: "
    "expect less of both on free text."
)
LEGEND = (
    "`mean_acceptance_length` counts the tokens of a verification step with the bonus token, "
    "`mean_accepted_draft_tokens` without it. `efficiency` is speed-up / mean_acceptance_length. Speed-up compares "
    "decoding after the first token with autoregressive decoding by the same code in the same run; `over runs` is "
    "the smallest to the largest of the runs, `over prompts` the 10th to the 90th percentile. `identical` counts the "
    "answers that equal autoregressive decoding token for token."
)
PACKAGES = ("jaxspec-vlm", "jax", "jaxlib", "flax", "transformers", "numpy")


def environment(target: Target, dtype: str, target_name: str, arguments: Sequence[str]) -> dict:
    """Where and with what a benchmark ran."""
    devices = jax.devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "jaxspec", *arguments]),
        "target": target_name,
        "target_fingerprint": target.fingerprint(),
        "dtype": dtype,
        "backend": jax.default_backend(),
        "device": cpu_name() if devices[0].platform == "cpu" else devices[0].device_kind,
        "devices": len(devices),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "commit": commit(),
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with a mark where files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not some repository around an installed package
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_report(results: dict, folder: Path) -> None:
    """`results.json` and `results.md` in `folder`, which is made where it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(strict_json(results), indent=1, allow_nan=False) + "\n")
    (folder / "results.md").write_text(markdown(results))


def strict_json(value: Any) -> Any:
    """JSON has no nan: null."""
    if isinstance(value, dict):
        return {str(key): strict_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


SPEED_COLUMNS = (
    "arm",
    "temperature",
    "decode tokens/s",
    "speed-up",
    "over runs",
    "over prompts",
    "efficiency",
    "mean_acceptance_length (with bonus)",
    "mean_accepted_draft_tokens (without)",
    "draft_acceptance_rate",
    "time to first token, ms",
    "end-to-end tokens/s",
    "identical",
    "compilations",
)


def speed_rows(results: dict) -> list[list[str]]:
    rows = []
    for entry in results["speed"]:
        prompts = entry["speedup_prompts"]
        rows.append([
            entry["arm"],
            f"{entry['temperature']:g}",
            number(entry["decode_tokens_per_second"], 1),
            number(entry["speedup"]),
            f"{number(min(entry['speedup_runs']))}..{number(max(entry['speedup_runs']))}",
            f"{number(prompts['p10'])}..{number(prompts['p90'])}",
            number(entry["efficiency"]),
            number(entry["mean_acceptance_length"]),
            number(entry["mean_accepted_draft_tokens"]),
            number(entry["draft_acceptance_rate"]),
            number(1000 * entry["time_to_first_token"], 1),
            number(entry["end_to_end_tokens_per_second"], 1),
            f"{entry['identical']}/{len(entry['prompts'])}",
            f"{entry['compilations']}+{entry['compilations_while_measuring']}",
        ])  # fmt: skip
    return rows


def position_tables(results: dict) -> list[str]:
    """Acceptance by position, joint and conditional, of the arms that draft."""
    drafting = [entry for entry in results["speed"] if entry["acceptance_at_position"]]
    if not drafting:
        return []
    deepest = max(len(entry["acceptance_at_position"]) for entry in drafting)
    columns = ["arm", "temperature", *(str(position) for position in range(1, deepest + 1))]
    lines = ["## Acceptance by position", ""]
    for field, meaning in (
        ("acceptance_at_position", "Share of rounds in which at least that many draft tokens were accepted:"),
        ("conditional_acceptance", "The same, given that one fewer was accepted:"),
    ):
        rows = []
        for entry in drafting:
            values = [number(value) for value in entry[field]]
            rows.append([entry["arm"], f"{entry['temperature']:g}", *values, *[""] * (deepest - len(values))])
        lines += [f"{meaning} `{field}`", "", *markdown_table(columns, rows), ""]
    return lines


def difference_lines(results: dict) -> list[str]:
    lines = ["## Answers that differ from autoregressive decoding", ""]
    rows = [
        [
            entry["arm"],
            f"{entry['temperature']:g}",
            str(each["prompt"]),
            str(each["position"]),
            f"{each['margin']:.3g}",
        ]
        for entry in results["speed"]
        for each in entry["differences"]
    ]
    if not rows:
        return [*lines, "None.", ""]
    explained = (
        "The margin is by how much the target's best token leads the second where the answers part. One of the size of "
        "the dtype's rounding is a tie; a large one would be an error (docs/EXACTNESS.md)."
    )
    columns = ["arm", "temperature", "prompt", "position of the first difference", "top-2 margin"]
    return [*lines, explained, "", *markdown_table(columns, rows), ""]


QUALITY_COLUMNS = (
    "arm",
    "scenes",
    "n",
    "precision",
    "recall",
    "F1",
    "strict precision",
    "strict recall",
    "strict F1",
    "identical",
)


def quality_rows(results: dict) -> list[list[str]]:
    rows = []
    for entry in results["quality"]:
        total = entry["scenes"]["all"]["scenes"]
        for kind, scores in entry["scenes"].items():
            values = [scores[key][field] for key in ("main", "strict") for field in ("precision", "recall", "f1")]
            identical = f"{entry['identical']}/{total}" if kind == "all" else ""
            rows.append([entry["arm"], kind, str(scores["scenes"]), *(number(value, 3) for value in values), identical])
    return rows


THROUGHPUT_COLUMNS = (
    "arm",
    "temperature",
    "tokens/s",
    "speed-up",
    "over runs",
    "mean_acceptance_length (with bonus)",
    "identical",
    "compilations",
)


def throughput_rows(results: dict) -> list[list[str]]:
    return [
        [
            entry["arm"],
            f"{entry['temperature']:g}",
            number(entry["tokens_per_second"], 1),
            number(entry["speedup"]),
            f"{number(min(entry['speedup_runs']))}..{number(max(entry['speedup_runs']))}",
            number(entry["mean_acceptance_length"]),
            f"{entry['identical']}/{entry['answers']}",
            f"{entry['compilations']}+{entry['compilations_while_measuring']}",
        ]
        for entry in results["throughput"]
    ]


def throughput_legend(settings: dict) -> str:
    """What that table says."""
    return (
        f"Many at once: an engine of {settings['concurrency']} slots is asked all {settings['num_prompts']} questions; "
        "a slot whose answer has ended is filled again. Tokens/s are those of all answers over the time from the first "
        "submission to the last token, with every prompt read whole. Speed-up compares with autoregressive decoding in "
        "as many slots. Arms draft as much as pays at the moment, those called whole tree draft it at all times."
    )


def markdown(results: dict) -> str:
    facts, settings = results["environment"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    kinds = ", ".join(f"{count} {kind}" for kind, count in settings["kinds"].items())
    lines = [
        "# Benchmark",
        "",
        f"    {facts['command']}",
        "",
        f"* {facts['date']}, commit {facts['commit'] or 'unknown'}",
        f"* target: {facts['target']}, checkpoint hash {facts['target_fingerprint']}, {facts['dtype']}",
        f"* machine: {facts['device']}, {facts['devices']} {facts['backend']} device(s), {facts['cpu_cores']} cores",
        f"* Python {facts['python']}, {versions}",
        f"* batch 1, {settings['num_prompts']} prompts ({kinds}), at most {settings['max_new_tokens']} new tokens, "
        f"median of {settings['runs']} interleaved runs after {settings['warm_ups']} warm-ups, seed {settings['seed']}",
    ]
    for name, source in (("penalties", "in every arm"), ("generation_config", "from generation_config.json")):
        if applied := settings.get(name):
            lines.append(f"* {source}: {', '.join(f'{key} {value:g}' for key, value in applied.items())}")
    disturbed = [entry["stolen"] for entry in results["speed"]]
    if any(share["max"] > 0 for share in disturbed):
        most, middle = (max(share[name] for share in disturbed) for name in ("max", "median"))
        tries = settings["runs"] * settings["patience"]
        lines.append(
            f"* the host of this virtual machine took at most {most:.1%} of the CPU in a run, at the median "
            f"{middle:.1%}; kept are the least disturbed of up to {tries} runs of a question"
        )
    for name, about in settings["drafters"].items():
        tree = about["tree"]
        lines.append(
            f"* drafter {name}: {about['method']}, tree of depth {tree['depth']}, top_k {tree['top_k']}, "
            f"{tree['total_tokens']} nodes with the root{trained_by(about['trained'])}"
        )
    if results.get("transformers"):
        other = results["transformers"]
        lines.append(
            f"* transformers' greedy generate: torch {other['torch']} on {other['device']}, "
            f"{other['threads']} threads, {other['dtype']}"
        )
    lines += ["", TEMPLATED, "", "## Speed", "", *markdown_table(SPEED_COLUMNS, speed_rows(results)), "", LEGEND]
    lines += ["Compilations: before + while measuring.", ""]
    warnings = [f"**{each['arm']}**: {each['warning']}" for each in results["speed"] if each["warning"]]
    lines += [line for warning in warnings for line in (warning, "")]
    lines += [*position_tables(results), *difference_lines(results)]
    if results["throughput"]:
        lines += [
            f"## Throughput, {settings['concurrency']} at once",
            "",
            *markdown_table(THROUGHPUT_COLUMNS, throughput_rows(results)),
            "",
            throughput_legend(settings),
            "",
        ]  # fmt: skip
    if results["quality"]:
        lines += [
            "## Quality",
            "",
            'Objects named in greedy answers to "describe" questions about held-out scenes, against the truth: '
            "place, colour and shape (a bar: colour and value); strict: the size too.",
            "",
            *markdown_table(QUALITY_COLUMNS, quality_rows(results)),
            "",
        ]  # fmt: skip
    return "\n".join(lines)


def trained_by(run: dict) -> str:
    """Where a drafter comes from, as far as its folder says."""
    if run["recipe"] is None:
        return ""
    known = {"recipe hash": run["recipe_hash"], "step": run["step"], "seed": run["seed"]}
    return f"; {run['recipe']} ({', '.join(f'{name} {value}' for name, value in known.items() if value is not None)})"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    alignment = ["---", *["---:"] * (len(columns) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (columns, alignment, *rows)]
