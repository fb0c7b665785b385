"""Token identity: whether two answers are the same, where they part, and how near a tie the target was there."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.buckets import bucket
from jaxspec.cache import Cache
from jaxspec.kernels.masks import Mask
from jaxspec.prompting import encode_prompt
from jaxspec.speculation.filters import warp
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.speculation.penalties import Penalties, penalised
from jaxspec.speculation.sampling import gumbel_noise
from jaxspec.targets.chunks import position_offset
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.prompts import EncodedPrompt, PromptBatch, stack_prompts
from jaxspec.targets.reading import read_prompts
from jaxspec.targets.target import Target

if TYPE_CHECKING:
    from jaxspec.benchmark.measure import Question

Tokens = Sequence[int] | np.ndarray
"""Of an answer, `[n]`."""


def first_difference(ours: Tokens, reference: Tokens) -> int | None:
    """The first position at which two token sequences differ (or one of them ends), None where they are equal."""
    common = min(len(ours), len(reference))
    different = np.flatnonzero(np.asarray(ours)[:common] != np.asarray(reference)[:common])
    if len(different):
        return int(different[0])
    return None if len(ours) == len(reference) else common


def choice_margin(
    target: Target, question: "Question", sampling: SamplingParams, tokens: Tokens, position: int
) -> float:
    """By how much the target's best token leads the second at `position` of the answer `tokens`, read token by token.

    In units of the (penalised) logits at temperature 0, else of the warped logits plus noise that choose the token. A
    margin of rounding size says that two orders of summation may choose differently; a large one would be an error.
    """
    encoded = encode_prompt(target, question.prompt, question.images)
    scores = jnp.asarray(replay(target, encoded, tokens[:position], 1)[None, -1:])  # [1, 1, V]
    rows = BatchSampling.from_params([sampling])
    if sampling.penalises:
        stops = (*target.stop_token_ids, *sampling.stop_token_ids)
        penalties = Penalties.from_params([sampling], [encoded.input_ids], [stops], scores.shape[-1])
        said = jnp.asarray(tokens[:position], jnp.int32)[None]
        scores = penalised(scores, penalties.counted(said, jnp.array([position])), 0)
    if sampling.temperature > 0:
        place = jnp.array([[len(encoded.input_ids) + position]])
        scores = warp(scores, rows) + gumbel_noise(rows.seed, place, scores.shape[-1])
    best, second = np.asarray(jax.lax.top_k(scores[0, 0], 2)[0])
    return float(best - second)


def rounding(target: Target, question: "Question", tokens: Tokens, nodes: int) -> tuple[float, float]:
    """How far apart the logits are that the target gives along the answer `tokens` when it reads one token and when it
    reads `nodes` of them at a time, and their largest size. Two tokens can change places between the two where one
    leads the other by no more than twice that difference (over the temperature)."""
    encoded = encode_prompt(target, question.prompt, question.images)
    one, many = (replay(target, encoded, tokens, each) for each in (1, nodes))
    return float(np.abs(one - many).max()), float(np.abs(one).max())


def replay(target: Target, prompt: EncodedPrompt, tokens: Tokens, nodes: int) -> np.ndarray:
    """Logits f32 `[n + 1, V]` before and after each of the n `tokens` of an answer, which the target reads `nodes` at a
    time from its cache, as in decoding."""
    longest = bucket(len(prompt.input_ids))
    capacity = longest + bucket(len(tokens) + nodes)
    offset = position_offset(prompt)
    logits, cache = _read_prompt(target.model, stack_prompts(target.adapter, [prompt], longest), capacity)
    told = [np.asarray(logits)]
    for start in range(0, len(tokens), nodes):
        block = np.zeros((1, nodes), np.int32)
        here = np.asarray(tokens[start : start + nodes])
        block[0, : len(here)] = here
        logits, cache = _read_tokens(target.model, cache, offset, block, np.array([len(here)], np.int32))
        told.append(np.asarray(logits)[: len(here)])
    return np.concatenate(told)


@functools.partial(jax.jit, static_argnames="capacity")
def _read_prompt(model: VisionLanguageModel, prompt: PromptBatch[jax.Array], capacity: int) -> tuple[jax.Array, Cache]:
    read = read_prompts(model, prompt)
    last = jnp.take_along_axis(read.features, (prompt.lengths - 1)[:, None, None], axis=1)
    return model.unembed(last)[0], Cache.of_prompt(read.kv, prompt.lengths, capacity)


@functools.partial(jax.jit, donate_argnums=1)
def _read_tokens(
    model: VisionLanguageModel, cache: Cache, offset: jax.Array, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, Cache]:
    positions = (cache.lengths + offset)[:, None] + jnp.arange(tokens.shape[1])
    features, new_kv = model.forward(model.embed(tokens), positions, Mask(causal=True), cache)
    return model.unembed(features)[0], cache.append(new_kv, count)
