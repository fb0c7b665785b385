"""Training any drafter on a target's own answers: the frozen target runs once per step (features and logits are never
stored), a method's recipe turns what it said into a loss.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jaxspec
from jaxspec.data.answers import AnswerEncoder, AnswerSource
from jaxspec.data.pipeline import Pipeline
from jaxspec.drafters.checkpoint import save_drafter_folder
from jaxspec.drafters.drafter import Drafter
from jaxspec.metrics import Acceptance, pooled
from jaxspec.speculation.loop import DrafterContext, context_of, read_prompts
from jaxspec.speculation.tree import TreeConfig
from jaxspec.training.recipe import Recipe, Task


class Teacher(NamedTuple):
    """What the frozen target says of a batch of prompts with their answers."""

    context: DrafterContext
    answer: jax.Array  # bool [B, S], the tokens a drafter shall learn to foresee


@dataclasses.dataclass(frozen=True)
class DrafterRecipe(Recipe):
    """A drafter for a trained target. A method subclasses it with its settings, `new_drafter` and `loss`."""

    method: str = ""
    target: str = "runs/demo_target/export"
    answers_dir: str = "runs/demo_answers"
    """The target's own answers, made by `python -m jaxspec distill`."""
    image_folder: str | None = None
    """Where the images of the answers are; where they were when the set was made by default."""
    validation_records: int = 128
    """The first answers of the set are held out."""
    init_from: str | None = None
    """A trained drafter to start from; parameters it lacks start fresh."""
    depth: int = 4
    top_k: int = 3
    total_tokens: int = 8
    """The tree that the exported folder recommends."""
    acceptance_prompts: int = 16
    """Held-out questions that the trained drafter drafts for at temperature 0; its folder says what it accepted."""
    save_dtype: str = "float16"

    @property
    def tree(self) -> TreeConfig:
        return TreeConfig(self.depth, self.top_k, self.total_tokens)

    def new_drafter(self, target: jaxspec.Target) -> nnx.Module:
        """What training starts from."""
        raise NotImplementedError(f"{type(self).__name__} must implement new_drafter")

    def trains(self, path: tuple) -> bool:
        """Whether the parameter at `path` learns; the others stay as they are."""
        return True

    def loss(self, drafter, target, teacher: Teacher, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and what the log shall tell; pure."""
        raise NotImplementedError(f"{type(self).__name__} must implement loss")


def drafter_task(recipe: DrafterRecipe) -> Task:
    """Self-distilled answers, the frozen target, and a fresh or continued drafter."""
    target = jaxspec.load_target(recipe.target)
    learns = lambda path, _: recipe.trains(path)  # noqa: E731
    graph, params, rest = nnx.split(recipe.new_drafter(target), learns, ...)
    target_graph, target_params = nnx.split(target.model)
    answers = AnswerSource(recipe.answers_dir, recipe.image_folder)
    if answers.about["target_fingerprint"] != target.fingerprint():
        raise ValueError(
            f"the answers in {recipe.answers_dir} are those of the target {answers.about['target_fingerprint']}, not "
            f"of {target.fingerprint()}"
        )
    encoder = AnswerEncoder(target.processor, target.config)

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

    def loss(params, constants, batch, key):
        rest, target_params = constants
        model = nnx.merge(target_graph, target_params)
        return recipe.loss(nnx.merge(graph, params, rest), model, teach(model, batch, key), key)

    about = {
        "recipe": recipe.name,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "target_fingerprint": target.fingerprint(),
    }

    def export(params, folder: Path) -> None:
        trained, recorded = nnx.merge(graph, params, rest), {}
        records = [answers[index] for index in range(min(recipe.acceptance_prompts, held_out))]
        if records:
            drafter = Drafter(trained, recipe.tree, recipe.method, {})
            accepted = measured_acceptance(target, drafter, records, encoder)
            length, positions = accepted.mean_acceptance_length, accepted.acceptance_at_position
            recorded = {"mean_acceptance_length": length, "acceptance_at_position": positions}
            shares = " ".join(f"{share:.2f}" for share in positions)
            print(f"{recipe.name}: mean acceptance length {length:.2f}, accepted at each position: {shares}")
        save_drafter_folder(
            trained, recipe.method, recipe.tree, target.model, folder, recipe.save_dtype, about | recorded
        )

    return Task(
        params=params,
        constants=(rest, target_params),
        loss=loss,
        batches=training.batches,
        validation=lambda: (
            validation[index] for index in range(min(recipe.eval_batches, held_out // recipe.batch_size))
        ),
        export=export,
    )


def teach(target, batch, key) -> Teacher:
    """One pass of the target over a batch of `jaxspec.data.pipeline`; no gradient goes into it."""
    prompts, answer = batch["prompts"], batch["loss_mask"]
    features, _, embeds, vision = jax.lax.stop_gradient(read_prompts(target, prompts))
    count = prompts.lengths.shape[0]
    first = jnp.argmax(answer, axis=1)  # of the answer's tokens
    context = context_of(
        prompts,
        features,
        embeds,
        vision,
        prompt_lengths=jnp.where(answer.any(axis=1), first, prompts.lengths).astype(jnp.int32),
        seeds=jax.random.bits(key, (count,)),
        root=jnp.zeros((count,), jnp.int32),  # no token follows the last one; no loss looks there
    )
    return Teacher(context, answer)


def measured_acceptance(target, drafter: Drafter, records: Sequence[dict], encoder: AnswerEncoder) -> Acceptance:
    """What the drafter's greedy drafts earn on the prompts of `records`, over all rounds of all of them."""
    prompts = [encoder.encode_prompt(record) for record in records]
    limit = max(len(record["answer_ids"]) for record in records)
    longest = max(len(prompt.input_ids) for prompt in prompts)
    generator = jaxspec.Generator(target, drafter, max_length=longest + limit)
    return pooled([result.stats for result in generator.generate_encoded(prompts, max_new_tokens=limit)])


class Span:
    """Records `start` to `stop` of a random-access source."""

    def __init__(self, source, start: int, stop: int):
        self.source, self.start, self.stop = source, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int):
        return self.source[self.start + index]
