"""The results of `benchmarks/gpu.py` as one page of tables. Only the standard library is needed."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Column = tuple[str, str | Callable[[Row], Any], str]
"""Title, field (or what makes it of a row), format."""

ORDER = ("ceilings", "llava-7b", "qwen-7b", "equality", "embedded", "training", "transformers")
CEILINGS: Sequence[Column] = (
    ("what", "measure", ""),
    ("of", lambda row: of(row, "mebibytes", "rows", "size", "dtype", "precision"), ""),
    ("GB/s", "gigabytes_per_second", ".0f"),
    ("TFLOP/s", "teraflops", ".1f"),
    ("ms", "milliseconds", ".3f"),
    ("us", "microseconds", ".1f"),
)
ATTENTION: Sequence[Column] = (
    ("shape", "shape", ""),
    ("attention", "kernel", ""),
    ("dtype", "dtype", ""),
    ("us", "microseconds", ".1f"),
    ("share of the memory bound", "memory_bound_share", ".2f"),
    ("largest error over the largest output", "relative_error", ".2g"),
    ("failed", lambda row: " ".join(row.get("failed", "").split()).replace("|", "/"), ""),
)
ROUNDS: Sequence[Column] = (
    ("shape", "shape", ""),
    ("batch", "batch", ""),
    ("attention", "kernel", ""),
    ("capacity", "capacity", ""),
    ("arm", "arm", ""),
    ("nodes", "nodes", ""),
    ("round, ms", "round_ms", ".2f"),
    ("efficiency", "efficiency", ".2f"),
    ("of the fastest step", "efficiency_of_fastest", ".2f"),
    ("ceiling by bytes", "ceiling_by_bytes", ".2f"),
    ("share of the memory bound", "memory_bound_share", ".2f"),
)
PREFILL: Sequence[Column] = (
    ("shape", "shape", ""),
    ("arm", "arm", ""),
    ("tokens", "tokens", ""),
    ("image, ms", "encode_ms", ".1f"),
    ("prompt, ms", "read_ms", ".1f"),
    ("first token and drafter, ms", "begin_ms", ".1f"),
    ("TFLOP/s in the prompt", "read_teraflops", ".1f"),
    ("target, GB", "target_gigabytes", ".1f"),
    ("drafter, GB", "drafter_gigabytes", ".2f"),
)
EQUALITY: Sequence[Column] = (
    ("dtype", "dtype", ""),
    ("attention", "kernel", ""),
    ("temperature", "temperature", "g"),
    ("identical", lambda row: f"{row['identical']}/{row['answers']}", ""),
    ("tokens each", "tokens", ""),
    ("acceptance length", "mean_acceptance_length", ".2f"),
    ("margins move by at most", "margins_moved_by", ".2g"),
    ("flips: margin at position", lambda row: flips(row["flips"]), ""),
    ("margins more than twice that", "beyond_rounding", ""),
)
EMBEDDED: Sequence[Column] = (
    ("dtype", "dtype", ""),
    ("products", "precision", ""),
    ("arm", "arm", ""),
    ("temperature", "temperature", "g"),
    ("decode tokens/s", "decode_tokens_per_second", ".0f"),
    ("speed-up", "speedup", ".2f"),
    ("efficiency", "efficiency", ".2f"),
    ("acceptance length", "mean_acceptance_length", ".2f"),
    ("identical", lambda row: f"{row['identical']}/{row['answers']}", ""),
    ("flips: margin at position", lambda row: flips(row["differences"]), ""),
    ("time to first token, ms", "time_to_first_token_ms", ".1f"),
)
TRAINING: Sequence[Column] = (
    ("rows x tokens", lambda row: f"{row['rows']} x {row['length']}", ""),
    ("target", "dtype", ""),
    ("step, ms", "milliseconds", ".0f"),
    ("tokens/s", "tokens_per_second", ".0f"),
    ("TFLOP needed", "teraflops_needed", ".1f"),
    ("MFU", "mfu", ".2f"),
    ("TFLOP that XLA counts", "teraflops_counted_by_xla", ".1f"),
    ("first step, s", "first_step_seconds", ".0f"),
)
PEER: Sequence[Column] = (
    ("shape", "shape", ""),
    ("batch", "batch", ""),
    ("dtype", "dtype", ""),
    ("its attention", "attention", ""),
    ("step, ms", "step_ms", ".2f"),
    ("ours, ms", "our_step_ms", ".2f"),
    ("theirs / ours", "ratio", ".2f"),
    ("prompt with image, ms", "prefill_ms", ".0f"),
    ("ours, ms", "our_prefill_ms", ".0f"),
)
SECTIONS: Sequence[tuple[str, str, Sequence[str], Sequence[Column]]] = (
    (
        "What the card can do",
        "A thin product is 16 matrices of 4096 x 11008, one after another; only their bytes count.",
        ("copy", "thin product", "product", "start of a program", "round of a loop with one kernel",
         "round of a loop with a branch"),
        CEILINGS,
    ),
    (
        "Attention alone",
        "One call over random keys; the bound counts queries, output, and keys and values that are seen, at the "
        "bandwidth of the data sheet. The error is that against the plain form in float32. A kernel that failed is "
        "left out of what follows.",
        ("attention",),
        ATTENTION,
    ),
    (
        "A step and a round",
        "Random weights. `efficiency` is the time of an autoregressive step of the same batch, kernel and capacity "
        "divided by that of the round: what is kept of every token that a drafter earns. `ceiling by bytes` is what it "
        "would be if time were the bytes of weights; the memory bound is weights, and keys and values that are filled, "
        "at the bandwidth of the data sheet.",
        ("round",),
        ROUNDS,
    ),
    ("Prefill", "One row with an image, each stage waited for.", ("prefill",), PREFILL),
    (
        "Speculative = autoregressive at 7B shapes",
        "Random weights, a drafter that knows the answers and errs at changing depths. A flip at temperature 0 has "
        "the margin by which the best token led the second. Margins move where a tree is read instead of a token; one "
        "that flips should be no more than twice that.",
        ("equality",),
        EQUALITY,
    ),
    ("The embedded model, end to end", "Templated text flatters every drafter.", ("embedded",), EMBEDDED),
    (
        "Training a ViSpec head for LLaVA-7B",
        "`MFU`: what the mathematics needs, once, of the card's bfloat16 products. XLA counts bodies of loops once.",
        ("training step",),
        TRAINING,
    ),
    ("transformers on the same card", "Autoregressive `generate`, random weights.", ("transformers",), PEER),
)  # fmt: skip


def of(row: Row, *fields: str) -> str:
    return ", ".join(f"{row[field]} {field}" if field in ("mebibytes", "rows") else str(row[field])
                     for field in fields if field in row)  # fmt: skip


def flips(entries: Sequence[Row]) -> str:
    told = ["?" if each["margin"] is None else f"{each['margin']:.2g}" for each in entries]
    return ", ".join(f"{margin} at {each['position']}" for margin, each in zip(told, entries, strict=True)) or "none"


def results_of(folder: Path) -> list[dict[str, Any]]:
    """What the parts have written, in a reader's order. Raises ValueError where there is nothing."""
    files = [folder / f"{name}.json" for name in ORDER]
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    if not found:
        raise ValueError(
            f"{folder} holds no results of benchmarks/gpu.py ({', '.join(f'{name}.json' for name in ORDER)})"
        )
    return found


