"""The loss of EAGLE-like heads by its definition: run by run, entry by entry, in numpy, from what head and target say;
and two steps of one on a family with positions of its own."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import jaxspec
from benchmarks.random_target import QWEN_TEMPLATE
from jaxspec.checkpoints.names import parameter_paths
from jaxspec.drafters.compressor import CompressorConfig
from jaxspec.drafters.contract import DrafterContext
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.sequence import HeadInputs
from jaxspec.drafters.vocabulary import take_from_target
from jaxspec.targets.registry import save_model
from jaxspec.training import EagleRecipe, SpecVLMRecipe, ViSpecRecipe, run
from jaxspec.training.drafter import Teacher
from tests.families import FAMILIES, family_target
from tests.helpers import randomized, tiny_llava

WIDTH, VOCAB, LENGTH = 16, 23, 14
MODEL = tiny_llava(vocab_size=VOCAB, hidden_size=WIDTH, image_token_id=VOCAB - 1, layers=2)
NARROW = np.flatnonzero(np.arange(VOCAB) % 3 > 0).astype(np.int32)
LENGTHS = (14, 11, 9, 12)
SPANS = (((3, 6), (9, 14)), ((5, 14),), ((2, 3), (6, 7)), ())
"""Answers of each row: of several turns up to the end of the array; with the padding marked, too; of one token each,
which leave nothing to draft; none."""
IMAGES = (((0, 3), (6, 3)), ((0, 2), (3, 2)), (), ((2, 5),))
"""First token and tokens of each row's images, for the methods that replace them."""
RECIPES = {
    "eagle2": EagleRecipe(name=""),
    "eaglevlm": EagleRecipe(name="", method="eaglevlm"),
    "tapped": EagleRecipe(name="", tap_layers=(1, 0)),
    "narrow": EagleRecipe(name="", draft_vocab_size=len(NARROW)),
    "vispec": ViSpecRecipe(name="", num_q=3),
    "specvlm": SpecVLMRecipe(name="", compressor=CompressorConfig("pooling", pooling_ratio=2)),
}
PARTS = {
    "feature": "feature_weight",
    "soft_ce": "soft_cross_entropy_weight",
    "prob_l1": "probability_l1_weight",
    "rank": "ranking_weight",
    "rejected": "acceptance_weight",
}
TOLD = ("feature", "soft_ce", "prob_l1", "rank", "agreement")
SILENT = {"feature_noise": 0.0} | dict.fromkeys(PARTS.values(), 0.0)


@functools.cache
def head_of(name: str) -> nnx.Module:
    recipe = RECIPES[name]
    config = recipe.head_config(MODEL.config.text.plain())
    head = METHODS[recipe.method].module(config, rngs=nnx.Rngs(0))
    head = randomized(head, seed=1, scale=1.0)
    if name == "narrow":
        take_from_target(head.draft_head, MODEL, NARROW)
        head.draft_head.kernel[...] *= jnp.linspace(0.5, 1.5, len(NARROW))  # it has learnt
    return head


def teacher_of(name: str) -> Teacher:
    """Random embeddings and features, in the padding too."""
    rng, images = np.random.default_rng(3), name in ("vispec", "specvlm")
    ids, answer = np.full((4, LENGTH), -1, np.int32), np.zeros((4, LENGTH), bool)
    for row in range(4):
        for start, stop in SPANS[row]:
            answer[row, start:stop] = True
        for number, (first, tokens) in enumerate(IMAGES[row] if images else ()):
            ids[row, first : first + tokens] = number
    lengths = np.array(LENGTHS)
    context = DrafterContext.of(
        rng.normal(size=(4, LENGTH, WIDTH)).astype(np.float32),
        rng.normal(size=(4, LENGTH, (3 if name == "tapped" else 1) * WIDTH)).astype(np.float32),
        image_ids=ids,
        lengths=lengths,
        prompt_lengths=lengths - 5,
        seeds=np.arange(4),
    )
    return Teacher(context, jnp.asarray(answer))


def inputs_of(name: str, context: DrafterContext) -> HeadInputs:
    """Of a method that reads all tokens one by one; of those that replace images what the method itself makes, which is
    tested where the method is."""
    head, embeds = head_of(name), np.asarray(context.embeds)
    following = np.zeros_like(embeds)
    following[:, :-1] = embeds[:, 1:]
    if context.max_images:
        return jax.jit(lambda head: head.inputs_of(context, jnp.asarray(following)))(head)
    features = np.asarray(context.features)
    if name == "tapped":
        features = features @ np.asarray(head.tap_fc.kernel[...])
    positions = np.tile(np.arange(LENGTH), (4, 1))
    valid = positions < np.array(LENGTHS)[:, None]
    return HeadInputs(*map(jnp.asarray, (following, features, positions, valid)))


