"""The table of benchmarks/aot_tpu.py, with the programs of a small target compiled for this machine's CPUs."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import aot_programs, aot_tpu
from benchmarks.aot_programs import Arm, Decoding
from benchmarks.published import Published, abstract_model, square_picture, vispec_config
from jaxspec.layers import TextConfig
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig

ROOT = Path(__file__).parents[2]

TINY = Published(
    Llava,
    LlavaConfig(TextConfig(320, 64, 128, 2, 4, 2, 16), ClipVisionConfig(32, 64, 2, 2, 28, 14), 319),
    LlavaAdapter,
    square_picture,
)
ARMS = {
    "autoregressive": Arm("tiny"),
    "vispec": Arm("tiny", "vispec", vispec_config, TreeConfig(2, 3, 8)),
    "vispec-eighth": Arm("tiny", "vispec", functools.partial(vispec_config, share=8), TreeConfig(2, 3, 8)),
    "vispec-int8": Arm("tiny", "vispec", functools.partial(vispec_config, own_head=True), quantize=True),
}


@functools.cache
def tiny_row(arm: str, program: str) -> dict:
    decoding = Decoding(TINY, ARMS[arm], jax.devices()[:1], 1, 128)
    about = {"arm": f"tiny/{arm}", "program": program, "kind": "v5e", "chips": 1, "batch": 1}
    return about | aot_tpu.Compile().told(about, getattr(decoding, program), decoding.resident(program))


@pytest.mark.parametrize("arm", ARMS)
def test_a_round_reads_the_weights_of_its_arm(arm):
    """The programs of a small target, compiled for this machine's CPU."""
    layers = nnx.state(abstract_model(Llava, TINY.config).language_model.layers)
    weights = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    row = tiny_row(arm, "decode")
    assert weights < row["bytes"] < 100 * weights and row["flops"] > 0 and row["collectives"] == {}
    assert row["fits"] and row["gib"] < 0.1


def test_what_a_drafter_costs_lowers_the_ceiling():
    plain, whole, eighth = (tiny_row(arm, "decode") for arm in ("autoregressive", "vispec", "vispec-eighth"))
    rows = [aot_tpu.with_ceiling(row, [plain]) for row in (plain, whole, eighth)]
    assert rows[0]["ceiling"] == 1 and rows[1]["ceiling"] < rows[2]["ceiling"] < 1
    assert "ceiling 1.000" in aot_tpu.sentence(rows[0]) and "compile-only" in aot_tpu.sentence(rows[0])


def test_a_chunk_of_a_prompt_is_compiled_too():
    row = tiny_row("vispec", "prefill")
    assert row["bytes"] > 0 and row["flops"] > tiny_row("vispec", "decode")["flops"]
    assert "ceiling" not in aot_tpu.with_ceiling(row, [tiny_row("autoregressive", "decode")])


def test_an_int8_drafter_has_a_head_of_all_tokens():
    decoding = Decoding(TINY, ARMS["vispec-int8"], jax.devices()[:1], 1, 128)
    head = decoding.draft_model.draft_head
    assert head.kernel.shape == (64, 320) and head.kernel.dtype == jnp.int8 and head.kernel_scale.shape == (1, 320)
    assert not any(leaf.dtype == jnp.int8 for leaf in jax.tree.leaves(nnx.state(decoding.model)))


def made_row(arm: str, size: float, **others: object) -> dict:
    about = {"arm": arm, "program": "decode", "kind": "v5e", "chips": 1, "batch": 1, "positions": 64, "layers": None}
    return about | {"bytes": size, "bytes_filled": size / 2} | others


def test_rows_of_several_commands_fill_one_table():
    rows = aot_tpu.merged([], made_row("llava/vispec", 20.0))
    assert "ceiling" not in rows[0]
    rows = aot_tpu.merged(rows, made_row("llava/autoregressive", 10.0))  # the step may come later
    assert [row["ceiling"] for row in rows] == [0.5, 1.0]
    rows = aot_tpu.merged(rows, made_row("llava/vispec", 40.0))
    assert [(row["arm"], row["ceiling"]) for row in rows] == [("llava/vispec", 0.25), ("llava/autoregressive", 1.0)]
    for others in ({"layers": 2}, {"chips": 4}, {"batch": 2}, {"positions": 128}, {"kind": "v6e"}):
        added = aot_tpu.merged(rows, made_row("llava/vispec", 20.0, **others))
        assert len(added) == 3 and "ceiling" not in added[-1]


