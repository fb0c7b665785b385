"""What penalties cost a verification step: choosing the tokens of a tree, with and without them.

    python benchmarks/penalties.py [--nodes 30] [--vocabulary 152064] [--rounds 20] [--repeats 9]

The arms take turns in one process; medians, in milliseconds of CPU time (all threads) per round of a compiled loop.
Nothing else of a model runs, so set them beside what a forward pass of the target takes.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import SamplingParams
from jaxspec.speculation.loop import of_nodes
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.penalties import Penalties, penalised
from jaxspec.speculation.sampling import Noise, choose
from jaxspec.speculation.tree import build_tree, path_tokens

DEPTH, PROMPT = 4, 800
PENALTIES = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.2, min_tokens=5)
SETTINGS = {"greedy": {}, "temperature 1": {"temperature": 1.0}, "top-p 0.9": {"temperature": 1.0, "top_p": 0.9}}


def random_tree(rng: np.random.Generator, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Parents and depths i32 `[1, nodes]`, of depth `DEPTH` at most."""
    parents, depths = np.zeros((1, nodes), np.int32), np.zeros((1, nodes), np.int32)
    for node in range(1, nodes):
        parents[0, node] = rng.choice(np.flatnonzero(depths[0, :node] < DEPTH))
        depths[0, node] = depths[0, parents[0, node]] + 1
    return parents, depths


def arm(params: SamplingParams, nodes: int, vocabulary: int, rounds: int) -> Callable[[], object]:
    """`rounds` choices of a tree's tokens, each from the tokens of the one before."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, nodes, vocabulary)).astype(np.float32) * 3)
    drafted = jnp.asarray(rng.integers(0, vocabulary, (1, nodes), np.int32))
    parents, depths = random_tree(rng, nodes)
    prompt = rng.integers(0, vocabulary, PROMPT)
    penalties = Penalties.from_params([params], [prompt], [[2]], vocabulary) if params.penalises else None

    @jax.jit
    def run(logits, sampling, drafted):
        def one_round(_, carry):
            drafted, sampling = carry
            tree = build_tree(drafted, parents, depths, DEPTH)
            scores = logits
            if sampling.penalties is not None:
                scores = penalised(logits, sampling.penalties, tree.depths, path_tokens(tree, DEPTH))
            noise = Noise(sampling.seed, drafted[:, 0], vocabulary)
            chosen = choose(scores, lambda: of_nodes(tree, noise.levels(0, DEPTH + 1)), sampling)
            return (drafted + chosen) % vocabulary, sampling.counted(chosen[:, :3], jnp.array([3]))

        return jax.lax.fori_loop(0, rounds, one_round, (drafted, sampling))[0]

    sampling = BatchSampling.from_params([params], penalties)
    return lambda: jax.block_until_ready(run(logits, sampling, drafted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("nodes", 30), ("vocabulary", 152_064), ("rounds", 20), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    shape = options.nodes, options.vocabulary, options.rounds
    arms = {}
    for name, fields in SETTINGS.items():
        for suffix, base in (("", SamplingParams()), (" with penalties", PENALTIES)):
            arms[name + suffix] = arm(dataclasses.replace(base, **fields), *shape)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(options.repeats + 1):
        for name, run in arms.items():
            started = time.process_time()
            run()
            if repeat:  # the first one compiles
                times[name].append(1000 * (time.process_time() - started) / options.rounds)
    for name, taken in times.items():
        print(f"{name:30} {statistics.median(taken):8.2f} ms a round (least {min(taken):.2f})")


if __name__ == "__main__":
    main()