# -- the definition ----------------------------------------------------------------------------------------------------


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def smooth_l1(output, feature):
    error = np.abs(output - feature)
    return np.mean([0.5 * each**2 if each < 1 else each - 0.5 for each in error])


def ranking(logits, target_logits):
    """Negative Plackett-Luce log-likelihood of the target's ten best, best first."""
    z = logits[np.argsort(-target_logits, kind="stable")[:10]]
    return -sum(z[j] - np.log(np.exp(z[j:]).sum()) for j in range(10))


def defined(name: str, teacher: Teacher, runs: int, noise=0.0) -> dict[str, list]:
    """Each part of the loss `[runs]`, but of the acceptance `[1]`; `noise` is added to the first run's features."""
    head, (context, answer) = head_of(name), teacher
    sequence = inputs_of(name, context)
    positions, valid, answer = np.asarray(sequence.positions), np.asarray(sequence.valid), np.asarray(answer)
    final = np.asarray(context.features)[..., -WIDTH:]
    target_logits = np.asarray(MODEL.unembed(final), np.float64)
    ids = NARROW if name == "narrow" else np.arange(VOCAB)
    counted = [
        (b, r)
        for b in range(4)
        for r, at in enumerate(positions[b])
        if valid[b, r] and at + 2 < LENGTHS[b] and answer[b, at + 1] and answer[b, at + 2]
    ]

    @jax.jit
    def run_head(head, inputs):
        output, _ = head.forward(sequence, inputs)
        return output, head.logits(MODEL, output)

    true = np.asarray(sequence.features)
    inputs, parts, accepted = true + noise, {part: [] for part in TOLD}, []
    for _ in range(runs):
        output, logits = (np.asarray(each, np.float64) for each in run_head(head, jnp.asarray(inputs, jnp.float32)))
        values, matched = {part: [] for part in parts}, {}
        for b, r in counted:
            feature, label = final[b, positions[b, r] + 1], target_logits[b, positions[b, r] + 1]
            p, q = softmax(label[ids]), softmax(logits[b, r])
            values["feature"].append(smooth_l1(output[b, r], feature))
            values["soft_ce"].append(-p @ np.log(q))
            values["prob_l1"].append(np.abs(p - q).sum())
            values["rank"].append(ranking(logits[b, r], label[ids]))
            values["agreement"].append(ids[q.argmax()] == label.argmax())
            matched[b, r] = np.minimum(p, q).sum()
        accepted.append(matched)
        for part, each in values.items():
            parts[part].append(np.mean(each))
        inputs = true.copy()
        for b in range(4):
            for r in range(1, inputs.shape[1]):
                inputs[b, r] = output[b, r - 1]
    shares = []
    for b, r in counted:  # a draft that begins here: its k-th token is drafted k entries later by the k-th run
        reached = 1.0
        for k in range(runs):
            reached *= accepted[k].get((b, r + k), 0.0)
            shares.append(reached)
    return parts | {"rejected": [1 - np.mean(shares)]}


# -- compared ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        *(("eagle2", 0), ("eagle2", 1), ("eagle2", 2), ("eaglevlm", 0), ("tapped", 1), ("narrow", 1)),
        *(("vispec", 0), ("vispec", 1), ("specvlm", 0)),
    ],
)
def test_loss_is_its_definition(name, steps):
    """With each weight alone, and with all of them: means over the entries that count, then over the runs."""
    teacher, recipe = teacher_of(name), dataclasses.replace(RECIPES[name], mtp_steps=steps, **SILENT)
    weights = [{field: 0.7} for field in PARTS.values()] + [dict(zip(PARTS.values(), (1, 2, 3, 4, 5), strict=True))]
    recipes = [dataclasses.replace(recipe, **each) for each in weights]

    @jax.jit
    def losses(head):
        return [each.loss(head, MODEL, teacher, jax.random.key(0)) for each in recipes]

    results, expected = losses(head_of(name)), defined(name, teacher, steps + 1)
    means = {part: np.mean(expected[part]) for part in PARTS}
    assert min(means.values()) > 0.05
    for (loss, _), part in zip(results, PARTS, strict=False):
        np.testing.assert_allclose(loss, 0.7 * means[part], rtol=1e-5)
    loss, metrics = results[-1]
    np.testing.assert_allclose(loss, sum(w * means[part] for w, part in enumerate(PARTS, 1)), rtol=1e-5)
    for part in TOLD:
        told = [metrics[f"{part}_{number}"] for number in range(1, steps + 2)]
        np.testing.assert_allclose(told, expected[part], rtol=1e-5)
    np.testing.assert_allclose(metrics["expected_length"], 1 + (steps + 1) * (1 - means["rejected"]), rtol=1e-5)


