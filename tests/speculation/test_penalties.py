"""Penalties along a tree: every node's logits are what the plain definitions make of them after prompt, answer and the
node's path."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process

from jaxspec import SamplingParams
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.penalties import Penalties, penalised
from jaxspec.speculation.tree import NO_TOKEN, TreeConfig, build_tree, draft_children, path_tokens
from tests.helpers import GivenNoise
from tests.plain_penalties import penalised_logits

BATCH, NODES, VOCAB, ROOM = 3, 9, 13, 12


penalties = st.floats(-2, 2).map(lambda x: round(x, 2))
params = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.one_of(st.just(0.0), penalties),
    frequency_penalty=st.one_of(st.just(0.0), penalties),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.integers(-100, 100), max_size=3),
    min_tokens=st.integers(0, 8),
)
tokens = st.integers(0, VOCAB - 1)


@st.composite
def trees(draw):
    """Parents [N] with parents first, and tokens [N], few of them, so that paths repeat them."""
    parents = [0] + [draw(st.integers(0, node - 1)) for node in range(1, NODES)]
    return parents, draw(st.lists(st.integers(0, 3), min_size=NODES, max_size=NODES))


row = st.tuples(
    params,
    st.lists(st.integers(0, VOCAB + 1), min_size=1, max_size=5),  # two image tokens lie behind the vocabulary
    st.lists(tokens, max_size=ROOM),
    st.lists(tokens, max_size=3),
    trees(),
)


@jax.jit
def of_tree(logits, penalties, answers, lengths, tokens, parents, depths):
    penalties = penalties.counted(answers, lengths)
    tree = build_tree(tokens, parents, depths, NODES)
    return penalised(logits, penalties, tree.depths, path_tokens(tree, NODES - 1))


def state_of(rows) -> Penalties:
    asked, prompts, _, stops, _ = zip(*rows, strict=True)
    return Penalties.from_params(asked, [np.array(prompt, np.int32) for prompt in prompts], stops, VOCAB)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(row, min_size=BATCH, max_size=BATCH), st.integers(0, 2**31))
def test_every_node_sees_its_own_path(rows, seed):
    logits = np.random.default_rng(seed).normal(size=(BATCH, NODES, VOCAB)).astype(np.float32) * 3
    answers, lengths = np.zeros((BATCH, ROOM), np.int32), np.array([len(each[2]) for each in rows])
    for each, (_, _, answer, _, _) in zip(answers, rows, strict=True):
        each[: len(answer)] = answer
    parents, drafted = (np.array([each[4][part] for each in rows]) for part in (0, 1))
    depths = np.zeros_like(parents)
    for node in range(1, NODES):
        depths[:, node] = depths[np.arange(BATCH), parents[:, node]] + 1
    actual = np.asarray(of_tree(logits, state_of(rows), answers, lengths, drafted, parents, depths))
    for number, (asked, prompt, answer, stops, _) in enumerate(rows):
        for node in range(NODES):
            path, at = [], node
            while at:
                path.insert(0, int(drafted[number, at]))
                at = parents[number, at]
            expected = penalised_logits(logits[number, node], asked, prompt, [*answer, *path], stops)
            np.testing.assert_allclose(actual[number, node], expected, rtol=1e-6, atol=1e-5)
        if not asked.penalises:
            np.testing.assert_array_equal(actual[number], logits[number])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, VOCAB + 1), min_size=1, max_size=8), st.sampled_from([0.5, 1.1, 3.0]), st.integers(0, 2**31)
)
def test_the_repetition_penalty_is_transformers(context, penalty, seed):
    logits = np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32)
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([context]), torch.from_numpy(logits[None]))[0].numpy()
    actual = penalised_logits(logits, SamplingParams(repetition_penalty=penalty), context, [], [])
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_row_that_asks_for_nothing_keeps_every_bit():
    """Also zeros of both signs and what is not finite; beside a row that asks for everything."""
    everything = SamplingParams(
        repetition_penalty=1.5, presence_penalty=1, frequency_penalty=1, logit_bias={1: 1}, min_tokens=9
    )
    rows = [(SamplingParams(), [1, 2], [], [3], None), (everything, [1, 2], [], [3], None)]
    odd = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38], np.float32)
    logits = jnp.asarray(np.resize(odd, (2, 1, VOCAB)))
    path = jnp.asarray([[[2, 2, -1]]] * 2)
    penalties = state_of(rows).counted(jnp.array([[2, 4]] * 2), jnp.array([2, 2]))
    for actual in (penalised(logits, penalties, 2, path), penalised(logits, penalties, 2)):
        np.testing.assert_array_equal(
            np.asarray(actual)[0].view(np.uint32), np.asarray(logits)[0].view(np.uint32), strict=True
        )
        assert (np.asarray(actual)[1].view(np.uint32) != np.asarray(logits)[1].view(np.uint32)).any()


def test_what_leads_with_the_batch():
    """Rows join and leave such states: every leaf is of B rows, and the prompt's length is in no shape."""
    rows = [(SamplingParams(presence_penalty=1), [1] * length, [], [3], None) for length in (2, 40)]
    one, other = state_of(rows[:1]), state_of(rows[1:])
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, other)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(state_of(rows)))


def test_drafts_follow_the_rows_penalties():
    """In the target's vocabulary and in a part of it, greedily and with noise, and where a token was not drafted."""
    asked = SamplingParams(frequency_penalty=2, logit_bias={6: 50}, min_tokens=5)
    rows = [(asked, [1], [], [3], None), (SamplingParams(), [1], [], [3], None)]
    logits = jnp.broadcast_to(jnp.arange(VOCAB, dtype=jnp.float32)[::-1] * 0.1, (2, 1, VOCAB)).at[..., 3].set(9)
    penalties = state_of(rows).counted(jnp.array([[0, 0]] * 2), jnp.array([2, 2]))
    config, noise = TreeConfig(1, 2, 3), GivenNoise(jnp.zeros((2, 4, VOCAB)))
    for temperature in (0.0, 1.0):
        greedy = BatchSampling.from_params([SamplingParams(temperature=temperature)] * 2, penalties)
        for vocabulary in (None, jnp.array([0, 1, 3, 6, 8])):
            own = logits if vocabulary is None else logits[..., vocabulary]
            for level, expected in ((0, [6, 1]), (3, [6, 3])):
                drafted = draft_children(config, own, level, noise, greedy, vocabulary)[1]
                assert drafted[:, 0].tolist() == [expected, [3, 0]]


def test_a_path_with_a_node_that_holds_no_token():
    tree = build_tree(jnp.array([[5, NO_TOKEN, 7]]), jnp.array([[0, 0, 1]]), jnp.array([[0, 1, 2]]), 2)
    assert path_tokens(tree, 2).tolist() == [[[-1, -1], [NO_TOKEN, -1], [NO_TOKEN, 7]]]
    assert path_tokens(tree, 0).shape == (1, 3, 0)


def test_no_token_left_is_refused():
    every = list(range(VOCAB))
    with pytest.raises(ValueError, match="min_tokens leaves no token to choose: all 13 are stop tokens"):
        state_of([(SamplingParams(min_tokens=1), [1], [], every, None)])
    state_of([(dataclasses.replace(SamplingParams(), presence_penalty=1), [1], [], every, None)])
