"""What benchmarks/hlo.py reads of a compiled program is what the program was written to do."""

import jax
import jax.numpy as jnp

from benchmarks import hlo

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
  %attend_cache.12 = bf16[1,8,16,128]{3,2,1,0:S(1)} custom-call(%step, %new, %cache, %cache), KERNEL
  %sum.4 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} dot(%copy-done.1, %copy.3)
  %copy.5 = bf16[512,512]{0,1:T(8,128)(2,1)S(1)} copy(%sum.4)
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
""".replace("KERNEL", 'custom_call_target="tpu_custom_call"')
MATRIX, UPDATE, CACHE = 512 * 512 * 2, 8 * 4 * 128 * 2, 8 * 2048 * 128 * 2


def test_a_tpu_program_moves_what_lies_in_main_memory():
    program = hlo.parse(TPU)
    assert program.entry == "main" and program.loop() == "body"
    moved = {each.instruction.name: each.bytes for each in program.traffic("body") if each.bytes}
    # A prefetch reads; what is in VMEM is free; a copy within main memory counts twice; an update writes what is new.
    expected = {"copy-start.1": MATRIX, "copy.3": 2 * MATRIX, "sum.4": MATRIX, "fusion.1": UPDATE + 4, "new": 4}
    assert moved == expected | {"attend_cache.12": 2 * CACHE + 4}
    assert program.collectives("body") == {"all-reduce": (1, MATRIX)}


def test_a_kernel_is_given_caches_whole():
    program = hlo.parse(TPU)
    assert program.kernels("body") == {"attend_cache": 1} and program.kernels("condition") == {}
    assert program.read_by_kernels("body", capacity=2048) == 2 * CACHE
    assert program.read_by_kernels("body", capacity=512) == 0  # the matrices are no caches, nor what lies in VMEM


def test_copies_are_found_in_the_loop_and_before_it():
    program = hlo.parse(TPU)
    weights, computed = (each.instruction for each in program.copies("body", MATRIX))  # a prefetch is none
    assert (weights.name, computed.name) == ("copy.3", "copy.5")
    assert program.is_held("body", weights) and not program.is_held("body", computed)
    assert program.origin("body", computed).name == "sum.4"
    (entry,) = program.copies(program.entry, MATRIX)
    assert entry.instruction.name == "fusion.7" and program.is_held(program.entry, entry.instruction)
    assert "q_proj" in program.origin(program.entry, entry.instruction).label
    assert not program.copies("body", MATRIX + 1)


def test_what_an_update_hands_on_is_still_the_cache():
    behind = TPU.replace("ROOT %tuple.1", "%copy.8 = bf16[1,8,2048,128]{2,3,1,0} copy(%fusion.1)\n  ROOT %tuple.1")
    program = hlo.parse(behind)
    (copy,) = (each.instruction for each in program.copies("body", CACHE))
    assert program.origin("body", copy).name == "cache" and program.is_held("body", copy)


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
