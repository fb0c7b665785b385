"""SpecVLM's compressor against loops in numpy, on ragged batches of images; its gate, its folders, its recipes."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.drafters.compressor import MODES, PRIMITIVES, CompressorConfig
from jaxspec.drafters.contract import DrafterContext
from jaxspec.drafters.eagle import EagleConfig, EagleHead
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.specvlm import SpecVLMConfig, SpecVLMHead
from jaxspec.drafters.vispec import ViSpecConfig, ViSpecHead
from jaxspec.training import EagleRecipe, SpecVLMRecipe
from jaxspec.training.drafter import Teacher
from tests.helpers import randomized, tiny_llava

MODEL = tiny_llava(vocab_size=53, hidden_size=16, image_token_id=52)
TEXT = MODEL.config.text.plain()
SMALL = CompressorConfig(pruning_ratio=4, pooling_ratio=5, convolution_ratio=3, num_queries=2, gate_hidden_size=8)
LENGTH = 40
# Of each prompt: its length, and (first token, tokens) of its images.
PROMPTS = [(17, []), (33, [(4, 19)]), (40, [(0, 12), (14, 1)]), (30, [(3, 7), (10, 16)])]


def context_of(prompts, length=LENGTH, seeds=None) -> DrafterContext:
    """Random embeddings and features; what stands in a row depends on the prompt, not on the batch around it."""
    ids = np.full((len(prompts), length), -1, np.int32)
    embeds, features = np.zeros((2, len(prompts), length, TEXT.hidden_size), np.float32)
    for row, (size, images) in enumerate(prompts):
        rng = np.random.default_rng(size)
        embeds[row, :size], features[row, :size] = rng.normal(size=(2, size, TEXT.hidden_size))
        for number, (first, tokens) in enumerate(images):
            ids[row, first : first + tokens] = number
    lengths = np.array([size for size, _ in prompts], np.int32)
    return DrafterContext.of(
        embeds,
        features,
        image_ids=ids,
        lengths=lengths,
        seeds=seeds if seeds is not None else 7 + lengths,
        min_image_tokens=min(sum(tokens for _, tokens in images) for _, images in prompts),
    )


def head_of(mode: str, **changes) -> SpecVLMHead:
    """Every parameter random, biases too."""
    config = SpecVLMConfig(TEXT, compressor=dataclasses.replace(SMALL, mode=mode, **changes))
    head = randomized(SpecVLMHead(config, rngs=nnx.Rngs(1)), seed=3, scale=1.0)
    rng = np.random.default_rng(4)
    bias = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) if leaf.ndim == 1 else leaf  # noqa: E731
    nnx.update(head, jax.tree.map(bias, nnx.state(head)))
    return head


@jax.jit
def run(head, context, key):
    ended = jnp.arange(context.embeds.shape[1]) >= context.lengths[:, None] - 1  # no token follows
    return head.inputs_of(context, jnp.where(ended[..., None], 0, jnp.roll(context.embeds, -1, axis=1)), key)


def entries_of(head, context, key=None):
    """The entries that count, per prompt: positions, embeddings, features."""
    inputs = run(head, context, key)
    valid = np.asarray(inputs.valid)
    assert (np.sort(~valid, axis=1) == ~valid).all(), "valid entries come first"
    return [
        [np.asarray(part)[row, valid[row]] for part in (inputs.positions, inputs.embeds, inputs.features)]
        for row in range(len(valid))
    ]


# -- the same, written out ---------------------------------------------------------------------------------------------


def image_entries(prompt) -> list[list[int]]:
    """Entries of each image; entry i stands for token i + 1, so the first token of a prompt has none."""
    spans = [[token - 1 for token in range(first, first + tokens) if token > 0] for first, tokens in prompt[1]]
    return [span for span in spans if span]


def linear_of(module, x):
    return x @ np.asarray(module.kernel[...]) + np.asarray(module.bias[...])


def attended(adaptor, embeds):
    """Vectors `[q, D]` of one image's embeddings `[M, D]`."""
    num_q, heads, head_dim = adaptor.q.shape
    keys, values = ((embeds @ np.asarray(proj.kernel[...])) for proj in (adaptor.k_proj, adaptor.v_proj))
    mixed = np.zeros((num_q, heads * head_dim), np.float32)
    for query in range(num_q):
        for head in range(heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            scores = keys[:, part] @ np.asarray(adaptor.q[...])[query, head] / head_dim**0.5
            weights = np.exp(scores - scores.max())
            mixed[query, part] = weights @ values[:, part] / weights.sum()
    return mixed @ np.asarray(adaptor.o_proj.kernel[...])


def expected_groups(primitive, head, span, embeds, features, ratio, kept):
    """(position, embedding, feature) of each group of one image."""
    runs = [span[start : start + ratio] for start in range(0, len(span), ratio)]
    match primitive:
        case "pruning":
            return [(entry, embeds[entry], features[entry]) for entry in kept]
        case "pooling":
            return [(run[-1], embeds[run].mean(0), features[run].mean(0)) for run in runs]
        case "convolution":
            both = head.compressor.convolution.embeds, head.compressor.convolution.features

            def mixed(module, x, run):
                return linear_of(module, np.concatenate([x[run].ravel(), np.zeros((ratio - len(run)) * x.shape[1])]))

            return [(run[-1], mixed(both[0], embeds, run), mixed(both[1], features, run)) for run in runs]
        case "resampler":
            vectors = attended(head.compressor.resampler, embeds[span])
            return [(span[-1], vector, features[span].mean(0)) for vector in vectors]
        case "text_only":
            return []


def expected_entries(head, prompt, embeds, features, pruned):
    """All entries of one prompt; `pruned` are those of images that the random subset may have kept."""
    config = head.config.compressor
    spans = image_entries(prompt)
    embeds = np.append(embeds[1:], np.zeros_like(embeds[:1]), axis=0)
    embeds[prompt[0] - 1] = 0
    groups = {name: [] for name in config.primitives}
    for name in config.primitives:
        ratio = config.ratio(name) if name in ("pruning", "pooling", "convolution") else 1
        for span in spans:
            kept = [entry for entry in span if entry in pruned]
            groups[name] += expected_groups(name, head, span, embeds, features, ratio, kept)
    inside = {entry for span in spans for entry in span}
    entries = [(entry, embeds[entry], features[entry]) for entry in range(prompt[0]) if entry not in inside]
    if config.mode == "weighted":
        logits = gate_logits(head, features[prompt[0] - 1])
        weights = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        for parts in zip(*groups.values(), strict=True):
            mixed = [sum(w * part[k] for w, part in zip(weights, parts, strict=True)) for k in (1, 2)]
            entries.append((parts[-1][0], *mixed))
    else:
        made = [group for name in config.primitives for group in groups[name]]
        entries += made[: len(inside)]  # a prompt has no room for more
    order = sorted(range(len(entries)), key=lambda index: (entries[index][0], index))
    return [np.stack([entries[index][k] for index in order]) for k in range(3)]


def gate_logits(head, feature):
    hidden = linear_of(head.compressor.gate.hidden, feature)
    return linear_of(head.compressor.gate.output, hidden / (1 + np.exp(-hidden)))


def kept_by_pruning(head, context) -> list[set[int]]:
    """Entries of images that a head with the same ratio and nothing but pruning keeps."""
    ratio = head.config.compressor.ratio("pruning")
    alone = entries_of(head_of("pruning", pruning_ratio=ratio), context)
    return [set(positions.tolist()) for positions, _, _ in alone]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "select"])
