"""Training Medusa heads: the loss by its definition, and a short run whose heads change no answer."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxspec
from jaxspec.drafters.contract import DrafterContext
from jaxspec.training import MedusaRecipe, run
from jaxspec.training.drafter import Teacher
from tests.helpers import answer_scenes, randomized, tiny_llava


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


@dataclasses.dataclass(frozen=True)
class ModelOnly:
    """As much of a target as `new_draft_model` looks at."""

    model: nnx.Module

    @property
    def config(self):
        return self.model.config


def test_loss_is_its_definition():
    """Head by head and position by position; one answer of several turns, one cut short, one row without any."""
    model = tiny_llava(vocab_size=13, hidden_size=16, image_token_id=12, layers=1)
    recipe = MedusaRecipe(name="", num_heads=3, depth=1, top_k=2, total_tokens=4)
    heads = randomized(recipe.new_draft_model(ModelOnly(model)), seed=2, scale=2.0)
    batch, length = 3, 12
    features = np.random.default_rng(0).normal(size=(batch, length, 16)).astype(np.float32)
    answer = np.zeros((batch, length), bool)
    answer[0, 2:5] = answer[0, 7:12] = answer[1, 3:8] = True
    lengths = jnp.array([12, 8, 6])
    context = DrafterContext.of(features=features, lengths=lengths)
    total, metrics = jax.jit(
        lambda heads: recipe.loss(heads, model, Teacher(context, jnp.asarray(answer)), jax.random.key(0))
    )(heads)

    target_logits = np.asarray(model.unembed(features))
    expected = 0.0
    for number in range(1, 4):
        drafted = np.asarray(heads.logits(model, jnp.asarray(features), number))
        losses, agreed = [], []
        for row in range(batch):
            for i in range(length - 1 - number):
                if answer[row, i + 1 : i + 2 + number].all():  # from the root, i + 1, to what is foreseen
                    label = softmax(target_logits[row, i + number])
                    losses.append(-label @ np.log(softmax(drafted[row, i])))
                    agreed.append(drafted[row, i].argmax() == label.argmax())
        np.testing.assert_allclose(metrics[f"soft_ce_{number}"], np.mean(losses), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"agreement_{number}"], np.mean(agreed), rtol=1e-5)
        expected += 0.8**number * np.mean(losses)
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_tree_deeper_than_the_heads_is_refused_before_training():
    model = tiny_llava(vocab_size=13, hidden_size=16, image_token_id=12, layers=1)
    with pytest.raises(ValueError, match="5 tokens ahead, .* only 3 Medusa heads"):
        MedusaRecipe(name="", num_heads=3).new_draft_model(ModelOnly(model))


def test_heads_learn_and_change_no_answer(target, tmp_path):
    where = {"run_dir": str(tmp_path), "target": str(target.path)}
    answer_scenes(target.path, tmp_path / "answers", 8)
    recipe = MedusaRecipe(
        name="medusa", answers_dir=str(tmp_path / "answers"), steps=6, batch_size=4, sequence_length=128,
        validation_records=4, learning_rate=1e-2, warmup_steps=1, log_every=1, eval_every=6, num_heads=3, depth=2,
        total_tokens=6, **where,
    )  # fmt: skip
    run(recipe)
    log = [json.loads(line) for line in (tmp_path / "medusa/log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if entry["split"] == "train"]
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
    assert {"agreement_1", "agreement_2", "agreement_3"} <= set(steps[-1])

    drafter = jaxspec.load_drafter(tmp_path / "medusa/export", target)
    assert (drafter.method, drafter.tree) == ("medusa", recipe.tree)
    assert drafter.about["target_fingerprint"] == target.fingerprint()
    assert drafter.about["mean_acceptance_length"] >= 1
    expected = jaxspec.Generator(target).generate("What is this?", max_new_tokens=16)
    result = jaxspec.Generator(target, drafter).generate("What is this?", max_new_tokens=16)
    np.testing.assert_array_equal(result.tokens, expected.tokens)

    more = dataclasses.replace(recipe, num_heads=4, init_from=str(tmp_path / "medusa/export")).new_draft_model(target)
    for index, head in enumerate(more.heads):
        kernel = head[0].linear.kernel[...]
        np.testing.assert_array_equal(kernel, drafter.model.heads[index][0].linear.kernel[...] if index < 3 else 0)
