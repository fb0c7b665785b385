"""Whether speculative decoding gives the tokens of autoregressive decoding on this card, at 7B shapes: flips are
counted, each with the margin by which the best token led the second.

Random heads draft nothing that is accepted. So that paths of all lengths are, a drafter here knows the answers: it is
wrong at a depth that changes from round to round.
"""

import gc
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu_parts.kernels import usable
from benchmarks.gpu_parts.part import Part, side_by_side
from benchmarks.gpu_parts.runner import Runner
from benchmarks.published import LLAVA_7B, TOY
from benchmarks.random_models import random_module
from jaxspec.benchmark.identity import first_difference
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.state import DecodeState
from jaxspec.speculation.tree import TreeConfig, build_tree
from jaxspec.targets.llava import Llava

TREE = TreeConfig(3, 8, 30)
WRONG = 100
"""How far from the right token a wrong draft is; siblings are nearer."""


class Informed(nnx.Module):
    """Drafts what `answers` i32 `[B, T]` say, in the main path of a tree of 30 nodes whose other nodes are wrong
    siblings. Of the path's nodes the first 0, 1, .. or all are right, from round to round."""

    def __init__(self, answers: np.ndarray) -> None:
        self.answers = nnx.Variable(jnp.asarray(answers, jnp.int32))
        levels = TREE.max_depth
        each = np.full(levels, (TREE.total_tokens - 1) // levels)
        each[: (TREE.total_tokens - 1) % levels] += 1
        self.depths = (0, *(depth for depth in range(1, levels + 1) for _ in range(each[depth - 1])))
        main = [0, *(1 + int(each[: depth - 1].sum()) for depth in range(1, levels + 1))]  # first node of a level
        self.parents = (0, *(main[depth - 1] for depth in self.depths[1:]))
        self.order = (0, *(number for depth in range(levels) for number in range(each[depth])))

    def prefill(self, model: Any, context: Any, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        del model, capacity
        told = jnp.ones_like(context.root)
        return self.answers[...], told, jnp.zeros_like(told)

    def propose(self, model: Any, config: TreeConfig, state: Any, root: jax.Array, noise: Any, sampling: Any):
        del noise, sampling
        answers, told, rounds = state
        depths, parents, order = (jnp.array(x) for x in (self.depths, self.parents, self.order))
        places = told[:, None] + depths - 1  # [B, N]
        right = jnp.take_along_axis(answers, jnp.clip(places, 0, answers.shape[1] - 1), axis=1)
        good = depths <= (rounds % (TREE.max_depth + 1))[:, None]
        drafts = jnp.where(order > 0, right + order, jnp.where(good, right, right + WRONG)) % model.vocab_size
        tokens = jnp.where(depths == 0, root[:, None], drafts)
        shape = tokens.shape
        return build_tree(tokens, jnp.broadcast_to(parents, shape), jnp.broadcast_to(depths, shape), config.max_depth)

    def advance(self, model: Any, state: Any, tokens: jax.Array, features: jax.Array, count: jax.Array):
        del model, tokens, features
        answers, told, rounds = state
        return answers, told + count, rounds + 1


def measure(part: Part) -> None:
    dtypes = ["float32"] if part.tiny else ["bfloat16", "float32"]
    cost = 0.0
    for dtype in dtypes:
        before = part.passed
        with_model = partial(of_dtype, part, dtype)
        part.trying(f"random 7B, {dtype}", cost, with_model)
        cost = 1.2 * (part.passed - before)
        gc.collect()  # two such models do not fit a card


def of_dtype(part: Part, dtype: str) -> None:
    """In float32 with products in float32, too: a GPU takes TF32 where it is not told otherwise."""
    precision = "highest" if dtype == "float32" else None
    jax.config.update("jax_default_matmul_precision", precision)
    model = random_module(partial(Llava, TOY if part.tiny else LLAVA_7B), dtype)
    batch, capacity, rounds = (2, 96, 40) if part.tiny else (8, 704, 64)
    cost = 0.0
    for kernel in usable(part, dtype):
        before = part.passed
        comparing = partial(compare, part, model, dtype, kernel, batch, capacity, rounds)
        part.trying(f"random 7B, {dtype}, {kernel}", cost, comparing)
        cost = 1.2 * (part.passed - before)


def compare(part: Part, model: Llava, dtype: str, kernel: str, batch: int, capacity: int, tokens: int) -> None:
    make = partial(Runner, model, batch=batch, capacity=capacity, kernel=kernel)
    greedy, warm = SamplingParams(logprobs=2), SamplingParams(temperature=1.0, seed=5, logprobs=2)
    nothing = np.zeros((batch, tokens), np.int32)
    plain = make(None, TreeConfig.autoregressive(), sampling=greedy)
    drafting = make(Informed(nothing), TREE, sampling=greedy)
    side_by_side(Runner.warm, [plain, drafting])
    for sampling in (greedy, warm):
        plain.request = drafting.request = plain.asking(sampling, tokens)
        one = finished(plain, tokens)
        told = np.asarray(one.tokens)[:, :tokens]
        informed = Informed(told)
        drafting.params = drafting.programs.params_of(model, informed)
        many = finished(drafting, tokens)
        report(part, dtype, kernel, sampling, one, many, tokens)


def finished(runner: Runner, rounds: int) -> DecodeState:
    state = runner.decode(runner.begin(), rounds)
    if not np.asarray(state.done).all():
        raise RuntimeError(f"some rows were not done after {rounds} rounds")
    return state


def report(
    part: Part, dtype: str, kernel: str, sampling: SamplingParams, one: DecodeState, many: DecodeState, tokens: int
) -> None:
    ours, theirs = (np.asarray(state.tokens)[:, :tokens] for state in (many, one))
    places = [first_difference(*rows) for rows in zip(ours, theirs, strict=True)]
    tops = [np.asarray(state.logprobs.top_logprobs)[:, :tokens] for state in (many, one)]
    margins = [top[..., 0] - top[..., 1] for top in tops]  # [B, T], in units of the logits
    same = [slice(0, place) if place is not None else slice(0, tokens) for place in places]
    moved = [np.abs(a[same_] - b[same_]) for a, b, same_ in zip(*margins, same, strict=True)]
    apart = max((float(each.max()) for each in moved if each.size), default=0.0)
    greedy = sampling.temperature == 0
    flips = [
        {"row": row, "position": place, "margin": float(margins[1][row, place]) if greedy else None}
        for row, place in enumerate(places)
        if place is not None
    ]
    counts, rounds = np.asarray(many.counts), np.asarray(many.rounds)
    part.add(
        "equality",
        dtype=dtype,
        kernel=kernel,
        temperature=sampling.temperature,
        answers=len(places),
        tokens=tokens,
        identical=sum(place is None for place in places),
        mean_acceptance_length=float((counts - 1).sum() / rounds.sum()),
        margins_moved_by=apart,
        smallest_margin=float(margins[1].min()) if greedy else None,
        beyond_rounding=sum(flip["margin"] > 2 * apart for flip in flips) if greedy else None,
        flips=flips,
    )
