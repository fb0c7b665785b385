"""What the card can do at most: bytes and products a second, and what a start of a program or kernel costs. Last, what
each kernel of attention takes alone, and whether it works at all."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.attention_shapes import SHAPES, AttentionShape
from benchmarks.gpu_parts.kernels import suiting
from benchmarks.gpu_parts.part import Part, timed
from jaxspec.devices import peaks_of
from jaxspec.kernels.attention import attend
from jaxspec.kernels.segments import Segment

RUNS = 5
ATTENTION = {
    name: SHAPES[name]
    for name in (
        *(f"llava-1.5-7b, {each}" for each in ("one token", "tree of 30", "tree of 60, batch 8", "first chunk of 512")),
        *(f"qwen2.5-vl-7b, {each}" for each in ("one token", "tree of 30")),
    )
}
TOYS = {"tree of 8": AttentionShape(4, 2, 16, 8, 128, 40)}


def measure(part: Part) -> None:
    part.trying("copy", 1, lambda: copy(part))
    part.trying("weights through a thin product", 1, lambda: thin_products(part))
    part.trying("products", 1, lambda: products(part))
    part.trying("starts", 1, lambda: starts(part))
    dtype, cost = "float32" if part.tiny else "bfloat16", 1.0
    for kernel in suiting(dtype):
        before = part.passed
        part.trying(f"attention by {kernel}", cost, functools.partial(attention, part, kernel, dtype))
        cost = part.passed - before


def best(run, calls: int) -> float:
    """Seconds of one of `calls` calls that follow each other without waiting; the best of some runs, after one more."""

    def several() -> None:
        out = None
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)

    several()
    return min(timed(several, RUNS)) / calls


def copy(part: Part) -> None:
    """A bfloat16 array read and another written."""
    for mebibytes in (1, 4) if part.tiny else (256, 2048):
        x = jnp.ones(mebibytes * 2**19, jnp.bfloat16)
        seconds = best(functools.partial(jax.jit(jnp.negative), x), 10)
        part.add("copy", mebibytes=mebibytes, gigabytes_per_second=2 * x.nbytes / seconds / 1e9)


def thin_products(part: Part) -> None:
    """A few rows times matrices that fit no cache: what verifying is made of. Only the matrices' bytes count."""
    width, inner, count = (64, 256, 2) if part.tiny else (4096, 11008, 8)
    shapes = [(width, inner), (inner, width)] * count
    kernels = [jnp.full(shape, 1 / shape[0], jnp.bfloat16) for shape in shapes]

    @jax.jit
    def chain(x, kernels):
        return functools.reduce(jnp.matmul, kernels, x)

    size = sum(kernel.nbytes for kernel in kernels)
    for rows in (1, 8, 30, 64, 240, 480):
        x = jnp.ones((rows, width), jnp.bfloat16)
        seconds = best(functools.partial(chain, x, kernels), 3)
        part.add("thin product", rows=rows, gigabytes_per_second=size / seconds / 1e9, milliseconds=1e3 * seconds)


def products(part: Part) -> None:
    size = 128 if part.tiny else 8192
    for dtype, precision in (("bfloat16", None), ("float32", None), ("float32", "highest")):
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
        product = jax.jit(functools.partial(jnp.matmul, precision=precision))
        seconds = best(functools.partial(product, x, x), 4)
        part.add(
            "product", size=size, dtype=dtype, precision=precision or "default", teraflops=2 * size**3 / seconds / 1e12
        )


def starts(part: Part) -> None:
    """A program that does next to nothing, and rounds of a loop on the device that do."""
    x = jnp.zeros((8,), jnp.float32)
    small = jax.jit(lambda x: x + 1)
    part.add("start of a program", microseconds=1e6 * best(functools.partial(small, x), 1000))

    def loop(body, rounds=1000):
        return jax.jit(lambda x: jax.lax.fori_loop(0, rounds, lambda _, x: body(x), x))

    seconds = best(functools.partial(loop(jnp.sin), x), 1) / 1000
    part.add("round of a loop with one kernel", microseconds=1e6 * seconds)
    branching = loop(lambda x: jax.lax.cond(x[0] > 0.5, jnp.cos, jnp.sin, x))
    seconds = best(functools.partial(branching, x), 1) / 1000
    part.add("round of a loop with a branch", microseconds=1e6 * seconds)


def attention(part: Part, kernel: str, dtype: str) -> None:
    """One call, and how far it is from the plain form in float32. A kernel that fails has a row that says so, and no
    more: later parts leave it out."""
    peaks = peaks_of(jax.devices()[0])
    for name, shape in (TOYS if part.tiny else ATTENTION).items():
        row = {"shape": name, "kernel": kernel, "dtype": dtype}
        query, segments = shape.arguments(dtype)
        try:
            call = jax.jit(functools.partial(attend, implementation=kernel))
            ours = call(query, segments).astype(jnp.float32)
            seconds = best(functools.partial(call, query, segments), 20)
        except Exception as error:
            part.add("attention", **row, failed=f"{type(error).__name__}: {str(error)[:300]}")
            return
        exact = in_float32(query, segments)
        part.add(
            "attention",
            **row,
            microseconds=1e6 * seconds,
            memory_bound_share=shape.least_bytes(query.dtype.itemsize) / peaks.bandwidth / seconds if peaks else None,
            relative_error=float(jnp.max(jnp.abs(ours - exact)) / jnp.max(jnp.abs(exact))),
        )


@jax.jit
def in_float32(query: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    def exact(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    with jax.default_matmul_precision("highest"):
        return attend(exact(query), jax.tree.map(exact, segments), implementation="plain")
