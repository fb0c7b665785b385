"""What computes attention, at the shapes of published models: how long each takes here, or whether a TPU compiles it.

    python -m benchmarks.attention time                                   # on an accelerator, every kernel it has
    python -m benchmarks.attention time --only "tree of 30" --kernels plain xla    # anywhere
    python -m benchmarks.attention compile                                # no TPU needed; pip install libtpu

`time` gives the median over runs that take turns and what share it is of the time in which `--bandwidth` (bytes a
second) moves the least that must be. `compile` says, for every chip and shape, which kernel the dispatch took, the
bytes that the compiled program holds beside its arguments, and seconds; nothing runs.
"""

import dataclasses
import statistics
import time
from typing import Annotated, Literal

import jax
import tyro
from jax.sharding import SingleDeviceSharding

from benchmarks import hlo
from benchmarks.attention_shapes import SHAPES, AttentionShape
from benchmarks.tpu import chips_of
from jaxspec.kernels import attention


@dataclasses.dataclass(frozen=True)
class Time:
    """Time kernels on this machine's first device."""

    only: str = ""
    """Shapes whose names hold this."""
    kernels: tuple[Literal["plain", "pallas", "splash", "xla", "cudnn"], ...] = ("plain", "pallas", "splash")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    runs: int = 20
    bandwidth: float | None = None

    def print(self) -> None:
        for name, shape in SHAPES.items():
            if self.only in name:
                for kernel, seconds in self.seconds(shape).items():
                    least = shape.least_bytes(jax.numpy.dtype(self.dtype).itemsize)
                    share = "" if self.bandwidth is None else f", {least / self.bandwidth / seconds:.2f} of bandwidth"
                    print(f"{name} {kernel}: {1e6 * seconds:.0f} us{share}", flush=True)

    def seconds(self, shape: AttentionShape) -> dict[str, float]:
        """Medians of those kernels that the shape can have."""
        query, segments = shape.arguments(self.dtype)
        fitting = {}
        for name in self.kernels:
            kernel = attention.KERNELS[name]
            if kernel.fits(query, segments) and kernel.lacks(query, segments) is None:
                fitting[name] = jax.jit(lambda q, s, name=name: attention.attend(q, s, implementation=name))
                jax.block_until_ready(fitting[name](query, segments))
        times = {name: [] for name in fitting}
        for _ in range(self.runs):
            for name, function in fitting.items():
                started = time.perf_counter()
                jax.block_until_ready(function(query, segments))
                times[name].append(time.perf_counter() - started)
        return {name: statistics.median(each) for name, each in times.items()}


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile what the dispatch takes, for TPUs, without one."""

    only: str = ""
    chips: tuple[Literal["v5e", "v5p", "v6e"], ...] = ("v5e", "v5p", "v6e")

    def print(self) -> None:
        for chip in self.chips:
            for name, shape in SHAPES.items():
                if self.only in name:
                    started = time.perf_counter()
                    program = compiled(shape, chip)
                    held, took = program.memory_analysis().temp_size_in_bytes, time.perf_counter() - started
                    names = ", ".join(kernels_in(program)) or "plain"
                    print(f"{chip} {name}: {names}, {held / 2**20:.1f} MiB beside arguments, {took:.0f} s", flush=True)


def compiled(shape: AttentionShape, chip: str, kernel: str | None = None) -> jax.stages.Compiled:
    """Attention of that shape in bfloat16, compiled for one chip of that kind in `benchmarks.tpu.TOPOLOGIES`."""
    sharding = SingleDeviceSharding(chips_of(chip)[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(shape.arguments)
    )
    return (
        jax.jit(lambda query, segments: attention.attend(query, segments, implementation=kernel))
        .lower(*arguments)
        .compile()
    )


def kernels_in(program: jax.stages.Compiled) -> list[str]:
    """The names of the Pallas kernels that a program calls, each as often as it does."""
    parsed = hlo.parse(program.as_text())
    return [name for name, count in parsed.kernels(parsed.entry).items() for _ in range(count)]


if __name__ == "__main__":
    commands = Annotated[Time, tyro.conf.subcommand("time")] | Annotated[Compile, tyro.conf.subcommand("compile")]
    tyro.cli(commands, description=__doc__).print()
