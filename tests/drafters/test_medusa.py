"""Medusa heads: their formula, their tree against the whole Cartesian product, their files, what is refused."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspec import Generator, SamplingParams, TreeConfig
from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.drafters.drafter import Drafter
from jaxspec.drafters.medusa import MedusaConfig, MedusaHeads
from jaxspec.speculation.params import BatchSampling
from tests.helpers import GivenNoise, randomized, tiny_llava

VOCABULARY, WIDTH, HEADS, BATCH = 11, 16, 3, 2


@pytest.fixture(scope="module")
def model():
    return tiny_llava(vocab_size=VOCABULARY, hidden_size=WIDTH, image_token_id=VOCABULARY - 1, layers=1)


def random_heads(seed: int = 1, own_lm_heads: bool = False, num_heads: int = HEADS) -> MedusaHeads:
    heads = MedusaHeads(MedusaConfig(WIDTH, VOCABULARY, num_heads, own_lm_heads), rngs=nnx.Rngs(seed))
    heads = randomized(heads, seed, scale=2.0)
    for index, head in enumerate(heads.heads):
        head[0].linear.bias[...] = jnp.asarray(np.random.default_rng([seed, index]).normal(size=WIDTH), jnp.float32)
    return heads


def slow_logits(model, heads, features, number) -> np.ndarray:
    """Head `number` by its formula, f64 [B, V]."""
    block, *own = heads.heads[number - 1]
    x, w, b = (np.asarray(part, np.float64) for part in (features, block.linear.kernel[...], block.linear.bias[...]))
    inner = x @ w + b
    lm_head = own[0] if own else model.language_model.lm_head
    return (x + inner / (1 + np.exp(-inner))) @ np.asarray(lm_head.kernel[...], np.float64)


def features_of(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*shape, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("own_lm_heads", [False, True])
def test_logits_are_the_papers(model, own_lm_heads):
    heads, features = random_heads(own_lm_heads=own_lm_heads), features_of(0, BATCH)
    for number in range(1, HEADS + 1):
        ours = heads.logits(model, jnp.asarray(features), number)
        np.testing.assert_allclose(ours, slow_logits(model, heads, features, number), rtol=1e-5, atol=1e-5)


def test_fresh_heads_say_what_the_target_says(model):
    heads, features = MedusaHeads(MedusaConfig(WIDTH, VOCABULARY), rngs=nnx.Rngs(0)), features_of(0, BATCH)
    assert len(heads.heads) == 5
    for number in range(1, 6):
        np.testing.assert_array_equal(heads.logits(model, jnp.asarray(features), number), model.unembed(features))


# -- the tree ----------------------------------------------------------------------------------------------------------


def best_paths(config: TreeConfig, scores: list[np.ndarray]) -> dict[tuple[int, ...], float]:
    """Log-probability of each of the nodes that shall be kept, as paths of tokens, from the whole Cartesian product of
    the heads' log-probabilities `scores` f64 [V] each.

    With more nodes than `top_k` the dynamic tree is narrower than the product: only the `top_k` best nodes of a depth
    have children, their `top_k` best tokens.
    """
    kept, parents = {}, {()}
    narrow = config.total_tokens - 1 > config.top_k
    for depth in range(1, config.max_depth + 1):
        paths = itertools.product(range(VOCABULARY), repeat=depth)
        level = {path: sum(scores[at][token] for at, token in enumerate(path)) for path in paths}
        if narrow:
            likely = set(np.argsort(-scores[depth - 1])[: config.top_k].tolist())
            kept |= {path: score for path, score in level.items() if path[:-1] in parents and path[-1] in likely}
        else:
            kept |= level
        parents = set(sorted(level, key=level.get, reverse=True)[: config.top_k])
    return dict(sorted(kept.items(), key=lambda entry: -entry[1])[: config.total_tokens - 1])


def paths_of(tree, row: int) -> set[tuple[int, ...]]:
    """The nodes below the root as paths of tokens."""
    paths = [()]
    for token, parent, depth in zip(tree.tokens[row, 1:], tree.parents[row, 1:], tree.depths[row, 1:], strict=True):
        paths.append((*paths[int(parent)], int(token)))
        assert len(paths[-1]) == depth
    assert len(set(paths)) == len(paths)
    return set(paths[1:])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    "config",
    [TreeConfig(2, 8, 9), TreeConfig(2, 11, 12), TreeConfig(2, 3, 12), TreeConfig(1, 4, 21), TreeConfig.chain(3)],
    ids=lambda config: f"{config.depth}-{config.top_k}-{config.total_tokens}",
)
def test_tree_holds_the_best_of_the_cartesian_product(model, config, temperature):
    sampling = BatchSampling.from_params([SamplingParams(temperature=temperature)] * BATCH)
    propose = jax.jit(
        lambda heads, state, root, noise: heads.propose(model, config, state, root, noise, sampling),
    )
    for seed in range(3):
        heads, features = random_heads(seed), features_of(seed, BATCH)
        rng = np.random.default_rng(seed)
        root = rng.integers(0, VOCABULARY, BATCH).astype(np.int32)
        noise = rng.gumbel(size=(BATCH, config.max_depth + 1, VOCABULARY)).astype(np.float32)
        tree = propose(heads, jnp.asarray(features), root, GivenNoise(noise))
        np.testing.assert_array_equal(tree.tokens[:, 0], root)
        for row in range(BATCH):
            scores = []
            for number in range(1, config.max_depth + 1):
                logits = slow_logits(model, heads, features, number)[row]
                logits = logits / temperature + noise[row, number - 1] if temperature else logits
                scores.append(logits - np.logaddexp.reduce(logits))
            assert paths_of(tree, row) == set(best_paths(config, scores))


def test_state_is_the_feature_before_the_root(model):
    heads = random_heads()
    state, features = jnp.asarray(features_of(0, 3)), features_of(1, 3, 4)
    after = heads.advance(model, state, None, jnp.asarray(features), jnp.array([1, 0, 4]))
    np.testing.assert_array_equal(after, [features[0, 0], state[1], features[2, 3]])


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_lm_heads", [False, True])
def test_files_round_trip(model, tmp_path, own_lm_heads):
    heads, tree = random_heads(own_lm_heads=own_lm_heads), TreeConfig(2, 3, 8)
    save_drafter_folder(heads, "medusa", tree, model, tmp_path / "medusa", np.float32, {"steps": 7})
    tensors = load_file(tmp_path / "medusa/model.safetensors")
    layers = ["0.linear.weight", "0.linear.bias", *(["1.weight"] if own_lm_heads else [])]
    assert set(tensors) == {f"{index}.{layer}" for index in range(HEADS) for layer in layers}
    for index, head in enumerate(heads.heads):
        np.testing.assert_array_equal(tensors[f"{index}.0.linear.weight"], head[0].linear.kernel[...].T)
        np.testing.assert_array_equal(tensors[f"{index}.0.linear.bias"], head[0].linear.bias[...])
        if own_lm_heads:
            np.testing.assert_array_equal(tensors[f"{index}.1.weight"], head[1].kernel[...].T)
    raw = json.loads((tmp_path / "medusa/config.json").read_text())
    assert (raw["medusa_num_heads"], raw["medusa_num_layers"], raw["jaxspec"]["steps"]) == (HEADS, 1, 7)
    check_loaded(model, tmp_path / "medusa", heads, tree)


def check_loaded(model, folder, heads, tree):
    again, tree_again = load_drafter_folder(folder, model)
    assert tree_again == tree and again.config == heads.config
    for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(heads)), strict=True):
        np.testing.assert_array_equal(a, b)


def write_published(heads: MedusaHeads, folder, **changes):
    """What the authors' code saves names neither sizes nor a tree."""
    save_drafter_folder(heads, "medusa", TreeConfig(2, 3, 8), None, folder, np.float32)
    raw = {"medusa_num_heads": HEADS, "medusa_num_layers": 1, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3"}
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


def test_published_config(model, tmp_path):
    heads = random_heads(own_lm_heads=True)
    check_loaded(model, write_published(heads, tmp_path / "published"), heads, TreeConfig(4, 10, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"medusa_num_layers": 2}, "1 residual block is implemented, config.json says medusa_num_layers 2"),
        ({"medusa_num_heads": 0}, "medusa_num_heads must be at least 1, got 0"),
        ({"hidden_size": 8}, r"made for another target: hidden_size 8 \(target: 16\)"),
        ({"vocab_size": 12}, r"made for another target: vocab_size 12 \(target: 11\)"),
        ({"medusa_num_heads": 4}, r"missing: 3\.0\.linear\.weight \(16, 16\)"),
        ({"medusa_num_heads": 2}, r"extra: 2\.0\.linear\.weight \(16, 16\)"),
    ],
)
def test_refused_configs(model, tmp_path, changes, message):
    folder = write_published(random_heads(), tmp_path / "published", **changes)
    with pytest.raises(ValueError, match=message):
        load_drafter_folder(folder, model)


def test_some_lm_heads_missing(model, tmp_path):
    folder = write_published(random_heads(own_lm_heads=True), tmp_path / "published")
    tensors = load_file(folder / "model.safetensors")
    del tensors["1.1.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: 1\.1\.weight \(11, 16\)"):
        load_drafter_folder(folder, model)


def test_generator_refuses_trees_deeper_than_the_heads(target):
    text = target.config.text
    heads = MedusaHeads(MedusaConfig(text.hidden_size, text.vocab_size, HEADS), rngs=nnx.Rngs(0))
    drafter = Drafter(heads, TreeConfig(4, 10, 64), "medusa", {})
    with pytest.raises(ValueError, match="5 tokens ahead, .* only 3 Medusa heads: depth may be at most 2, got 4"):
        Generator(target, drafter)
    Generator(target, drafter, TreeConfig(2, 10, 64))
    Generator(target, drafter, TreeConfig(4, 3, 4))  # three draft tokens reach no deeper
