"""MASSV's drafter against its own text model run plainly: without cache, without batch, without speculation."""

import copy
import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxspec import TreeConfig, load_drafter
from jaxspec.cache import Cache
from jaxspec.checkpoints.names import abstract
from jaxspec.checkpoints.tensors import read_file
from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.drafters.contract import DrafterContext
from jaxspec.drafters.eagle import EagleHead
from jaxspec.drafters.massv import MASSV, MassvConfig, MassvDrafter, check_tokenizer
from jaxspec.kernels.masks import Mask
from jaxspec.prompting import encode_prompt
from jaxspec.speculation.params import BatchSampling, SamplingParams
from jaxspec.targets.prompts import stack_prompts
from jaxspec.targets.reading import read_prompts
from jaxspec.targets.registry import family_of, load_model
from jaxspec.training import MassvRecipe
from jaxspec.training.drafter import Teacher
from jaxspec.training.massv import new_massv
from tests.families import FAMILIES, TEXT, family_target, small_tokenizer
from tests.folders import write_random
from tests.helpers import GivenNoise
from tests.targets.published import CONFIGS

REFERENCE = Path(__file__).parent.parent / "reference"
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
    propose = jax.jit(lambda state, root: draft_model.propose(model, config, state, root, noise, GREEDY)[0])
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


def test_a_projector_comes_and_goes(tmp_path):
    target = targets("qwen2_5_vl")
    folder = lm_folder(tmp_path, "qwen2", vocab_size=target.config.text.vocab_size)
    with_eyes = new_massv(target, folder, True, seed=3)
    assert with_eyes.config.vision_width == target.config.vision_width
    save_drafter_folder(with_eyes, "massv", TreeConfig.chain(5), target.model, tmp_path / "eyes", np.float32)
    continued, without = new_massv(target, tmp_path / "eyes", True), new_massv(target, tmp_path / "eyes", False)
    assert_same(nnx.state(continued), nnx.state(with_eyes))
    assert without.projector is None
    assert_same(nnx.state(without), nnx.state(load_drafter(folder, target).model))
    lm_target = targets("qwen2")
    with pytest.raises(ValueError, match="needs a target with vision features"):
        new_massv(lm_target, folder, True)


# Folders


def lm_folder(tmp_path: Path, family: str, **text) -> Path:
    """A Hugging Face folder of a random small text model."""
    hf_config, _ = FAMILIES[family]()
    raw = hf_config.to_dict() | text
    if raw.get("layer_types"):
        raw["layer_types"] = raw["layer_types"][: raw["num_hidden_layers"]]
    return write_random(tmp_path / family, type(hf_config).from_dict(raw))


def assert_same(state, other):
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "gemma3", "qwen3", "gemma3_text"])
def test_saved_drafters_come_back(family, tmp_path):
    target = targets(family)
    for multimodal in {target.config.vision_width > 0, False}:
        draft_model = random_massv(target.model, LMS[family], multimodal)
        save_drafter_folder(draft_model, "massv", TreeConfig(2, 2, 9), target.model, tmp_path / "it", np.float32)
        loaded = load_drafter(tmp_path / "it", target)
        assert (loaded.method, loaded.tree) == ("massv", TreeConfig(2, 2, 9))
        assert loaded.model.config == draft_model.config
        assert_same(nnx.state(loaded.model), nnx.state(draft_model))
        config = json.loads((tmp_path / "it/config.json").read_text())
        assert config["model_type"] == LMS[family] and config["architectures"][0].endswith("ForCausalLM")
        names = {name.split(".")[0] for name in read_file(tmp_path / "it/model.safetensors")}
        assert names == {"language_model", "projector"} if multimodal else {"language_model"}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_text_models_folder_is_the_text_only_drafter(family, layers, tmp_path):
    target = targets("llava_next")
    folder = lm_folder(tmp_path, family, num_hidden_layers=layers)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"top_k": 50}))  # of its sampling: no tree
    drafter = load_drafter(folder, target)
    assert (drafter.method, drafter.tree, drafter.about) == ("massv", TreeConfig.chain(5), {})
    assert not drafter.model.config.multimodal
    assert_same(nnx.state(drafter.model.language_model), nnx.state(load_model(folder).language_model))


