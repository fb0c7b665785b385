"""Coupled sampling: filters equal transformers', samples follow the warped softmax, noise is reproducible."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as oracle

from jaxspec.speculation.filters import draft_floor, scale, warp
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.speculation.sampling import Noise, choose, first_argmax, gumbel_noise
from jaxspec.speculation.threefry import random_bits

warp_jit = jax.jit(warp)
choose_jit = jax.jit(lambda logits, noise, sampling: choose(logits, lambda: noise, sampling))
draft_floor_jit = jax.jit(
    lambda logits, sampling: (draft_floor(scale(logits, sampling), sampling), scale(logits, sampling))
)
noise_jit = jax.jit(gumbel_noise, static_argnums=2)


def random_logits(seed, *shape, scale=3.0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale


def transformers_warp(logits, params):
    """The warpers in the order in which transformers' generate applies them; logits [N, V]."""
    scores = torch.from_numpy(np.array(logits))
    warpers = [oracle.TemperatureLogitsWarper(float(params.temperature))]
    warpers += [oracle.TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [oracle.TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    warpers += [oracle.MinPLogitsWarper(params.min_p)] if params.min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.numpy()


def softmax(logits):
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def warp_rows(logits, *params):
    return np.asarray(warp_jit(jnp.asarray(logits), BatchSampling.from_params(params)))


# --- warp -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.sampled_from([0.01, 0.3, 0.7, 1.0, 1.7, 30.0]),
    st.integers(0, 80),
    st.floats(0.001, 1.0),
    st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
)
@example(0, 1.0, 0, 1.0, 0.0)
@example(1, 1.0, 64, 1.0, 0.0)  # k = V
@example(2, 1.0, 1, 0.5, 1.0)
def test_warp_is_transformers_warpers(seed, temperature, top_k, top_p, min_p):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(seed, 5, 64)
    expected = transformers_warp(logits, params)
    actual = warp_rows(logits[None], params)[0]
    # A token on the very edge of a filter may fall to either side by rounding: those within 1e-5 of it don't count.
    disagree = np.isneginf(actual) != np.isneginf(expected)
    assert not np.any(disagree & ~on_an_edge(logits, params))
    assert_same_logits(np.where(disagree, 0, actual), np.where(disagree, 0, expected))


def assert_same_logits(actual, expected):
    """Equal up to one rounding of the division by the temperature, and removed in the same places."""
    np.testing.assert_allclose(actual, expected, rtol=2e-7, atol=0)


def on_an_edge(logits, params, tolerance=1e-5):
    """bool [N, V]: tokens whose fate changes when top_p or min_p moves by the tolerance (top-k has no rounding)."""
    looser = dataclasses.replace(params, top_p=min(1.0, params.top_p + tolerance), min_p=params.min_p * (1 - tolerance))
    tighter = dataclasses.replace(
        params, top_p=max(1e-9, params.top_p - tolerance), min_p=min(1.0, params.min_p * (1 + tolerance))
    )
    return np.isneginf(transformers_warp(logits, looser)) != np.isneginf(transformers_warp(logits, tighter))


@pytest.mark.parametrize("filters", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 99, "top_p": 0.8}])
def test_warp_is_transformers_warpers_at_a_real_vocabulary(filters):
    params = SamplingParams(temperature=0.8, **filters)
    logits = random_logits(11, 3, 32_064)
    assert_same_logits(warp_rows(logits[None], params)[0], transformers_warp(logits, params))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7])
def test_top_k_keeps_ties_as_transformers_does(top_k):
    logits = np.array([[0.0, 2.0, -0.0, 2.0, -1.0, 0.0]], np.float32)  # 0.0 and -0.0 are a tie too
    params = SamplingParams(temperature=1.0, top_k=top_k)
    assert_same_logits(warp_rows(logits[None], params)[0], transformers_warp(logits, params))


def test_top_p_keeps_or_removes_tied_tokens_together():
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.1, 0.1], np.float32))

    def kept(top_p):
        return np.isfinite(warp_rows(logits[None, None], SamplingParams(temperature=1.0, top_p=top_p)))

    assert kept(0.39).ravel().tolist() == [True, False, False, False, False]
    assert kept(0.41).ravel().tolist() == [True, True, True, False, False]  # transformers keeps one of the two
    assert kept(0.79).ravel().tolist() == [True, True, True, False, False]
    assert kept(0.81).ravel().tolist() == [True, True, True, True, True]


