"""MASSV's drafter against its own text model run plainly: without cache, without batch, without speculation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec import TreeConfig
from jaxspec.cache import Cache
from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.contract import DrafterContext
from jaxspec.drafters.massv import MassvConfig, MassvDrafter
from jaxspec.kernels.masks import Mask
from jaxspec.prompting import encode_prompt
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.targets.prompts import stack_prompts
from jaxspec.targets.reading import read_prompts
from jaxspec.targets.registry import family_of
from jaxspec.training import MassvRecipe
from jaxspec.training.drafter import Teacher
from tests.families import FAMILIES, family_target
from tests.helpers import GivenNoise

LMS = {"llava_next": "llama", "qwen2_5_vl": "qwen2", "gemma3": "gemma3_text", "llama": "llama", "qwen2": "qwen2"}
LMS |= {"qwen3": "qwen3", "gemma3_text": "gemma3_text"}
"""The family of the small text model for each target's."""
GREEDY = BatchSampling.from_params([SamplingParams()] * 3)
targets = functools.cache(family_target)


def random_massv(model, model_type: str, multimodal: bool, fewer: int = 3, seed: int = 1) -> MassvDrafter:
    """A text model with random weights and `fewer` tokens than the target has."""
    hf_config, _ = FAMILIES[model_type]()
    text = family_of(hf_config).config_from_hf(hf_config).text
    text = dataclasses.replace(text, vocab_size=model.config.text.vocab_size - fewer)
    config = MassvConfig(text, model_type, model.config.vision_width if multimodal else 0)
    graph, state = nnx.split(abstract(lambda rngs: MassvDrafter(config, rngs=rngs)))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        values = rng.normal(size=leaf.shape)
        values = values / leaf.shape[0] ** 0.5 if leaf.ndim > 1 else 1 + 0.2 * values
        return jnp.asarray(values, jnp.float32)

    draft_model = nnx.merge(graph, jax.tree.map(draw, state))
    draft_model.language_model.embed_tokens.embedding[...] *= text.vocab_size**0.5
    return draft_model


@jax.jit
def run_plainly(language, embeds, lengths):
    positions = jnp.broadcast_to(jnp.arange(embeds.shape[1]), embeds.shape[:2])
    features, kv = language(embeds, positions, Mask(lengths, causal=True))
    last = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, language.unembed(features), kv


def plain(draft_model, sequences: list[np.ndarray], room: tuple[int, int]):
    """Last features `[n, D]`, logits `[n, S, V]` and keys and values of the text model on embedded sequences `[S, D]`;
    `room` is what they are padded to, so that few programs compile."""
    embeds = np.zeros((*room, draft_model.config.text.hidden_size), np.float32)
    for index, sequence in enumerate(sequences):
        embeds[index, : len(sequence)] = sequence
    lengths = np.array([len(sequence) for sequence in sequences] + [1] * (room[0] - len(sequences)))
    return run_plainly(draft_model.language_model, embeds, lengths)


