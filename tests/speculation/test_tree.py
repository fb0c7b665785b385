"""Trees: settings, growth against a slow EAGLE-2, acceptance against a pointer walk; attention against a dense one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import Generator, SamplingParams, TreeConfig
from jaxspec.cache import LayerKV
from jaxspec.kernels.attention import Segment, attend
from jaxspec.kernels.masks import Mask
from jaxspec.speculation.accept import accept
from jaxspec.speculation.params import BatchSampling
from jaxspec.speculation.tree import build_tree, grow_tree
from tests.drafting import DRAFTERS
from tests.helpers import GivenNoise

VOCABULARY, STATES, BATCH = 13, 1009, 4

# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ((-1, 2, 2), "depth must be at least 0, got -1"),
        ((1, 0, 2), "top_k must be at least 1, got 0"),
        ((2, 3, 23), "total_tokens must lie in 1..22, all that a tree of depth 2 and top_k 3 can hold, got 23"),
        ((2, 3, 0), "total_tokens must be at least 1, got 0"),
        ((1.5, 2, 2), "depth must be an integer, got 1.5"),
        ((1, "2", 2), "top_k must be an integer, got '2'"),
        ((1, 2, None), "total_tokens must be an integer, got None"),
        ((1, 2, True), "total_tokens must be an integer, got True"),
        ((1, 2, 2, "much"), "noise_weight must be a number, got 'much'"),
    ],
)
def test_impossible_trees_are_refused(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TreeConfig(*values)


def test_impossible_options_are_refused():
    with pytest.raises(ValueError, match="num_speculative_tokens must be at least 1, got 0"):
        TreeConfig.chain(0)
    with pytest.raises(ValueError, match=r"noise_weight must lie in 0..1, got 1.5"):
        TreeConfig(2, 3, 8, noise_weight=1.5)
    with pytest.raises(ValueError, match=r"top_k \(14\) is larger than the vocabulary \(13\)"):
        TreeConfig(2, 14, 8).check_vocabulary(13)
    TreeConfig(2, 13, 8).check_vocabulary(13)


def test_generator_refuses_trees_it_cannot_grow(target):
    with pytest.raises(ValueError, match=r"top_k \(641\) is larger than the vocabulary \(640\)"):
        Generator(target, DRAFTERS["random"](target), TreeConfig(1, 641, 10))
    with pytest.raises(ValueError, match="a tree of 10 tokens needs a drafter"):
        Generator(target, None, TreeConfig(2, 3, 10))


def test_named_trees():
    assert TreeConfig(2, 3, 22).num_candidates == 21
    chain = TreeConfig.chain(4)
    assert (chain.depth, chain.top_k, chain.total_tokens, chain.max_depth) == (3, 1, 5, 4)
    alone = TreeConfig.autoregressive()
    assert (alone.total_tokens, alone.max_depth) == (1, 0)
    assert TreeConfig(6, 4, 3).max_depth == 2  # two draft tokens reach no deeper


# -- growth ------------------------------------------------------------------------------------------------------------


def next_state(state, token):
    """The toy drafter's memory of a path of tokens."""
    return (state * 31 + token * 7 + 3) % STATES


