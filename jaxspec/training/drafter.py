"""Training any drafter, on a target's own answers or on conversations: the frozen target runs once per step (features
and logits are never stored), a method's recipe turns what it said into a loss.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import jaxspec
from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.checkpoints.names import parameter_paths
from jaxspec.data.answers import AnswerEncoder, AnswerSource
from jaxspec.data.conversations import ConversationEncoder
from jaxspec.data.records import IllustratedRecords, QuestionEncoder, Records
from jaxspec.data.sources import open_conversations
from jaxspec.drafters.checkpoint import load_drafter_folder, save_drafter_folder
from jaxspec.drafters.contract import DrafterContext, DraftModel
from jaxspec.drafters.drafter import Drafter
from jaxspec.metrics import Acceptance
from jaxspec.sharding import place_parameters
from jaxspec.speculation.prefill import taps_of
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.reading import read_prompts
from jaxspec.training.acceptance import Measurement, measured_acceptance
from jaxspec.training.held_out import Span, first_questions, held_out_of, pipelines
from jaxspec.training.recipe import Recipe, Task, check_same, recipe_hash

COMMON = (
    *("target", "target_dtype", "quantize", "answers_dir", "conversations", "image_folder", "max_records"),
    "validation_records",
)
"""Fields that drafters trained together share, beside those of every recipe."""


class Teacher(NamedTuple):
    """What the frozen target says of a batch of prompts with their answers."""

    context: DrafterContext
    answer: jax.Array  # bool [B, S], the tokens a drafter shall learn to foresee


@dataclasses.dataclass(frozen=True)
class DrafterRecipe(Recipe):
    """A drafter for a trained target. A method subclasses it with its settings, `new_draft_model` and `loss`."""

    method: str = ""
    target: str = "demo"
    target_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen target, and of the drafter where acceptance is measured; what learns is float32."""
    quantize: Literal["int8"] | None = None
    """The frozen target's matrices as int8: half the memory of bfloat16 (docs/QUANTIZATION.md)."""
    answers_dir: str = "runs/demo_answers"
    """The target's own answers, made by `python -m jaxspec distill`."""
    conversations: str | None = None
    """What others said, to learn from in place of `answers_dir`: a .json or .jsonl file, the folder of a set that
    `python -m jaxspec prepare` made, or `scenes`."""
    image_folder: str | None = None
    """Where the images of the records are. By default where they were when the set was made, or beside the file."""
    max_records: int | None = None
    """The first records of the set at most."""
    validation_records: int = 128
    """The first records of the set are held out."""
    init_from: str | None = None
    """A trained drafter to start from; parameters it lacks start fresh."""
    depth: int = 4
    top_k: int = 3
    total_tokens: int = 8
    """The tree that the exported folder recommends."""
    noise_weight: float = 1.0
    """How much of the sampling noise that tree ranks its candidates by."""
    acceptance_prompts: int = 16
    """Held-out questions that the drafter drafts for at temperature 0; its folder says what it accepted. 0 is none."""
    acceptance_every: int = 0
    """Steps between these measurements, a multiple of `eval_every`; 0 is only after the last step."""
    acceptance_at_temperature_1: bool = False
    """Measure at temperature 1, too."""
    export_checkpoint: Literal["best", "last"] = "best"
    """Export the parameters with the highest mean acceptance length, or the last ones."""
    save_dtype: str = "float16"

    answer_run: ClassVar[int] = 1
    """How many of an answer's tokens in a row the loss needs to learn anything."""
    changeable: ClassVar[tuple[str, ...]] = (
        *Recipe.changeable,
        *("acceptance_every", "export_checkpoint", "save_dtype"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_records is not None and self.max_records < 1:
            raise ValueError(f"max_records must be at least 1, got {self.max_records}")
        if self.acceptance_every < 0 or self.acceptance_every % self.eval_every:
            raise ValueError(
                f"acceptance_every must be a multiple of eval_every ({self.eval_every}), got {self.acceptance_every}"
            )
        if self.acceptance_every and not self.acceptance_prompts:
            raise ValueError(f"acceptance_every is {self.acceptance_every}, but acceptance_prompts is 0")

    @property
    def needs_images(self) -> bool:
        """Whether the method learns nothing from text alone."""
        return False

    @property
    def tree(self) -> TreeConfig:
        return TreeConfig(self.depth, self.top_k, self.total_tokens, self.noise_weight)

    def new_draft_model(self, target: jaxspec.Target) -> DraftModel:
        """What training starts from."""
        raise NotImplementedError(f"{type(self).__name__} must implement new_draft_model")

    def trains(self, path: tuple) -> bool:
        """Whether the parameter at `path` learns; the others stay as they are."""
        return True

    def loss(
        self, draft_model: Any, model: VisionLanguageModel, teacher: Teacher, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss and what the log shall tell; pure."""
        raise NotImplementedError(f"{type(self).__name__} must implement loss")


def drafter_task(recipe: DrafterRecipe, target: jaxspec.Target | None = None, answer_run: int | None = None) -> Task:
    """Records, the frozen target (loaded if not given), and a fresh or continued drafter. `answer_run` is the recipe's
    own if not given.

    Raises ValueError, before anything is compiled, for what does not fit together.
    """
    mesh = recipe.mesh()
    target = target or load_teacher(recipe)
    recipe.tree.check_vocabulary(target.model.vocab_size)
    graph, params, rest = split_draft_model(recipe, target)
    params, rest = place_parameters(params, mesh), place_parameters(rest, mesh)
    model_graph, model_params = nnx.split(target.model)
    records, encoder = records_and_encoder(recipe, target)
    held_out = held_out_of(recipe.validation_records, records)
    check_records(recipe, target, records, held_out)
    training, validation = pipelines(recipe, records, held_out, encoder, answer_run or recipe.answer_run)

    def draft_model_of(*states) -> DraftModel:
        return nnx.merge(graph, *states)

    def served(params) -> Drafter:
        """As it is loaded beside the target."""
        return Drafter(draft_model_of(*in_dtype((params, rest), target.model.dtype)), recipe.tree, recipe.method, {})

    positions = target.config.text.max_position_embeddings
    questions = questions_of(recipe, target, Span(records, 0, held_out), encoder)
    prompts = [prompt for prompt, _ in questions]
    limit = min(max((tokens for _, tokens in questions), default=1), recipe.sequence_length)
    generator = jaxspec.Generator(target, served(params), max_length=min(recipe.sequence_length + limit, positions))
    temperatures = (0.0, 1.0) if recipe.acceptance_at_temperature_1 else (0.0,)

    def measure(params) -> dict[float, Acceptance]:
        now = generator.with_drafter(served(params))
        return {t: measured_acceptance(now, prompts, limit, t, recipe.rows) for t in temperatures}

    def export(params, folder: Path, about: dict) -> None:
        about = about_run(recipe, target) | about
        save_drafter_folder(
            draft_model_of(params, rest), recipe.method, recipe.tree, target.model, folder, recipe.save_dtype, about
        )

    return Task(
        params=params,
        constants=(rest, model_params),
        loss=loss_of(recipe, graph, model_graph),
        batches=training.batches,
        validation=validation,
        export=export,
        acceptance=Measurement(measure, recipe.acceptance_every, recipe.export_checkpoint) if questions else None,
        shortfall=training.shortfall,
    )


def loss_of(
    recipe: DrafterRecipe, graph: nnx.GraphDef[DraftModel], model_graph: nnx.GraphDef[VisionLanguageModel]
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(params, (rest, target's parameters), batch, key)` of a `Task`: what learns and what stays of a draft model
    of structure `graph`, taught by a frozen target."""

    def loss(params: Any, constants: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        rest, model_params = constants
        model, draft_model = nnx.merge(model_graph, model_params), nnx.merge(graph, params, rest)
        return recipe.loss(draft_model, model, teach(model, batch, key, taps_of(draft_model)), key)

    return loss


def load_teacher(recipe: DrafterRecipe) -> jaxspec.Target:
    """The recipe's target, on all devices."""
    return jaxspec.load_target(recipe.target, recipe.target_dtype, recipe.mesh(), recipe.quantize)


def drafter_tasks(recipes: Sequence[DrafterRecipe]) -> list[Task]:
    """Of recipes that are trained together, with one target. Raises ValueError, too, where they read other records."""
    for recipe in recipes:
        if not isinstance(recipe, DrafterRecipe):
            raise ValueError(f"only recipes of drafters can be trained together, {recipe.name} is none")
    check_same(recipes, COMMON)
    target = load_teacher(recipes[0])
    answer_run = max(recipe.answer_run for recipe in recipes)  # none of them gets a batch that teaches it nothing
    return [drafter_task(recipe, target, answer_run) for recipe in recipes]


def split_draft_model(
    recipe: DrafterRecipe, target: jaxspec.Target
) -> tuple[nnx.GraphDef[DraftModel], nnx.State, nnx.State]:
    """What training starts from: structure, parameters that learn, parameters that stay."""
    graph, learning, others = nnx.split(recipe.new_draft_model(target), lambda path, _: recipe.trains(path), ...)
    return graph, learning, others


def in_dtype(tree: Any, dtype: Any) -> Any:
    """Floating-point arrays of a tree in `dtype`, all others as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def about_run(recipe: DrafterRecipe, target: jaxspec.Target) -> dict:
    """Where a drafter comes from, for its folder."""
    return {
        "recipe": recipe.name,
        "recipe_hash": recipe_hash(recipe),
        "steps": recipe.steps,
        "seed": recipe.seed,
        "target_fingerprint": target.fingerprint(),
    }


def records_and_encoder(
    recipe: DrafterRecipe, target: jaxspec.Target
) -> tuple[Span[IllustratedRecords[dict[str, Any]]], QuestionEncoder]:
    """What the recipe learns from, and what reads it. Raises ValueError for another target's answers."""
    if recipe.conversations is not None:
        records = open_conversations(recipe.conversations, recipe.image_folder)
        encoder = ConversationEncoder(target.processor, target.adapter)
    else:
        records = open_answers(recipe, target)
        encoder = AnswerEncoder(target.processor, target.adapter)
    count = len(records) if recipe.max_records is None else min(recipe.max_records, len(records))
    return Span(records, 0, count), encoder


def open_answers(recipe: DrafterRecipe, target: jaxspec.Target) -> AnswerSource:
    """The target's own answers. Raises ValueError for those of another one."""
    return AnswerSource.of_target(recipe.answers_dir, target.fingerprint(), recipe.image_folder)


def check_records(
    recipe: DrafterRecipe,
    target: jaxspec.Target,
    records: Span[IllustratedRecords[dict[str, Any]]],
    held_out: int,
) -> None:
    """Raises ValueError where a batch cannot be filled, or images are needed that are not there."""
    source = recipe.conversations or recipe.answers_dir
    if len(records) - held_out < recipe.batch_size:
        raise ValueError(
            f"{source} gives {len(records)} records, {held_out} of them held out: "
            f"the others do not fill a batch of {recipe.batch_size}"
        )
    if not recipe.needs_images:
        return
    if not target.adapter.image_token_ids:
        raise ValueError(f"method {recipe.method} learns from images, but the target {recipe.target} reads none")
    known = records.source.has_images
    if known is False or not (known or any(len(records[index]["images"]) for index in range(len(records)))):
        raise ValueError(f"method {recipe.method} learns from images, but no record of {source} has one")


def questions_of(
    recipe: DrafterRecipe, target: jaxspec.Target, held_out: Records[dict[str, Any]], encoder: QuestionEncoder
) -> list[tuple[EncodedPrompt, int]]:
    """What acceptance is measured on, each question with the length of its answer. Raises ValueError where all are too
    long."""
    room = min(recipe.sequence_length, target.config.text.max_position_embeddings) - 1
    questions = first_questions(held_out, encoder, recipe.acceptance_prompts, room)
    if len(held_out) and recipe.acceptance_prompts and not questions:
        raise ValueError(
            f"acceptance_prompts is {recipe.acceptance_prompts}, but none of the {len(held_out)} records held out has "
            f"a question of up to {room} tokens: raise sequence_length, or set acceptance_prompts to 0"
        )
    return questions


def start_from(draft_model: nnx.Module, folder: str, target: jaxspec.Target) -> None:
    """Give `draft_model` the parameters of the trained one in `folder`; those that it lacks stay. Raises ValueError,
    listing the parameters that do not fit."""
    trained, _ = load_drafter_folder(resolve_folder(folder), target.model)
    ours = parameter_paths(draft_model)
    problems = [
        f"{path} {leaf.shape} (here {ours[path].shape if path in ours else 'there is none'})"
        for path, leaf in parameter_paths(trained).items()
        if path not in ours or ours[path].shape != leaf.shape
    ]
    if problems:
        raise ValueError(f"init_from {folder} does not fit the recipe: {', '.join(problems)}")
    nnx.update(draft_model, nnx.state(trained))


def teach(
    model: VisionLanguageModel, batch: Mapping[str, Any], key: jax.Array, tap_layers: Sequence[int] = ()
) -> Teacher:
    """One pass of the target's model over a batch of `jaxspec.data.pipeline`; no gradient goes into it."""
    prompts, answer = batch["prompts"], batch["loss_mask"]
    read = jax.lax.stop_gradient(read_prompts(model, prompts, tap_layers))
    count = prompts.lengths.shape[0]
    first = jnp.argmax(answer, axis=1)  # of the answer's tokens
    context = DrafterContext.of_pass(
        prompts,
        read,
        prompt_lengths=jnp.where(answer.any(axis=1), first, prompts.lengths).astype(jnp.int32),
        seeds=jax.random.bits(key, (count,)),
        root=jnp.zeros((count,), jnp.int32),  # no token follows the last one; no loss looks there
    )
    return Teacher(context, answer)
