"""What benchmarks/hlo.py reads of a compiled program is what the program was written to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import aot_tpu, hlo
from benchmarks.published import Published, abstract_model, square_picture, vispec_config
from jaxspec.layers import TextConfig
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.clip import ClipVisionConfig
from jaxspec.targets.llava import Llava, LlavaAdapter, LlavaConfig

WIDTH, ROWS, BUFFER = 256, 8, 4096
# As the TPU compiler writes programs: layouts with memory spaces, asynchronous copies, fusions.
TPU = """HloModule jit_run, is_scheduled=true

%fused_update (param_0.1: bf16[1,8,2048,128], param_1.1: bf16[1,8,4,128], param_2.1: s32[]) -> bf16[1,8,2048,128] {
  %param_0.1 = bf16[1,8,2048,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.1 = bf16[1,8,4,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  %param_2.1 = s32[]{:T(128)} parameter(2)
  %constant.1 = s32[]{:T(128)} constant(0)
  ROOT %dus = bf16[1,8,2048,128]{3,2,1,0} dynamic-update-slice(%param_0.1, %param_1.1, %constant.1, %param_2.1)
}

%fused_copy (param_0.2: bf16[512,512]) -> bf16[512,512] {
  %param_0.2 = bf16[512,512]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[512,512]{0,1:T(8,128)(2,1)} copy(%param_0.2)
}

%body (arg: (s32[], bf16[1,8,2048,128], bf16[512,512])) -> (s32[], bf16[1,8,2048,128], bf16[512,512]) {
  %arg = (s32[]{:T(128)}, bf16[1,8,2048,128]{3,2,1,0}, bf16[512,512]{0,1}) parameter(0)
  %step = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %cache = bf16[1,8,2048,128]{3,2,1,0} get-tuple-element(%arg), index=1
  %weights = bf16[512,512]{0,1} get-tuple-element(%arg), index=2
  %new = bf16[1,8,4,128]{3,2,1,0:T(8,128)(2,1)S(1)} broadcast(%step), dimensions={}
  %copy-start.1 = (bf16[512,512]{0,1:T(8,128)(2,1)S(1)}, bf16[512,512]{0,1}, u32[]{:S(2)}) copy-start(%weights)
  %copy-done.1 = bf16[512,512]{0,1:T(8,128)(2,1)S(1)} copy-done(%copy-start.1)
  %all-reduce.1 = bf16[8,512]{1,0:T(8,128)(2,1)S(1)} all-reduce(%copy-done.1), replica_groups={{0,1}}, to_apply=%add
  %copy.3 = bf16[512,512]{1,0} copy(%weights)
  %fusion.1 = bf16[1,8,2048,128]{3,2,1,0} fusion(%cache, %new, %step), kind=kLoop, calls=%fused_update
  ROOT %tuple.1 = (s32[], bf16[1,8,2048,128]{3,2,1,0}, bf16[512,512]{0,1}) tuple(%step, %fusion.1, %weights)
}

%condition (arg.1: (s32[], bf16[1,8,2048,128], bf16[512,512])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, bf16[1,8,2048,128]{3,2,1,0}, bf16[512,512]{0,1}) parameter(0)
  ROOT %constant.2 = pred[]{:T(512)} constant(true)
}

ENTRY %main (Arg_0.1: bf16[512,512], Arg_1.2: bf16[1,8,2048,128]) -> bf16[1,8,2048,128] {
  %Arg_0.1 = bf16[512,512]{1,0} parameter(0), metadata={op_name="params[\\'q_proj\\'][\\'kernel\\']"}
  %Arg_1.2 = bf16[1,8,2048,128]{3,2,1,0} parameter(1)
  %fusion.7 = bf16[512,512]{0,1} fusion(%Arg_0.1), kind=kLoop, calls=%fused_copy
  %zero = s32[]{:T(128)} constant(0)
  %tuple.2 = (s32[], bf16[1,8,2048,128]{3,2,1,0}, bf16[512,512]{0,1}) tuple(%zero, %Arg_1.2, %fusion.7)
  %while.1 = (s32[], bf16[1,8,2048,128]{3,2,1,0}, bf16[512,512]{0,1}) while(%tuple.2), condition=%condition, body=%body
  ROOT %out = bf16[1,8,2048,128]{3,2,1,0} get-tuple-element(%while.1), index=1
}
"""
MATRIX, UPDATE = 512 * 512 * 2, 8 * 4 * 128 * 2


def test_a_tpu_program_moves_what_lies_in_main_memory():
    program = hlo.parse(TPU)
    assert program.entry == "main" and program.loop() == "body"
    moved = {each.instruction.name: each.bytes for each in program.traffic("body") if each.bytes}
    # A prefetch reads; what is in VMEM is free; a copy within main memory counts twice; an update writes what is new.
    assert moved == {"copy-start.1": MATRIX, "copy.3": 2 * MATRIX, "fusion.1": UPDATE + 4, "new": 4}
    assert program.collectives("body") == {"all-reduce": (1, MATRIX)}


def test_copies_are_found_in_the_loop_and_before_it():
    program = hlo.parse(TPU)
    assert [each.instruction.name for each in program.copies("body", MATRIX)] == ["copy.3"]  # a prefetch is none
    (entry,) = program.copies(program.entry, MATRIX)
    assert entry.instruction.name == "fusion.7" and "q_proj" in program.origin(program.entry, entry.instruction)
    assert not program.copies("body", MATRIX + 1)


def test_a_loop_on_the_cpu_reads_its_weights_once_and_writes_its_update_in_place():
    def run(weights, buffer):
        def body(carry):
            step, x, buffer = carry
            x = jnp.tanh(x @ weights)
            return step + 1, x, jax.lax.dynamic_update_slice(buffer, x, (step * ROWS, 0))

        return jax.lax.while_loop(lambda carry: carry[0] < 9, body, (0, jnp.ones((ROWS, WIDTH)), buffer))[2]

    weights, buffer = jnp.ones((WIDTH, WIDTH)), jnp.zeros((BUFFER, WIDTH))
    program = hlo.parse(jax.jit(run, donate_argnums=1).lower(weights, buffer).compile().as_text())
    moved, small = program.moved_by(program.loop()), 4 * ROWS * WIDTH
    assert weights.nbytes <= moved <= weights.nbytes + 8 * small < buffer.nbytes
    assert not program.copies(program.loop(), buffer.nbytes)


def test_loops_within_count_as_often_as_they_run():
    def run(x):
        def inner(_, x):
            return jnp.sin(x) * 2

        return jax.lax.while_loop(lambda x: x[0] < 9, lambda x: jax.lax.fori_loop(0, 7, inner, x), x)

    x = jnp.ones((BUFFER,))
    program = hlo.parse(jax.jit(run).lower(x).compile().as_text())
    assert 7 * 2 * x.nbytes <= program.moved_by(program.loop()) <= 10 * 2 * x.nbytes


def test_of_branches_the_cheapest_counts():
    def run(x, weights, asked):
        def body(x):
            return jax.lax.cond(asked, lambda x: jnp.tanh(x @ weights), lambda x: x + 1, x)

        return jax.lax.while_loop(lambda x: x[0, 0] < 9, body, x)

    x, weights = jnp.ones((ROWS, WIDTH)), jnp.ones((WIDTH, WIDTH))
    program = hlo.parse(jax.jit(run).lower(x, weights, True).compile().as_text())
    assert any(each.op == "conditional" for each in program.computations[program.loop()])
    assert x.nbytes <= program.moved_by(program.loop()) < weights.nbytes


TINY = Published(
    Llava,
    LlavaConfig(TextConfig(320, 64, 128, 2, 4, 2, 16), ClipVisionConfig(32, 64, 2, 2, 28, 14), 319),
    LlavaAdapter,
    square_picture,
)
ARMS = {
    "autoregressive": aot_tpu.Arm("tiny"),
    "vispec": aot_tpu.Arm("tiny", "vispec", vispec_config, TreeConfig(2, 3, 8)),
    "vispec-eighth": aot_tpu.Arm("tiny", "vispec", functools.partial(vispec_config, share=8), TreeConfig(2, 3, 8)),
}


@functools.cache
def tiny_row(arm: str, program: str) -> dict:
    decoding = aot_tpu.Decoding(TINY, ARMS[arm], jax.devices()[:1], 1, 128)
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
    plain, whole, eighth = (tiny_row(arm, "decode") for arm in ARMS)
    rows = [aot_tpu.with_ceiling(row, [plain]) for row in (plain, whole, eighth)]
    assert rows[0]["ceiling"] == 1 and rows[1]["ceiling"] < rows[2]["ceiling"] < 1
    assert "ceiling 1.000" in aot_tpu.sentence(rows[0]) and "compile-only" in aot_tpu.sentence(rows[0])


def test_a_chunk_of_a_prompt_is_compiled_too():
    row = tiny_row("vispec", "prefill")
    assert row["bytes"] > 0 and row["flops"] > tiny_row("vispec", "decode")["flops"]
    assert "ceiling" not in aot_tpu.with_ceiling(row, [tiny_row("autoregressive", "decode")])


def test_unknown_arms_are_refused():
    with pytest.raises(ValueError, match="arms llama/vispec are not known; known are llava-1.5-7b/autoregressive, "):
        aot_tpu.Compile(arms=("llama/vispec",))