def test_entries_equal_a_loop(mode):
    head, context = head_of(mode), context_of(PROMPTS)
    pruned = kept_by_pruning(head, context)
    for index, (prompt, got) in enumerate(zip(PROMPTS, entries_of(head, context), strict=True)):
        arrays = np.asarray(context.embeds[index]), np.asarray(context.features[index])
        expected = expected_entries(head, prompt, *arrays, pruned[index])
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_allclose(got[1], expected[1], atol=2e-5)
        np.testing.assert_allclose(got[2], expected[2], atol=2e-5)


@pytest.mark.parametrize("ratio", [1, 4, 30])
def test_pruning_keeps_a_random_subset_of_each_image(ratio):
    head = head_of("pruning", pruning_ratio=ratio)
    drawn = []
    for seed in range(3):
        context = context_of(PROMPTS, seeds=[seed] * len(PROMPTS))
        kept = entries_of(head, context)
        for prompt, (positions, _, _) in zip(PROMPTS, kept, strict=True):
            for span in image_entries(prompt):
                assert len(set(span) & set(positions.tolist())) == -(-len(span) // ratio)
        drawn.append([positions.tolist() for positions, _, _ in kept])
    assert (drawn[0] == drawn[1] == drawn[2]) == (ratio == 1)


def test_every_token_is_as_likely_to_be_kept():
    count = 400
    context = context_of([(24, [(2, 20)])] * count, length=24, seeds=np.arange(count))
    kept = np.zeros(24)
    for positions, _, _ in entries_of(head_of("pruning", pruning_ratio=4), context):
        kept[positions] += 1
    share = kept[1:21] / count
    assert kept[1:21].sum() == 5 * count
    assert np.abs(share - 0.25).max() < 0.08  # 3.7 standard deviations


@pytest.mark.parametrize("mode", ["select", "weighted", "concat"])
def test_a_request_has_the_same_entries_alone_and_in_a_batch(mode):
    head = head_of(mode)
    expected = entries_of(head, context_of(PROMPTS))[1]
    alone = entries_of(head, context_of(PROMPTS[1:2], length=36))[0]
    np.testing.assert_array_equal(alone[0], expected[0])
    np.testing.assert_allclose(alone[1], expected[1], atol=2e-5)
    np.testing.assert_allclose(alone[2], expected[2], atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_groups_never_mix_images(mode):
    """Another first image changes nothing in what stands for the second one."""
    head, context = head_of(mode), context_of(PROMPTS)
    other = dataclasses.replace(
        context, embeds=context.embeds.at[3, 3:10].add(1), features=context.features.at[3, 2:9].add(1)
    )
    first, second = entries_of(head, context)[3], entries_of(head, other)[3]
    np.testing.assert_array_equal(first[0], second[0])
    behind = first[0] >= 9
    for one, two in zip(first[1:], second[1:], strict=True):
        np.testing.assert_array_equal(one[behind], two[behind])
    assert mode == "text_only" or behind.sum() > 4


@pytest.mark.parametrize("mode", ["pruning", "concat", "vispec"])
@pytest.mark.parametrize("images", [[(0, 32)], [(0, 2), (2, 1), (3, 29)]])
def test_no_entry_is_cut_where_images_begin_the_prompt(mode, images):
    """The tightest case: no padding, and all image tokens known."""
    head = ViSpecHead(ViSpecConfig(TEXT), rngs=nnx.Rngs(0)) if mode == "vispec" else head_of(mode)
    positions, _, _ = entries_of(head, context_of([(LENGTH, images)]))[0]
    assert set(range(31, LENGTH)) <= set(positions.tolist())


# -- the gate ----------------------------------------------------------------------------------------------------------


def with_choice(head, primitive):
    """The same head, whose gate always prefers one primitive."""
    bias = 1e4 * np.eye(len(PRIMITIVES), dtype=np.float32)[PRIMITIVES.index(primitive)]
    graph, state = nnx.split(head)
    head = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    head.compressor.gate.output.bias[...] = jnp.asarray(bias)
    return head


@pytest.mark.parametrize("primitive", PRIMITIVES)
def test_select_equals_the_head_of_the_chosen_primitive(primitive):
    context = context_of(PROMPTS)
    chooser, single = with_choice(head_of("select"), primitive), head_of(primitive)
    shared = nnx.to_flat_state(nnx.state(chooser))
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(single))}
    nnx.update(single, nnx.from_flat_state([(path, leaf) for path, leaf in shared if path in paths]))
    for key in (None, jax.random.key(0)):  # and in training, the forward value is the hard choice's
        for got, expected in zip(entries_of(chooser, context, key), entries_of(single, context), strict=True):
            for one, two in zip(got, expected, strict=True):
                np.testing.assert_array_equal(one, two)


