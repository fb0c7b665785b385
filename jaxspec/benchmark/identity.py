"""Token identity: whether two answers are the same, where they part, and how near a tie the target was there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.buckets import bucket
from jaxspec.prompting import encode_prompt
from jaxspec.speculation.filters import warp
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.speculation.penalties import Penalties, penalised
from jaxspec.speculation.sampling import gumbel_noise
from jaxspec.targets.images import stack_positions
from jaxspec.targets.target import Target, full_logits

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
    """By how much the target's best token leads the second at `position` of the answer `tokens`.

    In units of the (penalised) logits at temperature 0, else of the warped logits plus noise that choose the token. A
    margin of rounding size says that two orders of summation may choose differently; a large one would be an error.
    """
    encoded = encode_prompt(target, question.prompt, question.images)
    ids = np.concatenate([encoded.input_ids, np.asarray(tokens[:position], np.int32)])
    padded = np.zeros((1, bucket(len(ids))), np.int32)
    padded[0, : len(ids)] = ids
    positions = stack_positions([target.config.position_ids(ids, encoded.images)], padded.shape[1])
    images = target.config.place(encoded.images, padded)
    logits = full_logits(target.model, padded, np.array([len(ids)]), images, positions)
    scores = logits[:, len(ids) - 1 : len(ids)]  # [1, 1, V]
    rows = BatchSampling.from_params([sampling])
    if sampling.penalises:
        stops = (*target.stop_token_ids, *sampling.stop_token_ids)
        penalties = Penalties.from_params([sampling], [encoded.input_ids], [stops], scores.shape[-1])
        said = jnp.asarray(tokens[:position], jnp.int32)[None]
        scores = penalised(scores, penalties.counted(said, jnp.array([position])), 0)
    if sampling.temperature > 0:
        scores = warp(scores, rows) + gumbel_noise(rows.seed, jnp.array([[len(ids)]]), scores.shape[-1])
    best, second = np.asarray(jax.lax.top_k(scores[0, 0], 2)[0])
    return float(best - second)