@pytest.mark.parametrize("extreme", [{"top_p": 1e-50}, {"min_p": 1.0}, {"top_k": 1}])
def test_the_most_probable_token_always_stays(extreme):
    logits = random_logits(3, 1, 4, 50)
    warped = warp_rows(logits, SamplingParams(temperature=0.5, **extreme))
    assert (np.isfinite(warped).sum(-1) == 1).all()
    np.testing.assert_array_equal(warped.argmax(-1), logits.argmax(-1))


def test_masked_vocabulary_and_huge_logits_survive_the_filters():
    logits = random_logits(4, 1, 3, 40, scale=1e30)
    logits[..., 25:] = -np.inf  # rows added to pad the vocabulary
    params = SamplingParams(temperature=1.0, top_k=30, top_p=0.9, min_p=1e-3)
    warped = warp_rows(logits, params)
    np.testing.assert_array_equal(np.isfinite(warped), np.arange(40) == logits.argmax(-1)[..., None])


def test_every_row_uses_its_own_parameters():
    rows = [
        SamplingParams(temperature=0.0, top_k=2, top_p=0.1, min_p=0.9),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.9, min_p=0.05, top_k=20, top_p=0.95),
    ]
    logits = random_logits(5, len(rows), 4, 100)
    warped = warp_rows(logits, *rows)
    np.testing.assert_array_equal(warped[0], logits[0])  # greedy rows are left alone
    for row in range(1, len(rows)):
        assert_same_logits(warped[row], transformers_warp(logits[row], rows[row]))
        np.testing.assert_array_equal(warped[row : row + 1], warp_rows(logits[row : row + 1], rows[row]))


def test_warp_returns_float32_for_bfloat16_and_runs_inside_while_loop():
    sampling = BatchSampling.from_params([SamplingParams(temperature=0.6, top_p=0.8)])
    logits = jnp.asarray(random_logits(6, 1, 2, 30), jnp.bfloat16)

    @jax.jit
    def in_loop(logits, sampling):
        start = (0, jnp.zeros(logits.shape))
        return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, warp(logits, sampling)), start)[1]

    expected = warp_jit(logits.astype(jnp.float32), sampling)
    assert expected.dtype == jnp.float32
    np.testing.assert_array_equal(in_loop(logits, sampling), expected)


# --- choice -----------------------------------------------------------------------------------------------------------


def params_of():
    """Any sampled request, filters on or off."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 64, 65, 90, 200]),
        top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.999)),
        min_p=st.one_of(st.just(0.0), st.floats(0.001, 1.0)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), st.lists(params_of(), min_size=3, max_size=3), st.sampled_from([0.0, 0.25, 1.0]))
def test_the_choice_is_the_best_token_of_the_filtered_distribution(seed, rows, step):
    """Rows with any filters beside each other; with a `step` logits have few values, so that ties are everywhere."""
    logits = random_logits(seed, 3, 11, 90)
    logits = np.round(logits / step) * np.float32(step) if step else logits
    noise = np.random.default_rng(seed + 1).gumbel(size=logits.shape).astype(np.float32)
    sampling = BatchSampling.from_params(rows)
    warped = np.asarray(warp_jit(jnp.asarray(logits), sampling))
    sampled = np.asarray(sampling.temperature > 0)[:, None, None]
    expected = np.where(sampled, warped + noise, warped).argmax(-1)
    np.testing.assert_array_equal(choose_jit(jnp.asarray(logits), jnp.asarray(noise), sampling), expected)


@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_the_choice_at_a_real_vocabulary(spread, step):
    """From half of the tokens in the nucleus to a handful, with one parameter for each of seven rows."""
    filters = [{}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.99}, {"top_p": 0.9, "top_k": 64}]
    filters += [{"top_p": 0.9, "min_p": 0.01}, {"top_p": 1e-20}]
    sampling = BatchSampling.from_params([SamplingParams(1.0, seed=row, **each) for row, each in enumerate(filters)])
    logits = random_logits(1, len(filters), 6, 32_064, scale=spread)
    logits = np.round(logits / step) * np.float32(step) if step else logits
    noise = noise_jit(sampling.seed, jnp.tile(jnp.arange(6), (len(filters), 1)), 32_064)
    expected = np.argmax(np.asarray(warp_jit(jnp.asarray(logits), sampling)) + np.asarray(noise), -1)
    np.testing.assert_array_equal(choose_jit(jnp.asarray(logits), noise, sampling), expected)


@pytest.mark.parametrize("size", [1, 3, 127, 128, 129, 640, 1000])
def test_the_first_of_the_largest_is_found(size):
    rng = np.random.default_rng(size)
    for x in (rng.normal(size=(2, 5, size)), rng.integers(0, 3, (2, 5, size)), np.full((2, 5, size), -np.inf)):
        np.testing.assert_array_equal(first_argmax(jnp.asarray(x, jnp.float32)), np.argmax(x, -1))


def test_a_greedy_batch_draws_no_noise_and_holds_none():
    """The branch that a greedy batch takes has no array of the vocabulary's size but the logits."""
    sampling = BatchSampling.from_params([SamplingParams()] * 2)
    noise = Noise(sampling.seed, jnp.zeros(2, jnp.int32), 50)
    jaxpr = jax.make_jaxpr(lambda logits: choose(logits, lambda: noise.levels(0, 7), sampling))(jnp.zeros((2, 7, 50)))
    (branches,) = (each for each in jaxpr.eqns if each.primitive.name == "cond")
    greedy = branches.params["branches"][0]
    names = {each.primitive.name for each in greedy.eqns}
    assert not names & {"random_bits", "threefry2x32", "log", "log1p"}
    outside = [var.aval for each in jaxpr.eqns if each is not branches for var in each.outvars]
    assert all(50 not in aval.shape for aval in outside)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**31), params_of())
