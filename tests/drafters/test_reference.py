"""The draft heads against the authors' PyTorch code (tests/reference): forward, first tree, second tree."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxspec.drafters.checkpoint import load_drafter_folder
from jaxspec.drafters.contract import DrafterContext
from jaxspec.speculation.params import BatchSampling, SamplingParams
from tests.helpers import GivenNoise, tiny_llava

REFERENCE = Path(__file__).parent.parent / "reference"
GREEDY = BatchSampling.from_params([SamplingParams()])


@pytest.fixture(scope="module", params=["eagle2", "vispec"])
def case(request):
    folder = REFERENCE / request.param
    expected = np.load(folder / "expected.npz")
    model = tiny_llava(vocab_size=199, hidden_size=64, image_token_id=198, patches=36)
    embedding = load_file(folder / "model.safetensors")["embed_tokens.weight"]
    model.language_model.embed_tokens.embedding[...] = jnp.asarray(embedding)
    model.language_model.lm_head.kernel[...] = jnp.asarray(expected["lm_head"].T)
    draft_model, tree = load_drafter_folder(folder, model)
    return request.param, model, draft_model, tree, expected


def context_of(expected) -> DrafterContext:
    return DrafterContext.of(
        expected["inputs_embeds"],
        expected["hidden_states"],
        input_ids=expected["input_ids"],
        image_ids=np.where(expected["image_mask"], 0, -1),
        root=expected["sample_token"][0],
        min_image_tokens=int(expected["image_mask"].sum()),
    )


def check_tree(tree, expected, prefix):
    tokens = expected["draft_tokens" if not prefix else "round2_draft_tokens"]
    mask = expected["tree_mask" if not prefix else "round2_tree_mask"]
    depths = expected["tree_position_ids" if not prefix else "round2_position_ids"]
    np.testing.assert_array_equal(tree.tokens, tokens)
    np.testing.assert_array_equal(tree.ancestors, mask[0].astype(bool))
    np.testing.assert_array_equal(tree.depths[0], depths)


def test_teacher_forced_output(case):
    name, model, draft_model, _, expected = case
    context = context_of(expected)
    next_embeds = jnp.concatenate([context.embeds[:, 1:], jnp.zeros_like(context.embeds[:, :1])], axis=1)
    inputs = draft_model.inputs_of(context, next_embeds)
    output, _ = jax.jit(lambda draft_model, inputs: draft_model.forward(inputs))(draft_model, inputs)
    full = np.zeros_like(expected["train_output"])
    positions = np.asarray(inputs.positions)[0]
    valid = np.asarray(inputs.valid)[0]
    full[0, positions[valid]] = np.asarray(output)[0, valid]
    if name == "vispec":
        assert valid.sum() == expected["input_ids"].shape[1] - 35  # 36 image tokens became one entry
    np.testing.assert_allclose(full, expected["train_output"], atol=2e-6, rtol=1e-5)


def test_first_and_second_tree(case):
    _, model, draft_model, config, expected = case
    context = context_of(expected)
    noise = GivenNoise(jnp.zeros((1, config.max_depth + 1, 199)))

    @jax.jit
    def first_round(draft_model, model):
        state = draft_model.prefill(model, context, capacity=128)
        return draft_model.propose(model, config, state, context.root, noise, GREEDY), state

    tree, state = first_round(draft_model, model)
    check_tree(tree, expected, "")

    accepted, hidden = expected["round2_accepted"], expected["round2_hidden"]
    length = config.max_depth + 1
    count = accepted.shape[1]
    tokens = np.zeros((1, length), np.int32)
    tokens[0, :count] = [*accepted[0, 1:], expected["round2_sample"][0, 0]]
    features = np.full((1, length, hidden.shape[-1]), 7.0, np.float32)  # entries past `count` must not matter
    features[:, :count] = hidden

    @jax.jit
    def second_round(draft_model, model, state):
        state = draft_model.advance(model, state, jnp.asarray(tokens), jnp.asarray(features), jnp.array([count]))
        root = jnp.asarray(expected["round2_sample"][0])
        return draft_model.propose(model, config, state, root, noise, GREEDY)

    check_tree(second_round(draft_model, model, state), expected, "round2")


def test_published_files_round_trip(case, tmp_path):
    from jaxspec.drafters.checkpoint import save_drafter_folder

    name, model, draft_model, tree, _ = case
    save_drafter_folder(draft_model, name, tree, model, tmp_path / name, np.float32)
    saved = load_file(tmp_path / name / "model.safetensors")
    published = load_file(REFERENCE / name / "model.safetensors")
    assert saved.keys() == published.keys()
    for key, value in published.items():
        np.testing.assert_array_equal(saved[key], value)
    again, tree_again = load_drafter_folder(tmp_path / name, model)
    assert tree_again == tree
    for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(draft_model)), strict=True):
        np.testing.assert_array_equal(a, b)