def test_the_gate_chooses_per_request_by_its_question():
    head, context, chosen = head_of("select"), context_of(PROMPTS), set()
    sizes = dict(zip(PRIMITIVES, (5, 4, 7, 2, 0), strict=True))  # of 19 tokens
    for seed in range(10):
        questions = np.random.default_rng(seed).normal(size=(len(PROMPTS), TEXT.hidden_size)).astype(np.float32)
        features = context.features.at[jnp.arange(len(PROMPTS)), context.lengths - 1].set(questions)
        choice = PRIMITIVES[gate_logits(head, questions[1]).argmax()]
        positions, _, _ = entries_of(head, dataclasses.replace(context, features=features))[1]
        assert len(positions) - 14 == sizes[choice]
        chosen.add(choice)
    assert len(chosen) > 2


def test_a_fresh_gate_draws_all_primitives_in_training():
    fresh = SpecVLMHead(SpecVLMConfig(TEXT, compressor=SMALL), rngs=nnx.Rngs(0))
    draws = [entries_of(fresh, context_of(PROMPTS), jax.random.key(seed))[1][0] for seed in range(24)]
    assert len({len(positions) for positions in draws}) == len(PRIMITIVES)


@pytest.mark.parametrize("mode", ["select", "weighted"])
def test_the_loss_teaches_every_parameter(mode):
    count, head = 24, head_of(mode)
    head.compressor.gate.output.kernel[...] *= 0.01  # undecided, so that all primitives are drawn
    head.compressor.gate.output.bias[...] *= 0
    recipe = SpecVLMRecipe(name="test", compressor=head.config.compressor)
    answer = np.zeros((count, LENGTH), bool)
    answer[:, 25:33] = True
    context = dataclasses.replace(context_of(PROMPTS[1:2] * count), prompt_lengths=jnp.full(count, 25))

    @jax.jit
    def gradients(head, model):
        return nnx.grad(lambda head: recipe.loss(head, model, Teacher(context, answer), jax.random.key(5))[0])(head)

    for path, gradient in nnx.to_flat_state(gradients(head, MODEL)):
        assert np.isfinite(gradient[...]).all() and np.abs(gradient[...]).max() > 0, path


