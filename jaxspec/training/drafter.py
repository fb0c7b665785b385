"""Training EAGLE-2 and ViSpec heads on a target's own answers, with the losses of their published recipes.

Per step the frozen target runs once (features and logits are never stored) and the head `mtp_steps + 1` times: each
further run reads the head's own outputs of the run before, shifted by one, as it will when drafting (ViSpec 3.4).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import jaxspec
from jaxspec.data.answers import AnswerEncoder, AnswerSource
from jaxspec.data.pipeline import Pipeline
from jaxspec.data.scenes import load_scenes
from jaxspec.drafters.checkpoint import METHODS, load_drafter_folder, save_drafter_folder
from jaxspec.drafters.drafter import Drafter
from jaxspec.drafters.eagle import EagleConfig
from jaxspec.drafters.vispec import ViSpecConfig
from jaxspec.metrics import Acceptance, pooled
from jaxspec.speculation.loop import DrafterContext
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.images import uniform_images
from jaxspec.training.losses import masked_mean, probability_l1, ranking, smooth_l1, soft_cross_entropy
from jaxspec.training.recipe import Recipe, Task


@dataclasses.dataclass(frozen=True)
class DrafterRecipe(Recipe):
    """A draft head for a trained target."""

    method: str = "vispec"
    target: str = "runs/demo_target/export"
    answers_dir: str = "runs/demo_answers"
    dataset_dir: str = "runs/data"
    dataset_size: int = 40000
    validation_records: int = 128
    """The first answers of the set are held out."""
    init_from: str | None = None
    """A head to start from; parameters it lacks (ViSpec's adaptor) start fresh."""
    num_q: int = 2
    mtp_steps: int = 1
    feature_noise: float = 0.0
    """Uniform noise on the input features has amplitude `feature_noise * 512 / sequence length` (EAGLE: 0.1)."""
    feature_weight: float = 0.0
    soft_cross_entropy_weight: float = 0.0
    probability_l1_weight: float = 10.0
    ranking_weight: float = 0.1
    depth: int = 4
    top_k: int = 3
    total_tokens: int = 8
    """The tree that the exported folder recommends."""
    acceptance_prompts: int = 16
    """Held-out questions that the trained head drafts for at temperature 0; what it accepted stands in its folder."""
    save_dtype: str = "float16"

    @property
    def tree(self) -> TreeConfig:
        return TreeConfig(self.depth, self.top_k, self.total_tokens)


def drafter_task(recipe: DrafterRecipe) -> Task:
    """Self-distilled answers, the frozen target, and a fresh or continued head."""
    target = jaxspec.load_target(recipe.target)
    head = new_head(recipe, target)
    graph, params = nnx.split(head)
    target_graph, target_params = nnx.split(target.model)
    pictures = load_scenes(recipe.dataset_dir, "train", train_size=recipe.dataset_size)
    answers = AnswerSource(Path(recipe.answers_dir), pictures)
    encoder = AnswerEncoder(target.processor)

    def pipeline(records, shuffle: bool) -> Pipeline:
        return Pipeline(
            records,
            encoder,
            sequence_length=recipe.sequence_length,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            shuffle=shuffle,
        )

    held_out = min(recipe.validation_records, len(answers) // 2)
    training = pipeline(Span(answers, held_out, len(answers)), True)
    validation = pipeline(Span(answers, 0, held_out), False)

    def loss(params, target_params, batch, key):
        return head_loss(recipe, nnx.merge(graph, params), nnx.merge(target_graph, target_params), batch, key)

    about = {
        "recipe": recipe.name,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "target_fingerprint": target.fingerprint(),
    }

    def export(params, folder: Path) -> None:
        trained, recorded = nnx.merge(graph, params), {}
        records = [answers[index] for index in range(min(recipe.acceptance_prompts, held_out))]
        if records:
            drafter = Drafter(trained, recipe.tree, recipe.method, {})
            accepted = measured_acceptance(target, drafter, records, pictures)
            length, positions = accepted.mean_acceptance_length, accepted.acceptance_at_position
            recorded = {"mean_acceptance_length": length, "acceptance_at_position": positions}
            shares = " ".join(f"{share:.2f}" for share in positions)
            print(f"{recipe.name}: mean acceptance length {length:.2f}, accepted at each position: {shares}")
        save_drafter_folder(trained, recipe.tree, target.model, folder, recipe.save_dtype, about | recorded)

    return Task(
        params=params,
        constants=target_params,
        loss=loss,
        batches=training.batches,
        validation=lambda: (
            validation[index] for index in range(min(recipe.eval_batches, held_out // recipe.batch_size))
        ),
        export=export,
    )


def measured_acceptance(target, drafter: Drafter, records: Sequence[dict], pictures: Sequence[dict]) -> Acceptance:
    """What the drafter's greedy drafts earn on the questions of `records`, over all rounds of all of them."""
    generator = jaxspec.Generator(target, drafter)
    scenes = [pictures[int(record["picture"])] for record in records]
    questions = [scene["conversations"][0]["value"].removeprefix("<image>\n") for scene in scenes]
    limit = max(len(record["answer_ids"]) for record in records)
    results = generator.generate_batch(questions, [scene["images"] for scene in scenes], max_new_tokens=limit)
    return pooled([result.stats for result in results])


def new_head(recipe: DrafterRecipe, target):
    """A head of the target's shape, or that of `init_from` with what it lacks."""
    text = dataclasses.replace(target.config.text, num_layers=1, tie_word_embeddings=False)
    common = {"text": text, "qkv_bias": text.qkv_bias}  # as in the published heads for Qwen
    config = ViSpecConfig(**common, num_q=recipe.num_q) if recipe.method == "vispec" else EagleConfig(**common)
    head = METHODS[recipe.method](config, rngs=nnx.Rngs(recipe.seed))
    if recipe.init_from is not None:
        trained, _ = load_drafter_folder(Path(recipe.init_from), target.model)
        head.fc, head.layers = trained.fc, trained.layers
    return head


def head_loss(recipe: DrafterRecipe, head, target, batch, key):
    """The recipe's loss and, per draft position, how often the head's first choice is the target's."""
    lengths = batch["attention_mask"].sum(axis=1)
    tokens_per_image = target.config.tokens_per_image
    images = uniform_images(batch["pixel_values"], batch["input_ids"] == target.config.image_token_id, tokens_per_image)
    embeds = target.embed(batch["input_ids"], images)
    features, _ = target.prefill(embeds, lengths, images)
    embeds, features = jax.lax.stop_gradient((embeds, features))
    count = batch["pixel_values"].shape[1]
    context = DrafterContext(
        embeds=embeds,
        features=features,
        image_ids=images.ids,
        input_ids=batch["input_ids"],
        lengths=lengths,
        root=batch["input_ids"][:, 0],  # no token follows the last one; its row is not in the mask
        max_images=count,
        min_image_tokens=count * tokens_per_image,
    )
    rows = head.rows_of(context, jnp.roll(embeds, -1, axis=1))

    def at_rows(x, shift):  # what stands `shift` positions after each row
        index = jnp.minimum(rows.positions + shift, x.shape[1] - 1)
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    # Row i drafts token i + 2 from the feature that stands at i + 1; the token before must be the answer's, too.
    answer = batch["loss_mask"]
    mask = rows.valid & at_rows(answer, 1) & at_rows(answer, 2) & (rows.positions + 2 < lengths[:, None])
    target_features = at_rows(features, 1)
    target_logits = target.unembed(target_features)
    target_choice = target_logits.argmax(axis=-1)

    inputs = rows.features
    if recipe.feature_noise:
        amplitude = recipe.feature_noise * 512 / features.shape[1]
        inputs = inputs + jax.random.uniform(key, inputs.shape, minval=-amplitude, maxval=amplitude)
    total, metrics = 0.0, {}
    for step in range(recipe.mtp_steps + 1):
        output, _ = head.forward(rows, inputs)
        logits = target.unembed(output)
        parts = {
            "feature": (recipe.feature_weight, lambda: smooth_l1(output, target_features, mask)),  # noqa: B023
            "soft_ce": (recipe.soft_cross_entropy_weight, lambda: soft_cross_entropy(logits, target_logits, mask)),  # noqa: B023
            "prob_l1": (recipe.probability_l1_weight, lambda: probability_l1(logits, target_logits, mask)),  # noqa: B023
            "rank": (recipe.ranking_weight, lambda: ranking(logits, target_logits, mask)),  # noqa: B023
        }
        for name, (weight, value) in parts.items():
            if weight:
                part = value()
                total = total + weight * part / (recipe.mtp_steps + 1)
                metrics[f"{name}_{step + 1}"] = part
        metrics[f"agreement_{step + 1}"] = masked_mean(logits.argmax(axis=-1) == target_choice, mask)
        # Draft position step + 2 reads what the head predicted for the position before.
        inputs = jnp.concatenate([rows.features[:, :1], output[:, :-1]], axis=1)
    return total, metrics


class Span:
    """Records `start` to `stop` of a random-access source."""

    def __init__(self, source, start: int, stop: int):
        self.source, self.start, self.stop = source, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int):
        return self.source[self.start + index]