def test_what_does_not_fit_gives_no_ceiling():
    row = made_row("llava/autoregressive", 1.0) | {"fits": False, "gib": 17.3, "limit_gib": 15.75}
    del row["bytes"], row["bytes_filled"]
    rows = aot_tpu.merged([row], made_row("llava/vispec", 20.0))
    assert not any("ceiling" in each for each in rows)
    assert "does not fit, 17.3 of 15.75 GiB" in aot_tpu.sentence(rows[0])


def test_what_a_compiler_refuses_is_read():
    new = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (17.30G) exceeds available HBM (15.75G). HLO module: jit_run."
    )
    old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.30G of 15.75G hbm. Exceeded by 1.55G."
    assert aot_tpu.refusal(new) == aot_tpu.refusal(old) == (17.3, 15.75)
    assert aot_tpu.refusal("INTERNAL: Mosaic failed to compile") is None


def test_a_file_keeps_the_rows_of_other_commands(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_tpu, "chips_of", lambda kind, count: jax.devices()[:count])
    monkeypatch.setattr(aot_tpu, "version", lambda package: "none")
    monkeypatch.setitem(aot_tpu.TARGETS, "tiny", TINY)
    for name, arm in ARMS.items():
        monkeypatch.setitem(aot_tpu.ARMS, f"tiny/{name}", arm)
    output = tmp_path / "table.json"
    for names in (["vispec"], ["autoregressive"], ["vispec"]):
        arms = tuple(f"tiny/{name}" for name in names)
        options = {"kinds": ("v5e",), "chips": (1,), "programs": ("decode",), "capacity": 128, "filled": 64}
        aot_tpu.Compile(output, arms, **options).write()
    rows = json.loads(output.read_text())["rows"]
    assert {row["arm"] for row in rows} == {"tiny/vispec", "tiny/autoregressive"} and len(rows) == 2
    assert all(0 < row["ceiling"] <= 1 for row in rows)


def test_groups_have_as_many_chips_as_divide_the_heads():
    assert [aot_programs.tensor_of(heads, 8) for heads in (32, 28, 16, 7)] == [8, 4, 8, 1]
    assert aot_programs.tensor_of(28, 4) == 4 and aot_programs.tensor_of(32, 1) == 1


ON_A_MESH = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 4)
from jaxspec import demo
from jaxspec.sharding import decoding_mesh
from benchmarks.aot_programs import Decoding
from tests.benchmark.test_aot_tpu import ARMS, TINY

decoding = Decoding(TINY, ARMS["vispec"], jax.devices(), 1, 128)
state, read = decoding.begun(), decoding.read()
left = [getattr(decoding, program)().compile().output_shardings for program in ("decode", "prefill")]
same = jax.tree.map(lambda leaf, there: leaf.sharding.is_equivalent_to(there, len(leaf.shape)), [state, read], left)
text = decoding.params[0]["language_model"]["layers"][0]["self_attn"]
print(json.dumps({
    "mesh": dict(decoding.programs.mesh.shape),
    "same": jax.tree.leaves(same),
    "keys": state.cache.layers[0].keys.sharding.shard_shape(state.cache.layers[0].keys.shape),
    "k_proj": list(text["k_proj"]["kernel"].get_value().sharding.spec),
    "q_proj": list(text["q_proj"]["kernel"].get_value().sharding.spec),
}))
"""


def test_on_a_mesh_everything_lies_as_the_programs_leave_it():
    """4 devices, 4 heads, 2 key heads: each device has a copy of one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_A_MESH]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 4} and all(found["same"]) and len(found["same"]) > 20
    assert found["keys"] == [1, 1, 128, 16]
    assert found["q_proj"] == ["fsdp", "tensor"] and found["k_proj"] == ["fsdp", None]


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="arms llama/vispec are not known; known are llava-1.5-7b/autoregressive, "):
        aot_tpu.Compile(arms=("llama/vispec",))