def toy_logits(seed):
    return np.random.default_rng(seed).normal(scale=2.0, size=(STATES, VOCABULARY)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def grow_toy(config, table, root, noise, sampling):
    def expand(carry, tokens, parent, level):
        states = next_state(jnp.take_along_axis(carry, parent, axis=1), tokens)
        return states, jnp.asarray(table)[states]

    states = next_state(jnp.zeros_like(root), root)[:, None]
    return grow_tree(config, root, jnp.asarray(table)[states[:, 0]], GivenNoise(noise), sampling, expand, states)


def slow_tree(config, table, root, noise, temperature):
    """EAGLE-2 (arXiv 2406.16858, section 4) with lists: tokens, parents, depths in order of creation."""

    def children(node):
        logits = table[node["state"]].astype(np.float64)
        if temperature > 0:
            logits = logits / temperature
            logits = logits + config.noise_weight * noise[node["depth"]]
        scores = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        return [
            {
                "token": int(token),
                "score": node["score"] + scores[token],
                "state": next_state(node["state"], int(token)),
                "depth": node["depth"] + 1,
                "parent": node,
            }
            for token in np.argsort(-scores)[: config.top_k]
        ]

    def best(nodes, count):
        return sorted(nodes, key=lambda node: -node["score"])[:count]

    start = {"token": int(root), "score": 0.0, "state": next_state(0, int(root)), "depth": 0, "parent": None}
    frontier = children(start)
    candidates = list(frontier)
    for _ in range(config.depth):
        grown = [child for node in frontier for child in children(node)]
        candidates += grown
        frontier = best(grown, config.top_k)
    chosen = {id(node) for node in best(candidates, config.total_tokens - 1)}
    kept = [start, *(node for node in candidates if id(node) in chosen)]
    place = {id(node): index for index, node in enumerate(kept)}
    parents = [0, *(place[id(node["parent"])] for node in kept[1:])]
    return [node["token"] for node in kept], parents, [node["depth"] for node in kept]


def check_structure(tree, max_depth):
    """Links, depths and ancestors say the same; siblings differ."""
    tokens, parents, depths, ancestors = map(np.asarray, tree)
    for row in range(len(tokens)):
        seen = set()
        for node in range(tokens.shape[1]):
            expected = np.zeros(tokens.shape[1], bool)
            step, length = node, 0
            expected[node] = True
            while step != 0:
                assert parents[row, step] < step
                step, length = parents[row, step], length + 1
                expected[step] = True
            assert depths[row, node] == length <= max_depth
            np.testing.assert_array_equal(ancestors[row, node], expected)
            if node:
                assert (parents[row, node], tokens[row, node]) not in seen
                seen.add((parents[row, node], tokens[row, node]))


CONFIGS = [
    TreeConfig(0, 3, 4),
    TreeConfig(1, 1, 3),
    TreeConfig(2, 3, 8),
    TreeConfig(3, 2, 15),
    TreeConfig(4, 5, 30),
    TreeConfig(5, 3, 4),
    TreeConfig(3, 13, 60),
    TreeConfig(2, 3, 22),
]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.depth}-{config.top_k}-{config.total_tokens}")
def test_grown_tree_is_the_published_one(config, temperature):
    for seed in range(3):
        check_growth(config, temperature, seed)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_noise_weight_reaches_the_scores(weight):
    coupled = check_growth(TreeConfig(3, 4, 20), 0.8, 0)
    other = check_growth(TreeConfig(3, 4, 20, noise_weight=weight), 0.8, 0)
    assert (np.asarray(coupled.tokens) != np.asarray(other.tokens)).any()


def check_growth(config, temperature, seed):
    table = toy_logits(seed)
    rng = np.random.default_rng(seed)
    root = rng.integers(0, VOCABULARY, BATCH).astype(np.int32)
    noise = rng.gumbel(size=(BATCH, config.depth + 2, VOCABULARY)).astype(np.float32)
    sampling = BatchSampling.from_params([SamplingParams(temperature=temperature)] * BATCH)
    tree = grow_toy(config, table, root, noise[:, : config.max_depth + 1], sampling)
    for row in range(BATCH):
        tokens, parents, depths = slow_tree(config, table, root[row], noise[row], temperature)
        assert tree.tokens[row].tolist() == tokens
        assert tree.parents[row].tolist() == parents
        assert tree.depths[row].tolist() == depths
    check_structure(tree, config.max_depth)
    return tree


def test_candidates_that_a_filter_removed_still_form_a_tree():
    """With two tokens left of four candidates, the rest have no probability; ties among them must not break links."""
    config = TreeConfig(3, 4, 40)
    sampling = BatchSampling.from_params([SamplingParams(temperature=0.8, top_k=2)] * BATCH)
    root = jnp.arange(BATCH, dtype=jnp.int32)
    noise = jnp.asarray(np.random.default_rng(0).gumbel(size=(BATCH, 5, VOCABULARY)), jnp.float32)
    check_structure(grow_toy(config, toy_logits(0), root, noise, sampling), config.max_depth)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_tree_is_valid_whatever_order_ties_come_in(temperature, monkeypatch):
    """XLA may return equal values of `top_k` in any order; here in the reverse of CPU's, where logits have few values
    and certain tokens score as high as their parents."""
    plain = jax.lax.top_k

    def reversed_ties(x, k):
        values, places = plain(x[..., ::-1], k)
        return values, x.shape[-1] - 1 - places

    config = TreeConfig(3, 3, 12)
    rng = np.random.default_rng(0)
    root = jnp.arange(BATCH, dtype=jnp.int32)
    noise = rng.gumbel(size=(BATCH, 4, VOCABULARY)).astype(np.float32)
    sampling = BatchSampling.from_params([SamplingParams(temperature, top_p=0.3)] * BATCH)
    tables = [np.round(toy_logits(1)), np.where(toy_logits(2) == toy_logits(2).max(-1, keepdims=True), 200.0, 0.0)]
    for table in tables:
        for top_k in (plain, reversed_ties):
            monkeypatch.setattr(jax.lax, "top_k", top_k)
            grow_toy.clear_cache()
            check_structure(grow_toy(config, table, root, noise, sampling), config.max_depth)
    grow_toy.clear_cache()


def test_draft_logits_that_are_no_numbers_still_give_a_tree():
    config = TreeConfig(2, 3, 12)
    sampling = BatchSampling.from_params([SamplingParams()] * BATCH)
    root = jnp.arange(BATCH, dtype=jnp.int32)
    for value in (np.nan, np.inf, -np.inf):
        table = np.where(np.arange(STATES)[:, None] % 3 == 0, np.float32(value), toy_logits(0))
        tree = grow_toy(config, table, root, jnp.zeros((BATCH, 3, VOCABULARY)), sampling)
        check_structure(tree, config.max_depth)