@pytest.mark.parametrize("differs", [False, True])
def test_a_tied_text_model_that_holds_a_head(differs, tmp_path):
    folder = lm_folder(tmp_path, "qwen2", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + np.float32(differs)
    save_file(tensors, folder / "model.safetensors")
    language = load_drafter(folder, targets("llava_next")).model.language_model
    assert (language.lm_head is not None) == differs


def test_published_heads_are_no_text_models(tmp_path):
    """They may call themselves `llama`, and leave out what would tell them apart."""
    folder = shutil.copytree(REFERENCE / "eagle2", tmp_path / "head")
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_q", "bias"):
        del config[key]
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = random_target(vocab_size=199, hidden_size=64)
    drafter, tree = load_drafter_folder(folder, model)
    assert type(drafter) is EagleHead and tree == TreeConfig(5, 10, 60)


def random_target(**text):
    config = transformers.LlamaConfig(**TEXT | text)
    family = family_of(config)
    return family.model(family.config_from_hf(config), rngs=nnx.Rngs(0))


PAIRS = {
    "Qwen/Qwen2.5-VL-7B-Instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "google/gemma-3-12b-it": "google/gemma-3-1b-it",
    "llava-hf/llava-1.5-7b-hf": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
}


def test_published_pairs_fit():
    """And nothing else of them does, since each family has a tokenizer of its own."""
    for target, own in PAIRS.items():
        raw = CONFIGS[target]
        hf_config = transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
        target_config = family_of(hf_config).config_from_hf(hf_config)
        for lm in PAIRS.values():
            config = MASSV.read_config(CONFIGS[lm])
            assert MASSV.read_config(json.loads(json.dumps(MASSV.write_config(config)))) == config
            assert bool(MASSV.misfits(config, target_config)) == (lm != own)


def refusal(folder: Path, target) -> str:
    with pytest.raises(ValueError) as caught:
        load_drafter(folder, target)
    return str(caught.value)


def test_refusals(tmp_path):
    target = targets("gemma3")
    vocab_size, width = target.config.text.vocab_size, target.config.vision_width
    folder = lm_folder(tmp_path, "gemma3_text", vocab_size=vocab_size + 65)
    message = refusal(folder, target)
    assert f"vocab_size {vocab_size + 65} (target: {vocab_size}, more than padding explains)" in message

    other = targets("qwen2_5_vl")
    draft_model = random_massv(other.model, "qwen2", True)
    save_drafter_folder(draft_model, "massv", TreeConfig.chain(5), other.model, tmp_path / "it", np.float32)
    message = refusal(tmp_path / "it", target)
    assert f"vision_width {other.config.vision_width} (target: {width})" in message
    assert "vision_width" in refusal(tmp_path / "it", targets("qwen2"))

    tensors = load_file(tmp_path / "it/model.safetensors")
    del tensors["projector.linear_2.bias"], tensors["language_model.model.norm.weight"]
    save_file(tensors, tmp_path / "it/model.safetensors")
    message = refusal(tmp_path / "it", other)
    assert "missing: projector.linear_2.bias (32,)" in message
    assert "missing: language_model.model.norm.weight (32,)" in message

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "phi"}))
    assert "model_type 'phi' is not supported as a drafter; only llama, mistral" in refusal(folder, target)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    """Whatever kind of tokenizer the file is of; added tokens may differ, and so may sizes."""
    theirs = targets("qwen2_5_vl").tokenizer
    ours = small_tokenizer()
    assert len(ours) < len(theirs)
    check_tokenizer(tmp_path, theirs)  # a folder that holds none
    ours.save_pretrained(tmp_path)
    check_tokenizer(tmp_path, theirs)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())

    def check(raw):
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        check_tokenizer(tmp_path, theirs)

    renamed = copy.deepcopy(raw)
    marks = renamed["added_tokens"]
    for mark in marks:
        token = mark["content"]
        mark["content"] = f"<|{token}|>"
        if token in renamed["model"]["vocab"]:
            renamed["model"]["vocab"][mark["content"]] = renamed["model"]["vocab"].pop(token)
    assert marks
    check(renamed)

    first, second = theirs.convert_ids_to_tokens([100, 200])
    raw["model"]["vocab"] |= {first: 200, second: 100}
    expected = f"drafter {tmp_path} has another tokenizer than the target: its token 100 is {second!r}, "
    expected += f"the target's is {first!r}"
    with pytest.raises(ValueError, match=re.escape(expected)):
        check(raw)
    raw["model"]["vocab"] = [[token, 0.0] for token in sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)]
    with pytest.raises(ValueError, match=re.escape(expected)):
        check(raw)


def test_a_text_model_with_another_tokenizer_is_refused_before_it_is_loaded(tmp_path):
    target = targets("qwen2_5_vl")
    folder = lm_folder(tmp_path, "qwen2", vocab_size=target.config.text.vocab_size)
    small_tokenizer().save_pretrained(folder)
    load_drafter(folder, target)
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"] |= dict(zip(target.tokenizer.convert_ids_to_tokens([100, 200]), (200, 100), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    for load in (lambda: load_drafter(folder, target), lambda: new_massv(target, folder, True)):
        with pytest.raises(ValueError, match="has another tokenizer than the target: its token 100 is"):
            load()