def test_drafts_are_filtered_as_the_target_would_be_where_few_tokens_are_kept(seed, params):
    logits = random_logits(seed, 1, 4, 90)
    sampling = BatchSampling.from_params([params])
    floor, scaled = draft_floor_jit(jnp.asarray(logits), sampling)
    if not params.temperature:
        assert np.isneginf(floor).all()
        return
    kept, edge = np.isfinite(warp_rows(logits, params)), on_an_edge(logits[0], params)[None]
    ours = np.asarray(scaled >= floor[..., None])
    assert ((ours == kept) | edge)[kept.sum(-1) < 60].all()
    assert (ours | ~kept | edge).all()  # nothing that the target would keep is ruled out


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_depends_on_seed_and_position_only():
    seeds = jnp.array([7, 0, 2**32 - 1], jnp.uint32)
    positions = jnp.array([[4, 5, 6], [5, 5, 900], [0, 1, 2**20]], jnp.int32)
    together = np.asarray(noise_jit(seeds, positions, 33))  # [3, 3, 33]
    assert together.shape == (3, 3, 33) and together.dtype == np.float32
    for row in range(3):
        for column in range(3):
            alone = noise_jit(seeds[row : row + 1], positions[row : row + 1, column : column + 1], 33)
            np.testing.assert_array_equal(alone[0, 0], together[row, column])
    np.testing.assert_array_equal(together[1, 0], together[1, 1])
    assert len(np.unique(together[[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]], axis=0)) == 8
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(noise_jit(seeds, positions, 33), together)


@pytest.mark.parametrize("count", [1, 2, 33, 1000])
def test_bits_are_those_of_jax_random(count):
    seeds = np.array([0, 7, 2**31, 2**32 - 1], np.uint32)
    positions = np.array([[0, 1], [5, 900], [2**20, 2**31 - 1], [3, 3]], np.int32)
    ours = np.asarray(jax.jit(random_bits)(seeds, positions, np.arange(count)))
    for row, seed in enumerate(seeds):
        key = jax.random.key(seed, impl="threefry2x32")
        for column, position in enumerate(positions[row]):
            theirs = jax.random.bits(jax.random.fold_in(key, position), (count,), jnp.uint32)
            np.testing.assert_array_equal(ours[row, column], theirs)


def test_the_noise_of_a_seed_stays_what_it_was():
    """A seed's answers rest on it from version to version."""
    noise = noise_jit(jnp.array([0, 2**32 - 1], jnp.uint32), jnp.array([[0, 7], [3, 2**20]]), 3)
    expected = [
        [[-0.61364454, 1.6026809, 1.3559327], [0.43936551, 2.5947201, 1.5824964]],
        [[-0.014600692, -0.72467852, 1.062286], [2.426502, 1.2835729, 0.92902136]],
    ]
    np.testing.assert_allclose(noise, expected, rtol=1e-6)


