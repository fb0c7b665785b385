"""Losses against their definitions, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec.training import losses
from jaxspec.training.losses import (
    cross_entropy,
    expected_share,
    masked_mean,
    overlap,
    probability_l1,
    ranking,
    smooth_l1,
    soft_cross_entropy,
)

RNG = np.random.default_rng(0)
DRAFT, TARGET = (RNG.normal(size=(2, 3, 17)).astype(np.float32) * 2 for _ in range(2))
MASK = np.array([[True, False, True], [False, True, True]])


def softmax(x):
    weights = np.exp(x - x.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def masked(values):
    return values[MASK].mean()


def test_cross_entropy():
    labels = RNG.integers(0, 17, size=(2, 3))
    expected = masked(-np.log(np.take_along_axis(softmax(DRAFT), labels[..., None], -1)[..., 0]))
    np.testing.assert_allclose(masked_mean(cross_entropy(DRAFT, jnp.asarray(labels)), MASK), expected, rtol=1e-5)


def test_soft_cross_entropy():
    expected = masked(-(softmax(TARGET) * np.log(softmax(DRAFT))).sum(-1))
    np.testing.assert_allclose(masked_mean(soft_cross_entropy(DRAFT, TARGET), MASK), expected, rtol=1e-5)


def test_probability_l1_is_twice_the_total_variation():
    expected = masked(np.abs(softmax(TARGET) - softmax(DRAFT)).sum(-1))
    np.testing.assert_allclose(masked_mean(probability_l1(DRAFT, TARGET), MASK), expected, rtol=1e-5)


def test_smooth_l1():
    error = np.abs(DRAFT - TARGET)
    expected = masked(np.where(error < 1, 0.5 * error**2, error - 0.5).mean(-1))
    np.testing.assert_allclose(masked_mean(smooth_l1(DRAFT, TARGET), MASK), expected, rtol=1e-5)


def test_ranking_is_plackett_luce_over_the_targets_top_tokens():
    def negative_log_likelihood(draft, target, top=10):
        z = draft[np.argsort(-target)[:top]].astype(np.float64)
        return -sum(z[j] - np.log(np.exp(z[j:]).sum()) for j in range(top))

    values = np.array([[negative_log_likelihood(DRAFT[i, j], TARGET[i, j]) for j in range(3)] for i in range(2)])
    np.testing.assert_allclose(masked_mean(ranking(DRAFT, TARGET), MASK), masked(values), rtol=1e-5)


def test_overlap_is_what_total_variation_leaves():
    expected = 1 - np.abs(softmax(TARGET) - softmax(DRAFT)).sum(-1) / 2
    np.testing.assert_allclose(overlap(DRAFT, TARGET), expected, rtol=1e-5)


def test_the_expected_share_of_a_chain():
    """Token k of a draft that begins at position s is the one that stands at s + k; one rejection ends the draft."""
    overlaps = RNG.uniform(size=(3, 2, 5)).astype(np.float32)
    expected = np.zeros((2, 5))
    for row in range(2):
        for start in range(5):
            reached = 1.0
            for depth in range(3):
                reached *= overlaps[depth, row, start + depth] if start + depth < 5 else 0
                expected[row, start] += reached / 3
    np.testing.assert_allclose(expected_share(list(overlaps)), expected, rtol=1e-5)


def test_nothing_selected_gives_zero():
    assert float(masked_mean(probability_l1(DRAFT, TARGET), np.zeros_like(MASK))) == 0.0


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_columns_one_after_another_say_the_same(monkeypatch, columns):
    """Values and gradients, also of what the function closes over, and where the last piece is not full."""
    head = RNG.normal(size=(17, 17)).astype(np.float32)

    def loss(head, draft):
        def compare(draft, target):
            return {"l1": probability_l1(draft @ head, target), "sum": target.sum(axis=-1)}

        values = losses.by_columns(compare, 17, draft, jnp.asarray(TARGET))
        return masked_mean(values["l1"] + values["sum"], MASK)

    expected = jax.value_and_grad(loss, argnums=(0, 1))(head, DRAFT)
    monkeypatch.setattr(losses, "LOGITS", 2 * 17 * columns)
    assert ("scan" in str(jax.make_jaxpr(loss)(head, DRAFT))) == (columns < 3)
    for ours, theirs in zip(
        *map(jax.tree.leaves, (jax.value_and_grad(loss, (0, 1))(head, DRAFT), expected)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
