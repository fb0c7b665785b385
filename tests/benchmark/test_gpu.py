"""The command that measures a lent GPU, rehearsed: every part with toys, and what happens where time, a part or the GPU
is missing."""

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import gpu
from benchmarks.gpu_parts import __main__ as parts
from benchmarks.gpu_parts import ceilings, decoding
from benchmarks.gpu_parts.decoding import groups
from benchmarks.gpu_parts.equality import TREE, Informed
from benchmarks.gpu_parts.kernels import suiting, usable
from benchmarks.gpu_parts.part import Part
from benchmarks.gpu_parts.profiling import scope_of, summary_of
from benchmarks.gpu_parts.table import page, results_of
from benchmarks.random_models import random_module
from jaxspec.drafters.contract import DrafterContext
from jaxspec.drafters.registry import METHODS
from jaxspec.kernels.attention import KERNELS, Kernel

ROOT = Path(gpu.__file__).parents[1]
PARTS = [name for name in gpu.COSTS if name != "transformers" or importlib.util.find_spec("torch")]


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The whole command with toys."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--output", str(folder), "--cache", str(folder / "cache")]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=580)
    return folder, ran


def rows_of(folder: Path, part: str) -> list[dict]:
    return json.loads((folder / f"{part}.json").read_text())["rows"]


def test_every_part_tells_all_it_should(rehearsed):
    folder, ran = rehearsed
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for name in PARTS:
        told = json.loads((folder / f"{name}.json").read_text())
        assert (told["status"], told["errors"], told["left_out"]) == ("complete", [], []), name
        assert told["tiny"] and told["rows"]
    assert not list(folder.glob("*.tmp"))
    # What a lent machine gives back: eight files at most.
    assert len([path for path in folder.iterdir() if path.is_file()]) <= 8


@pytest.mark.parametrize("part", ["llava-7b", "qwen-7b"])
def test_rounds_are_timed_beside_a_step(rehearsed, part):
    rows = [row for row in rows_of(rehearsed[0], part) if row["measure"] == "round"]
    many = {(8, 1), (8, 30), (8, 60)} if part == "llava-7b" else set()
    assert {(row["batch"], row["nodes"]) for row in rows} == {(1, 1), (1, 30), *many}
    assert {row["kernel"] for row in rows} == ({"plain", "xla"} if part == "llava-7b" else {"plain"})
    for row in rows:
        assert row["round_ms"] > 0 and 0 < row["ceiling_by_bytes"] <= 1
        assert (row["efficiency"] == 1) == (row["nodes"] == 1)
    if part == "qwen-7b":
        ceilings = {row["arm"]: row["ceiling_by_bytes"] for row in rows}
        assert ceilings["vispec-eighth 3/8/30"] > ceilings["vispec 3/8/30"]


@pytest.mark.parametrize("eighth_first", [False, True])
def test_a_gpu_is_asked_for_trees_of_all_sizes_with_every_kernel(eighth_first):
    kernels = suiting("bfloat16", "gpu")
    asked = groups(1024, eighth_first, kernels)
    assert kernels == ("plain", "xla", "cudnn") and [group.kernel for group in asked[:3]] == list(kernels)
    for batch, kernel in itertools.product((1, 8), kernels):
        own = [group for group in asked if (group.batch, group.kernel) == (batch, kernel)]
        assert {tree.total_tokens for group in own for _, tree in group.arms} == {8, 16, 30, 60}
    assert len({group.name for group in asked}) == len(asked)
    assert ("vispec", METHODS["vispec"].tree) in asked[0].arms
    # A round takes few enough tokens for as many rounds as are timed.
    assert max(tree.max_depth + 1 for group in asked for _, tree in group.arms) * 48 <= 1024 - 32 - 576 - 16


def test_answers_are_identical_along_accepted_paths(rehearsed):
    rows = rows_of(rehearsed[0], "equality")
    assert [(row["kernel"], row["temperature"]) for row in rows] == [("plain", 0), ("plain", 1), ("xla", 0), ("xla", 1)]
    for row in rows:
        assert row["identical"] == row["answers"] and row["flips"] == []
        assert row["mean_acceptance_length"] > 2.5
    assert 0 < rows[0]["margins_moved_by"] < 1e-4 < rows[0]["smallest_margin"]
    for row in rows_of(rehearsed[0], "embedded"):
        assert row["identical"] == row["answers"] and row["differences"] == []


def test_the_operations_of_a_training_step_are_those_of_its_program(rehearsed):
    (row,) = rows_of(rehearsed[0], "training")
    assert 0.5 < row["teraflops_needed"] / row["teraflops_counted_by_xla"] < 1.2
    assert np.isfinite(row["losses"]).all() and row["tokens_per_second"] > 0