def test_chain_is_a_path():
    config = TreeConfig.chain(5)
    sampling = BatchSampling.from_params([SamplingParams()] * BATCH)
    root = jnp.arange(BATCH, dtype=jnp.int32)
    tree = grow_toy(config, toy_logits(3), root, jnp.zeros((BATCH, 6, VOCABULARY)), sampling)
    steps = np.arange(6)
    for row in range(BATCH):
        assert tree.parents[row].tolist() == np.maximum(steps - 1, 0).tolist()
        assert tree.depths[row].tolist() == steps.tolist()
        np.testing.assert_array_equal(tree.ancestors[row], np.tri(6, dtype=bool))
        state, greedy = next_state(0, row), [row]
        for _ in range(5):
            greedy.append(int(toy_logits(3)[state].argmax()))
            state = next_state(state, greedy[-1])
        assert tree.tokens[row].tolist() == greedy


# -- acceptance --------------------------------------------------------------------------------------------------------


def random_trees(rng, count, nodes):
    """Trees whose siblings differ, and targets that often choose a child's token."""
    tokens, parents, depths, choices = (np.zeros((count, nodes), np.int32) for _ in range(4))
    for row in range(count):
        for node in range(1, nodes):
            # Recent nodes are likelier parents, so that paths get long.
            parents[row, node] = max(rng.integers(0, node), rng.integers(0, node))
            depths[row, node] = depths[row, parents[row, node]] + 1
            siblings = tokens[row, 1:node][parents[row, 1:node] == parents[row, node]]
            tokens[row, node] = rng.choice(np.setdiff1d(np.arange(50), siblings))
        for node in range(nodes):
            children = tokens[row, 1:][parents[row, 1:] == node]
            hit = len(children) and rng.random() < 0.8
            choices[row, node] = rng.choice(children) if hit else rng.integers(0, 50)
    return tokens, parents, depths, choices


def test_acceptance_is_a_walk_from_the_root():
    nodes = 12
    tokens, parents, depths, choices = random_trees(np.random.default_rng(0), 300, nodes)
    tree = build_tree(jnp.asarray(tokens), jnp.asarray(parents), jnp.asarray(depths), nodes - 1)
    check_structure(tree, nodes - 1)
    accepted = accept(tree, jnp.asarray(choices), nodes - 1)
    lengths = []
    for row in range(300):
        path, node = [0], 0
        while node is not None:
            follows = (parents[row] == node) & (tokens[row] == choices[row, node]) & (np.arange(nodes) > 0)
            node = int(np.flatnonzero(follows)[0]) if follows.any() else None
            path += [] if node is None else [node]
        length = len(path)
        lengths.append(length)
        assert accepted.length[row] == length
        assert accepted.path[row].tolist() == path + [path[-1]] * (nodes - length)
        assert accepted.tokens[row, :length].tolist() == choices[row, path].tolist()
        assert accepted.root[row] == choices[row, path[-1]]
    assert set(range(1, 6)) <= set(lengths)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("sizes", [(5,), (9, 5), (9, 3, 5)])
def test_attention_over_segments_is_dense_attention(kv_heads, sizes):
    batch, heads, nodes, width = 2, 6, 5, 8
    rng = np.random.default_rng(1)
    query = rng.normal(size=(batch, heads, nodes, width))
    keys, values = rng.normal(size=(2, batch, kv_heads, sum(sizes), width))
    mask = rng.random((batch, nodes, sum(sizes))) < 0.5
    mask[..., -1] = True
    if len(sizes) > 1:  # a cache mask is the same for all new tokens
        mask[:, :, : sizes[0]] = mask[:, :1, : sizes[0]]

    shared_keys, shared_values = (np.repeat(part, heads // kv_heads, axis=1) for part in (keys, values))
    scores = np.einsum("bhnd,bhsd->bhns", query, shared_keys) / np.sqrt(width)
    weights = np.where(mask[:, None], np.exp(scores), 0)
    expected = np.einsum("bhns,bhsd->bhnd", weights / weights.sum(-1, keepdims=True), shared_values)

    segments, start = [], 0
    for index, size in enumerate(sizes):
        part = slice(start, start + size)
        rows = slice(0, 1) if index == 0 and len(sizes) > 1 else slice(None)
        kv = LayerKV(*(jnp.asarray(x[:, :, part], jnp.float32) for x in (keys, values)))
        segments.append(Segment(kv, Mask(dense=jnp.asarray(mask[:, rows, part]))))
        start += size
    out = attend(jnp.asarray(query, jnp.float32), segments)
    np.testing.assert_allclose(out, expected, atol=2e-6, rtol=1e-5)
