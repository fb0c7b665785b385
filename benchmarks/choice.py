"""Time the choice of tokens at a real vocabulary: greedy, sampled, with each filter, for all nodes of a tree at once.

    python benchmarks/choice.py                             # 30 nodes, 152,064 tokens, as in docs/LOG.md
    python benchmarks/choice.py --before PATH/sampling.py   # beside the same file of another version

Noise is drawn within the timed program or given to it. Times are of CPU, of all threads (`--clock wall` for
accelerators): the median of `--runs` in turns, and the ratio to plain sampling of the same kind.
"""

import dataclasses
import importlib.util
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxspec.speculation import sampling
from jaxspec.speculation.params import BatchSampling, SamplingParams

SETTINGS = {
    "greedy": SamplingParams(),
    "temperature 1": SamplingParams(temperature=1.0),
    "top-p 0.9": SamplingParams(temperature=1.0, top_p=0.9),
    "top-k 50": SamplingParams(temperature=1.0, top_k=50),
    "min-p 0.05": SamplingParams(temperature=1.0, min_p=0.05),
}
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is timed. Logits are normal with deviation `scale`: 3 is a very flat distribution, 8 one of few tokens."""

    nodes: int = 30
    vocab_size: int = 152_064
    scale: float = 3.0
    runs: int = 9
    clock: Literal["cpu", "wall"] = "cpu"
    before: Path | None = None

    def run(self) -> None:
        versions = {"now": sampling} | ({"before": load(self.before)} if self.before else {})
        logits = np.random.default_rng(0).normal(size=(1, self.nodes, self.vocab_size)) * self.scale
        logits = jnp.asarray(logits, jnp.float32)
        noise = jax.jit(lambda: sampling.gumbel_noise(jnp.zeros(1, jnp.uint32), self.positions, self.vocab_size))()
        programs = {
            (name, drawn): self.program(version, drawn) for name, version in versions.items() for drawn in (True, False)
        }
        times: dict[tuple, list[float]] = {}
        clock, chosen = CLOCKS[self.clock], {}
        for run in range(self.runs + 1):
            for setting, (arm, program) in itertools.product(SETTINGS, programs.items()):
                rows = BatchSampling.from_params([SETTINGS[setting]])
                started = clock()
                tokens = jax.block_until_ready(program(logits, noise, rows))
                if run:  # the first compiles
                    times.setdefault((arm, setting), []).append(1000 * (clock() - started))
                if not jnp.array_equal(tokens, chosen.setdefault(setting, tokens)):
                    sys.exit(f"{arm[0]} chooses other tokens at {setting}")
        print(
            f"{'':15}"
            + "".join(f"{name + (', noise drawn' if drawn else ', noise given'):>24}" for name, drawn in programs)
        )
        for setting in SETTINGS:
            cells = []
            for arm in programs:
                median, plain = (statistics.median(times[arm, each]) for each in (setting, "temperature 1"))
                cells.append(f"{median:10.1f} ms {median / plain:8.2f} x")
            print(f"{setting:15}" + "".join(cells))

    @property
    def positions(self) -> jax.Array:
        return jnp.arange(self.nodes)[None]

    def program(self, version: Any, drawn: bool) -> Any:
        @jax.jit
        def choose(logits: jax.Array, noise: jax.Array, rows: BatchSampling) -> jax.Array:
            def levels() -> jax.Array:
                return version.gumbel_noise(rows.seed, self.positions, self.vocab_size) if drawn else noise

            return version.choose(logits, levels, rows)

        return choose


def load(path: Path) -> Any:
    """The module in that file, under another name."""
    spec = importlib.util.spec_from_file_location("sampling_before", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    tyro.cli(Choice, description=__doc__).run()