class Recording:
    """A head that keeps what it is given to read."""

    def __init__(self, head):
        self.head, self.inputs = head, []

    def __getattr__(self, name):
        return getattr(self.head, name)

    def forward(self, inputs, features):
        self.inputs.append(features - inputs.features)
        return self.head.forward(inputs, features)


@pytest.mark.parametrize("name", ["eagle2", "tapped"])
def test_noise_is_uniform_on_the_features_of_the_first_run(name):
    teacher, recipe = teacher_of(name), dataclasses.replace(RECIPES[name], mtp_steps=1, **SILENT)
    recipe = dataclasses.replace(recipe, feature_noise=0.01, feature_weight=1.0, soft_cross_entropy_weight=1.0)

    @jax.jit
    def noisy(head, key):
        head = Recording(head)
        loss, _ = recipe.loss(head, MODEL, teacher, key)
        return loss, head.inputs

    loss, (noise, later) = noisy(head_of(name), jax.random.key(0))
    amplitude = 0.01 * 512 / LENGTH
    assert noise.shape == (4, LENGTH, WIDTH)
    assert np.abs(noise).max() < 1.0001 * amplitude
    uniform = np.linspace(-amplitude, amplitude, noise.size)
    np.testing.assert_allclose(np.sort(noise, axis=None), uniform, atol=0.1 * amplitude)
    np.testing.assert_array_equal(later[:, 0], 0)
    expected = defined(name, teacher, 2, np.asarray(noise))  # the labels have none
    np.testing.assert_allclose(loss, np.mean(expected["feature"]) + np.mean(expected["soft_ce"]), rtol=1e-5)
    other, (another, _) = noisy(head_of(name), jax.random.key(1))
    assert np.abs(noise - another).max() > amplitude and other != loss


def test_nothing_to_learn_from_is_no_loss():
    context, answer = teacher_of("eagle2")
    teacher, recipe = Teacher(context, jnp.zeros_like(answer)), EagleRecipe(name="", probability_l1_weight=1.0)
    loss, _ = jax.jit(lambda head: recipe.loss(head, MODEL, teacher, jax.random.key(0)))(head_of("eagle2"))
    assert loss == 0


def test_a_vispec_head_learns_from_qwens_images(tmp_path):
    """From files to a folder: images of several sizes, positions that are the target's own."""
    hf_config, processor = FAMILIES["qwen2_5_vl"]()
    processor.tokenizer.chat_template = QWEN_TEMPLATE
    (tmp_path / "processor").mkdir()
    processor.tokenizer.save_pretrained(tmp_path / "processor")
    processor.image_processor.save_pretrained(tmp_path / "processor")
    model = family_target("qwen2_5_vl").model
    save_model(model, hf_config, tmp_path / "processor", tmp_path / "target", jnp.float32)
    records, rng = [], np.random.default_rng(0)
    for number, size in enumerate([(40, 60), (64, 24), (30, 30), (64, 64), (16, 48)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise, all of it."}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "set.json").write_text(json.dumps(records))
    recipe = ViSpecRecipe(
        name="head",
        run_dir=str(tmp_path),
        target=str(tmp_path / "target"),
        conversations=str(tmp_path / "set.json"),
        validation_records=2,
        steps=2,  # the vision adaptor of a fresh head does nothing yet: it learns from the second one on
        warmup_steps=0,
        log_every=1,
        batch_size=3,
        sequence_length=96,
        save_dtype="float32",
    )
    before = recipe.new_draft_model(target := jaxspec.load_target(recipe.target))
    run(recipe)
    log = [json.loads(line) for line in (tmp_path / "head/log.jsonl").read_text().splitlines()]
    steps = [line for line in log if line["split"] == "train"]
    assert len(steps) == 2 and all(np.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    after = jaxspec.load_drafter(recipe.export_folder, target)
    assert after.about["mean_acceptance_length"] >= 1
    old, new = (parameter_paths(each) for each in (before, after.model))
    for path, value in new.items():
        assert np.isfinite(value).all(), path
        assert value.ndim == 1 or not np.array_equal(value, old[path]), path