def test_noise_is_standard_gumbel_and_independent_over_tokens_positions_and_seeds():
    noise = np.asarray(noise_jit(jnp.arange(20, dtype=jnp.uint32), jnp.tile(jnp.arange(50), (20, 1)), 200))
    assert scipy.stats.kstest(noise.ravel(), scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    uniform = scipy.stats.gumbel_r.cdf(noise)
    limit = 4 / np.sqrt(noise.size)  # four standard deviations of a sample correlation
    for axis in range(3):
        left, right = np.delete(uniform, -1, axis).ravel(), np.delete(uniform, 0, axis).ravel()
        assert abs(np.corrcoef(left, right)[0, 1]) < limit


def test_the_upper_tail_of_the_noise_reaches_below_1e_7():
    """Of 17M draws, 1000 exceed 9.7: counts are right far out, and values hardly repeat, as those of 23 bits would."""
    noise = np.concatenate(
        [np.asarray(noise_jit(jnp.array([s], jnp.uint32), jnp.arange(8)[None], 2**18)).ravel() for s in range(8)]
    )
    assert np.isfinite(noise).all()
    for bound in (8.0, 10.0, 12.0):
        expected = noise.size * -np.expm1(-np.exp(-bound))
        assert abs((noise > bound).sum() - expected) < 4 * np.sqrt(expected)
    largest = np.sort(noise)[-1000:]
    assert len(np.unique(largest)) > 990


# --- the distribution -------------------------------------------------------------------------------------------------

LOGITS = np.array([1.2, 0.1, -0.4, 2.0, 0.9, -3.0, 0.1], np.float32)
SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.3},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
]


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_samples_follow_the_warped_softmax(fields):
    """Chi-square over 20,000 seeds; nothing is random, so the outcome is the same on every run."""
    count = 20_000
    params = SamplingParams(**fields)
    sampling = BatchSampling.from_params([params] * count)
    sampling = dataclasses.replace(sampling, seed=jnp.arange(count, dtype=jnp.uint32))
    logits = jnp.broadcast_to(LOGITS, (count, 1, LOGITS.size))
    tokens = choose_jit(logits, noise_jit(sampling.seed, jnp.full((count, 1), 17), LOGITS.size), sampling)
    assert tokens.shape == (count, 1) and tokens.dtype == jnp.int32
    assert_follows(np.asarray(tokens), softmax(transformers_warp(LOGITS[None], params))[0])


def test_positions_of_one_seed_follow_the_warped_softmax():
    count = 20_000
    sampling = BatchSampling.from_params([SamplingParams(temperature=1.0, seed=5)])
    logits = jnp.broadcast_to(LOGITS, (1, count, LOGITS.size))
    tokens = choose_jit(logits, noise_jit(sampling.seed, jnp.arange(count)[None], LOGITS.size), sampling)
    assert_follows(np.asarray(tokens), softmax(LOGITS))


def assert_follows(tokens, probabilities):
    observed = np.bincount(tokens.ravel(), minlength=probabilities.size)
    kept = probabilities > 0
    assert observed[~kept].sum() == 0
    assert scipy.stats.chisquare(observed[kept], observed.sum() * probabilities[kept]).pvalue > 1e-3


@pytest.mark.parametrize("fields", SETTINGS, ids=str)
def test_exact_distribution_by_enumerating_the_noise(fields):
    """Every combination of 60 equally likely noise values per token: the share of each token is its probability."""
    params = SamplingParams(**fields)
    quantiles = scipy.stats.gumbel_r.ppf((np.arange(60) + 0.5) / 60).astype(np.float32)
    noise = np.stack(np.meshgrid(quantiles, quantiles, quantiles, indexing="ij"), -1).reshape(1, -1, 3)
    logits = jnp.broadcast_to(LOGITS[:3], noise.shape)
    tokens = choose_jit(logits, jnp.asarray(noise), BatchSampling.from_params([params]))
    shares = np.bincount(np.asarray(tokens).ravel(), minlength=3) / noise.shape[1]
    expected = softmax(warp_rows(LOGITS[None, None, :3], params)[0, 0])
    np.testing.assert_allclose(shares, expected, atol=0.01)  # the midpoint rule's error at 60 values


def test_greedy_rows_of_a_mixed_batch_ignore_the_noise():
    rows = [SamplingParams(), SamplingParams(temperature=1.0, seed=3), SamplingParams(temperature=1e-7)]
    sampling = BatchSampling.from_params(rows)
    logits = jnp.asarray(random_logits(8, 3, 50, 20, scale=0.5))
    noise = noise_jit(sampling.seed, jnp.tile(jnp.arange(50), (3, 1)), 20)
    tokens = np.asarray(choose_jit(logits, noise, sampling))
    greedy = np.asarray(logits).argmax(-1)
    np.testing.assert_array_equal(tokens[[0, 2]], greedy[[0, 2]])
    np.testing.assert_array_equal(tokens[1], np.argmax(np.asarray(logits + noise)[1], -1))
    assert (tokens[1] != greedy[1]).any()