def compared(rows: list[Row]) -> None:
    """Fills in what compares rows of different groups and parts."""
    steps: dict[tuple, tuple[float, float]] = {}
    for row in rows:
        if row["measure"] == "round" and row["nodes"] == 1:
            key = row["shape"], row["batch"]
            steps[key] = min(steps.get(key, (float("inf"), 0.0)), (row["round_ms"], row["prefill_ms"]))
    for row in rows:
        step, prefill = steps.get((row.get("shape"), row.get("batch")), (None, None))
        if row["measure"] == "round" and step:
            row["efficiency_of_fastest"] = step / row["round_ms"]
        if row["measure"] == "transformers" and step:
            row |= {"our_step_ms": step, "our_prefill_ms": prefill, "ratio": row["step_ms"] / step}


def page(parts: list[dict[str, Any]]) -> str:
    first = next((part for part in parts if part.get("device")), parts[0])
    rows = [row for part in parts for row in part["rows"]]
    compared(rows)
    versions = ", ".join(f"{name} {first[name]}" for name in ("jax", "jaxlib", "flax") if name in first)
    peer = next((part for part in parts if part.get("torch")), None)
    versions += f", torch {peer['torch']}, transformers {peer['transformers']}" if peer else ""
    lines = [f"# {first.get('device', 'unknown device')}", ""]
    if any(part.get("tiny") for part in parts):
        lines += ["A rehearsal with toys: none of these numbers means anything.", ""]
    lines += [f"`python benchmarks/gpu.py`, {first.get('date', 'no date')}, {versions}.", ""]
    lines += made(
        ("part", "status", "seconds", "compiling, s (threads added up)", "programs", "peak, GiB"),
        [
            [part["part"], part["status"], *(number(part.get(field), form) for field, form in PART_FIELDS)]
            for part in parts
        ],
    )
    for title, text, measures, columns in SECTIONS:
        chosen = [row for row in rows if row["measure"] in measures]
        if not chosen:
            continue
        used = [column for column in columns if any(cell(row, column) != "" for row in chosen)]
        cells = [[cell(row, column) for column in used] for row in chosen]
        lines += ["", f"## {title}", "", text, "", *made([name for name, _, _ in used], cells)]
    notes = [(name, text) for part in parts for name, text in part.get("notes", {}).items()]
    for name, text in notes:
        lines += ["", f"## Where the time goes: {name}", "", "```", text, "```"]
    missing = [each for part in parts for each in (*part.get("errors", ()), *part.get("left_out", ()))]
    if missing:
        lines += ["", "## Not measured", "", *(f"* {' '.join(each.split())}" for each in missing)]
    return "\n".join(lines) + "\n"


PART_FIELDS = (("seconds", ".0f"), ("compile_seconds", ".0f"), ("compilations", ""), ("peak_gib", ".1f"))


def cell(row: Row, column: Column) -> str:
    _, field, form = column
    return number(field(row) if callable(field) else row.get(field), form)


def number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def made(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles), *(f"| {' | '.join(each)} |" for each in cells)]


def write_table(folder: Path) -> int:
    """`README.md` in the folder; 1 where a part had an error or there is nothing, else 0."""
    try:
        parts = results_of(folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    path = folder / "README.md"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page(parts))
    temporary.replace(path)
    told = ", ".join(f"{part['part']} {part['status']}" for part in parts)
    print(f"{path}: {told}")
    return int(any(part.get("errors") for part in parts))