def test_the_profile_says_where_a_round_spends_its_time(rehearsed):
    notes = json.loads((rehearsed[0] / "llava-7b.json").read_text())["notes"]
    (step, round_) = notes.values()
    assert "verify/layer/attention" in step and "propose" not in step.partition("by operation")[0]
    assert "verify/layer/attention" in round_ and "propose" in round_


def test_the_page_shows_every_part(rehearsed):
    text = (rehearsed[0] / "README.md").read_text()
    assert "A rehearsal with toys" in text
    assert text.count("\n## ") == 8 + 4  # sections (one of them of what is missing where torch is), profiles
    if "transformers" in PARTS:
        assert "## Not measured" not in text
        peers = [line for line in text.splitlines() if line.startswith("| llava-7b |") and "float32" in line]
        # theirs / ours, of which a busy machine may make anything
        assert len(peers) == 2 and all(np.isfinite(float(line.split("|")[7])) for line in peers)


def test_what_there_is_no_time_for_is_left_out_by_name(tmp_path, capsys):
    assert gpu.main(["--tiny", "--minutes", "0.11", "--output", str(tmp_path), "--parts", "ceilings", "training"]) == 0
    for name in ("ceilings", "training"):
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told["status"] == "left out" and told["left_out"] == [f"{name}: it takes about 5 s, 1 were left"]
    assert "training: it takes about 5 s" in (tmp_path / "README.md").read_text()


def test_results_of_an_earlier_run_stay_where_a_part_is_left_out(tmp_path):
    before = {"part": "ceilings", "status": "complete", "rows": [{"measure": "copy", "mebibytes": 1}]}
    (tmp_path / "ceilings.json").write_text(json.dumps(before))
    assert gpu.main(["--tiny", "--minutes", "0.11", "--output", str(tmp_path), "--parts", "ceilings"]) == 0
    assert json.loads((tmp_path / "ceilings.json").read_text()) == before


def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0)
    given = gpu.parsed(["--tiny", "--output", str(tmp_path)])
    assert gpu.run("ceilings", 0.2, tmp_path, given) < 0
    told = json.loads((tmp_path / "ceilings.json").read_text())
    assert told["status"] == "failed" and "still busy" in told["errors"][0]