def text_context(rows: list[np.ndarray], roots) -> DrafterContext:
    """A batch of text prompts, right-padded."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), 64), np.int32)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return DrafterContext.of(input_ids=ids, lengths=lengths, root=roots)


@pytest.mark.parametrize(
    "family, config",
    [("llama", TreeConfig.chain(4)), ("llama", TreeConfig(2, 2, 11)), ("gemma3_text", TreeConfig(2, 2, 11))],
    ids=["llama-chain", "llama-tree", "gemma3-tree"],
)
def test_drafts_are_those_of_the_plain_text_model(family, config):
    """Over rounds that accept some of a draft: what follows the root and every node of the tree, and in the end the
    cache, which then is that of a fresh prefill."""
    model = targets(family).model
    draft_model = random_massv(model, family, False)
    prefill = jax.jit(lambda context: draft_model.prefill(model, context, 96))
    propose = jax.jit(lambda state, root: draft_model.propose(model, config, state, root, noise, GREEDY))
    advance = jax.jit(lambda state, tokens, count: draft_model.advance(model, state, tokens, None, count))
    vocab_size, room = model.config.text.vocab_size, config.max_depth + 1
    noise = GivenNoise(jnp.zeros((3, room, vocab_size)))
    embed = np.asarray(draft_model.language_model.embed(jnp.arange(vocab_size - 3)))
    embed = np.concatenate([embed, embed[[-1] * 3]])  # the target's last tokens are none of the drafter's

    rng = np.random.default_rng(0)
    texts = [rng.integers(5, vocab_size, length).tolist() for length in (9, 31, 18)]
    state = prefill(text_context([text[:-1] for text in texts], [text[-1] for text in texts]))
    for counts in ((2, 1, room), (room, 0, 1), (1, 3, 2), (0, 2, 2)):
        tree = jax.device_get(propose(state, jnp.array([text[-1] for text in texts])))
        nodes = [(row, node) for row in range(3) for node in range(tree.tokens.shape[1])]
        paths = {(row, node): np.flatnonzero(tree.ancestors[row, node])[1:] for row, node in nodes}
        contexts = [embed[texts[row] + tree.tokens[row, paths[row, node]].tolist()] for row, node in nodes]
        expected = plain(draft_model, contexts, (3 * 11, 64))[1]
        after = {key: expected[index, len(contexts[index]) - 1] for index, key in enumerate(nodes)}
        logits = draft_model.unembed(state.output, vocab_size)
        assert np.isneginf(logits[:, -3:]).all()
        for row in range(3):
            np.testing.assert_allclose(logits[row, :-3], after[row, 0], rtol=1e-4, atol=1e-4)
        drafted = 0
        for row, node in nodes:
            children = tree.tokens[row, 1:][tree.parents[row, 1:] == node]
            best = np.argsort(-after[row, node])[: len(children)]
            assert set(best.tolist()) == set(children.tolist())
            drafted += len(children)
        assert drafted == 3 * (config.total_tokens - 1)

        tokens = rng.integers(5, vocab_size, (3, room))  # past `count` they must not matter
        for row, count in enumerate(counts):
            deepest = paths[row, int(np.argmax(tree.depths[row]))]
            accepted = tree.tokens[row, deepest][: max(count - 1, 0)]
            tokens[row, : len(accepted)] = accepted
            texts[row] += tokens[row, :count].tolist()
        state = advance(state, jnp.asarray(tokens, jnp.int32), jnp.array(counts))
    fresh = prefill(text_context([text[:-1] for text in texts], [text[-1] for text in texts]))
    check_states(state, fresh)


def check_states(state, expected):
    np.testing.assert_array_equal(state.cache.lengths, expected.cache.lengths)
    np.testing.assert_allclose(state.output, expected.output, rtol=1e-4, atol=1e-4)
    for layer, other in zip(state.cache.layers, expected.cache.layers, strict=True):
        for part, same in zip(layer, other, strict=True):
            for row, used in enumerate(np.asarray(state.cache.lengths)):
                np.testing.assert_allclose(part[row, :, :used], same[row, :, :used], rtol=1e-4, atol=1e-4)


read = jax.jit(read_prompts)


def read_images(family: str, more: tuple = ((), (), ())):
    """The encoded prompts of a batch with one image, two of different sizes, and none, each with some `more` tokens;
    and what a drafter sees of them, without its root."""
    target = targets(family)
    rng = np.random.default_rng(7)
    pictures = [rng.integers(0, 256, shape, np.uint8) for shape in ((40, 60, 3), (130, 90, 3), (16, 16, 3))]
    images = (pictures[:1], pictures[1:], ())
    questions = zip(("How many?", "Compare the two.", "What is a chart for?"), images, strict=True)
    prompts = [encode_prompt(target, *question) for question in questions]
    for index, tokens in enumerate(more):
        ids = np.concatenate([prompts[index].input_ids, np.asarray(tokens, np.int32)])
        prompts[index] = dataclasses.replace(prompts[index], input_ids=ids, position_ids=None)
    batch = stack_prompts(target.adapter, prompts, 256)
    passed = read(target.model, batch)
    context = DrafterContext.of_pass(batch, passed, batch.lengths, np.zeros(3, np.uint32), np.zeros(3, np.int32))
    return prompts, context


def spliced(draft_model, target, prompts, context, tails) -> list[np.ndarray]:
    """Each prompt and its tail as the text model shall read them: made token by token."""
    vision = np.asarray(context.vision)
    last = draft_model.config.text.vocab_size - 1
    sequences = []
    for index, (prompt, tail) in enumerate(zip(prompts, tails, strict=True)):
        sequence = []
        for place, token in enumerate([*prompt.input_ids.tolist(), *tail]):
            if token not in target.adapter.image_token_ids:
                sequence.append(draft_model.language_model.embed(jnp.array(min(token, last))))
            elif draft_model.config.multimodal:
                sequence.append(draft_model.projector(vision[int(context.vision_index[index, place])]))
        sequences.append(np.stack(sequence))
    return sequences


@pytest.mark.parametrize("multimodal", [True, False], ids=["multimodal", "text"])
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3"])
def test_prompts_with_images(family, multimodal):
    """The prefill is the plain text model on embeddings with projected features spliced in, or on the text alone; and
    what rounds leave behind is what a prefill of the longer prompt gives."""
    target = targets(family)
    draft_model = random_massv(target.model, LMS[family], multimodal)
    prompts, context = read_images(family)
    assert max(len(prompt.input_ids) for prompt in prompts) < 250 and context.max_images == 2
    roots = np.array([8, 9, 10], np.int32)
    context = dataclasses.replace(context, root=roots)
    prefill = jax.jit(lambda draft_model, context: draft_model.prefill(target.model, context, 288))
    state = prefill(draft_model, context)
    sequences = spliced(draft_model, target, prompts, context, roots[:, None])
    last, _, kv = plain(draft_model, sequences, (3, 256))
    expected = Cache(kv, np.array([len(sequence) for sequence in sequences]))
    check_states(state, dataclasses.replace(state, cache=expected, output=last))

    tokens = np.array([[11, 12, 13], [14, 15, 16], [17, 18, 19]], np.int32)
    advance = jax.jit(lambda draft_model, state, count: draft_model.advance(target.model, state, tokens, None, count))
    state = advance(draft_model, state, np.array([2, 0, 3]))
    _, longer = read_images(family, ((8, 11), (), (10, 17, 18)))
    check_states(state, prefill(draft_model, dataclasses.replace(longer, root=np.array([12, 9, 19], np.int32))))


# Training


@pytest.mark.parametrize("phase", [0, 1, 2])
def test_loss_is_the_cross_entropy_of_the_answers(phase):
    """And each phase trains its part, all of it."""
    target = targets("gemma3")
    draft_model = random_massv(target.model, "gemma3_text", phase != 0)
    answers = ((5, 6, 7, 8), (9, 10), (11, 12, 13))
    prompts, context = read_images("gemma3", answers)
    outside = target.config.text.vocab_size - 1  # as Gemma3's image token lies outside of its text model's vocabulary
    context = dataclasses.replace(context, input_ids=np.where(context.image_ids >= 0, outside, context.input_ids))
    lengths = np.array([len(prompt.input_ids) for prompt in prompts])
    places = np.arange(256)
    answer = (places < lengths[:, None]) & (places >= (lengths - [4, 2, 3])[:, None])
    recipe = MassvRecipe(name="massv", phase=phase)
    graph, params, rest = nnx.split(draft_model, lambda path, _: recipe.trains(path), ...)

    def loss_of(params, rest):
        return recipe.loss(nnx.merge(graph, params, rest), target.model, Teacher(context, answer), None)

    (loss, metrics), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params, rest)
    sequences = spliced(draft_model, target, prompts, context, [[]] * 3)
    logits = jax.nn.log_softmax(plain(draft_model, sequences, (3, 256))[1])
    ends = zip(range(3), sequences, answers, strict=True)
    picked = [logits[i, len(sequence) - len(own) + j - 1, own[j]] for i, sequence, own in ends for j in range(len(own))]
    np.testing.assert_allclose(loss, -np.mean(picked), rtol=1e-5)
    assert 0 <= metrics["accuracy"] <= 1
    learning = {path[0] for path, _ in nnx.to_flat_state(grads)}
    assert learning == {0: {"language_model"}, 1: {"projector"}, 2: {"language_model", "projector"}}[phase]
    for path, grad in nnx.to_flat_state(grads):
        assert np.isfinite(grad[...]).all() and np.abs(grad[...]).max() > 0, path