def test_a_fresh_convolution_pools():
    changes = {"pooling_ratio": 3, "convolution_ratio": 3}
    compressors = [dataclasses.replace(SMALL, mode=mode, **changes) for mode in ("pooling", "convolution")]
    heads = [SpecVLMHead(SpecVLMConfig(TEXT, compressor=each), rngs=nnx.Rngs(0)) for each in compressors]
    pooled, mixed = (entries_of(head, context_of([(33, [(4, 18)])]))[0] for head in heads)
    for one, two in zip(pooled, mixed, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


# -- folders, configs, recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_folders_round_trip(mode, tmp_path):
    head = head_of(mode, shared_ratio=2, gate_temperature=0.5)
    save_drafter_folder(head, "specvlm", METHODS["specvlm"].tree, MODEL, tmp_path / "head", np.float32)
    assert_same(head, *load_drafter_folder(tmp_path / "head", MODEL))


def test_eaglevlm_folders_round_trip(tmp_path):
    head = randomized(EagleHead(EagleConfig(TEXT, input_norm=True), rngs=nnx.Rngs(0)), seed=1, scale=1.0)
    save_drafter_folder(head, "eaglevlm", METHODS["eaglevlm"].tree, MODEL, tmp_path / "head", np.float32)
    assert json.loads((tmp_path / "head/config.json").read_text())["input_norm"] is True
    assert_same(head, *load_drafter_folder(tmp_path / "head", MODEL))


def assert_same(head, again, tree):
    assert again.config == head.config
    assert (tree.depth, tree.top_k, tree.total_tokens) == (7, 10, 60)  # arXiv 2509.11815
    ours, theirs = (dict(nnx.to_flat_state(nnx.state(each))) for each in (head, again))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf[...], theirs[path][...])


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_has_the_parameters_it_needs(mode):
    head = head_of(mode)
    wanted = {"convolution", "resampler"} & set(MODES[mode]) | ({"gate"} if mode in ("select", "weighted") else set())
    assert {path[1] for path, _ in nnx.to_flat_state(nnx.state(head)) if path[0] == "compressor"} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "mean"}, "mode 'mean' is not known; known: select, weighted, concat, pruning"),
        ({"pruning_ratio": 0}, "pruning_ratio must be an integer of at least 1, got 0"),
        ({"pooling_ratio": 2.5}, "pooling_ratio must be an integer of at least 1, got 2.5"),
        ({"convolution_ratio": 6}, "convolution_ratio must be at most 5, .* got 6"),
        ({"shared_ratio": 20}, "shared_ratio must be at most 5, .* got 20"),
        ({"num_queries": 0}, "num_queries must be an integer of at least 1, got 0"),
        ({"gate_temperature": 0.0}, "gate_temperature must be above 0, got 0.0"),
    ],
)
def test_impossible_compressors(changes, message):
    with pytest.raises(ValueError, match=message):
        CompressorConfig(**changes)


def test_unknown_keys_of_a_folder_are_named(tmp_path):
    save_drafter_folder(head_of("pooling"), "specvlm", METHODS["specvlm"].tree, MODEL, tmp_path / "head", np.float32)
    path = tmp_path / "head/config.json"
    config = json.loads(path.read_text())
    config["compressor"]["stride"] = 2
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="compressor has no stride; it has mode, pruning_ratio"):
        load_drafter_folder(tmp_path / "head", MODEL)


def test_recipes_refuse_what_they_do_not_train():
    with pytest.raises(ValueError, match="method of EagleRecipe must be one of eagle2, eaglevlm, got 'specvlm'"):
        EagleRecipe(name="test", method="specvlm")
    with pytest.raises(ValueError, match="mtp_steps must be 0 for SpecVLM"):
        SpecVLMRecipe(name="test", mtp_steps=1)


CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.mark.parametrize("name", ["demo_eaglevlm", "demo_specvlm", "specvlm_llava15_7b", "specvlm_llava15_13b"])
def test_configs_hold_the_published_loss(name):
    recipe = runpy.run_path(str(CONFIGS / f"{name}.py"))["recipe"]
    assert recipe.name == name
    assert (recipe.feature_weight, recipe.soft_cross_entropy_weight) == (1.0, 0.1)
    assert not any((recipe.probability_l1_weight, recipe.ranking_weight, recipe.mtp_steps, recipe.feature_noise))
    assert (recipe.warmup_steps, recipe.weight_decay, recipe.adam_b2) == (0, 0.0, 0.95)
    assert recipe.head_config(TEXT).input_norm