def test_without_a_gpu_one_sentence(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert gpu.main(["--output", str(tmp_path), "--parts", "ceilings", "embedded"]) == gpu.NO_GPU == parts.NO_GPU
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "needs a GPU and found none" in line
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--parts", "speed"], "--parts must be among ceilings, .* got speed"),
        (["--table", "nowhere"], "--table needs a folder of results, nowhere is none"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        gpu.parsed(arguments)
    assert re.search(problem, capsys.readouterr().err)


def test_an_error_takes_nothing_from_the_rest_of_a_part(tmp_path):
    part = Part("ceilings", tmp_path / "ceilings.json", 100.0)

    def broken() -> None:
        part.add("copy", mebibytes=1, gigabytes_per_second=float("nan"))
        raise MemoryError("the card is full")

    assert not part.trying("first", 1, broken)
    assert part.trying("second", 1, lambda: part.add("copy", mebibytes=2, gigabytes_per_second=1.0))
    assert not part.trying("third", 1000, broken)
    part.save(ended=True)
    told = json.loads(part.file.read_text())
    assert told["status"] == "partial" and told["left_out"] == ["third"]
    assert told["errors"] == [f"first: MemoryError at {Path(__file__).name}:{broken_line()}: the card is full"]
    assert [row["gigabytes_per_second"] for row in told["rows"]] == [None, 1.0]
    assert "MemoryError" in page(results_of(tmp_path))


@pytest.fixture
def broken_xla(monkeypatch):
    """A kernel that fails when it is compiled, as one of a library may on a card."""

    def run(query, segments, scale):
        raise NotImplementedError("no engine\nfor this | graph")

    monkeypatch.setitem(KERNELS, "xla", Kernel(run))


def test_a_kernel_that_fails_has_a_row_that_says_so_and_is_left_out_later(tmp_path, broken_xla):
    part = Part("ceilings", tmp_path / "ceilings.json", 100.0, tiny=True)
    for kernel in suiting("float32"):
        ceilings.attention(part, kernel, "float32")
    plain, xla = part.rows
    assert plain["kernel"] == "plain" and plain["microseconds"] > 0 and plain["relative_error"] < 1e-6
    assert xla["kernel"] == "xla" and xla["failed"] == "NotImplementedError: no engine\nfor this | graph"
    later = Part("equality", tmp_path / "equality.json", 100.0, tiny=True)
    assert usable(later, "float32") == ("plain",)
    assert later.left_out == ["attention by xla, float32: see the part ceilings, it failed there"]
    assert "| NotImplementedError: no engine for this / graph |" in page(results_of(tmp_path))


def test_a_kernel_of_which_ceilings_told_nothing_is_not_tried(tmp_path):
    """It may have ended the process."""
    assert suiting("float32", "gpu") == ("plain", "xla") and suiting("bfloat16", "cpu") == ("plain",)
    part = Part("llava-7b", tmp_path / "llava-7b.json", 100.0)
    for rows, expected in (([], 2), ([{"measure": "attention", "kernel": "plain", "microseconds": 1.0}], 1)):
        (tmp_path / "ceilings.json").write_text(json.dumps({"rows": [{"measure": "copy"}, *rows]}))
        assert len(usable(part, "float32")) == expected
    assert part.left_out == ["attention by xla, float32: see the part ceilings, nothing is told of it there"]


def test_a_kernel_that_fails_costs_its_own_rounds_only(tmp_path, broken_xla):
    part = Part("llava-7b", tmp_path / "llava-7b.json", 300.0, tiny=True)
    decoding.measure(part)
    rounds = {(row["kernel"], row["batch"]) for row in part.rows if row["measure"] == "round"}
    assert rounds == {("plain", 1), ("plain", 8)} and part.left_out == []
    (error,) = part.errors
    assert error.startswith("batch 1, xla, capacity 128: vispec 3/8/30: NotImplementedError")


def broken_line() -> int:
    lines = Path(__file__).read_text().splitlines()
    return 1 + next(number for number, line in enumerate(lines) if line.strip().startswith("raise MemoryError("))


def test_the_informed_drafter_is_right_to_changing_depths():
    answers = np.arange(100, 120)[None] + np.array([[0], [50]])
    drafter = Informed(answers)
    model = type("Model", (), {"vocab_size": 1000})
    state = drafter.prefill(model, DrafterContext.of(input_ids=[[1], [1]], root=answers[:, 0]), 32)
    for number in range(2 * (TREE.max_depth + 1)):
        before = int(state[1][0]) - 1  # answers that both rows know to have been said
        tree = drafter.propose(model, TREE, state, jnp.asarray(answers[:, before]), None, None)
        depths = np.asarray(tree.depths)
        assert tree.tokens.shape == (2, TREE.total_tokens) and depths.max() == TREE.max_depth
        right = np.asarray(tree.tokens) == np.take_along_axis(answers, before + depths, axis=1)
        path = np.asarray(tree.ancestors)[:, np.argmax(np.where(right, depths, -1)[0])]  # of the deepest right node
        assert (right == path).all()
        assert (right.sum(axis=1) == 1 + number % (TREE.max_depth + 1)).all()
        state = drafter.advance(model, state, None, None, jnp.array([1, 1]))


def test_a_profile_needs_no_viewer():
    @jax.jit
    def work(x):
        with jax.named_scope("layer_3"), jax.named_scope("mlp"):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ x), x)

    x = jnp.ones((128, 128))
    text = summary_of(lambda: jax.block_until_ready(work(x)), 1, work.lower(x).compile().as_text())
    # What a product is called is the compiler's choice.
    assert re.search(r"% x9.0 +layer/mlp$", text, re.MULTILINE)
    assert re.search(r"% x3.0 +\w*tanh +layer/mlp$", text, re.MULTILINE)
    assert scope_of("jit(run)/while/body/closed_call/verify/layer_11/attention/dot_general") == "verify/layer/attention"


def test_random_modules_are_of_the_size_they_say():
    model = random_module(lambda rngs: nnx.Linear(64, 4096, rngs=rngs), "bfloat16")
    kernel = np.asarray(model.kernel[...], np.float32)
    assert model.kernel.dtype == jnp.bfloat16 and abs(kernel.std() * 8 - 1) < 0.05
    assert not np.asarray(model.bias[...]).any()


def test_only_training_needs_what_reads_data():
    """A lent machine has JAX and flax, and maybe not these."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['grain', 'tensorflow_datasets', 'array_record', 'tyro', 'torch']);"
        "from benchmarks.gpu_parts import ceilings, decoding, embedded, equality, torch_peer"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_command_needs_the_standard_library_alone():
    code = "import sys; sys.modules['jax'] = sys.modules['tyro'] = None; from benchmarks import gpu; gpu.parsed([])"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, env={"PATH": os.environ["PATH"]}, check=True)
