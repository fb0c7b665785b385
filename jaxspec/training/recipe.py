"""What a training run is: the fields every recipe shares, and the task a recipe turns into."""

import dataclasses
import hashlib
import json
import runpy
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import optax

from jaxspec.checkpoints.tensors import read_json
from jaxspec.checks import one_line
from jaxspec.recipe_files import find_recipe
from jaxspec.sharding import training_mesh
from jaxspec.training.acceptance import Measurement


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Fields common to every run; `jaxspec/recipes/*.py` hold one instance each, overridden from the command line."""

    name: str
    run_dir: str = "runs"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    """Parts that a batch is read in, one after another, where it is too large for the devices at once. Each part's loss
    is a mean over its own tokens; gradients and what the log tells (their norm, too) are means over the parts."""
    fsdp: int = 1
    """Devices that each hold a share of the parameters, gathered where it is needed, and read rows of their own."""
    tensor: int = 1
    """Devices that each compute with a share of the parameters and read the same rows. `fsdp` x `tensor` devices hold
    the parameters once; all others hold them again."""
    sequence_length: int = 384
    length_buckets: bool = False
    """Batches of similar lengths, each padded to a bucket instead of to `sequence_length`."""
    learning_rate: float = 1e-3
    final_learning_rate_ratio: float = 0.05
    warmup_steps: int = 100
    decay: Literal["cosine", "linear"] = "cosine"
    vision_learning_rate_ratio: float = 1.0
    """Learning rate of vision tower and projector, relative to the rest."""
    adam_b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    """Largest global norm of the gradients; 0 is off."""
    clip_value: float = 0.0
    """Largest absolute gradient value (EAGLE: 0.5); 0 is off."""
    log_every: int = 20
    eval_every: int = 250
    eval_batches: int = 8
    checkpoint_every: int = 250
    tensorboard: bool = False
    """Write TensorBoard event files, too (`pip install 'jaxspec-vlm[logging]'`)."""
    wandb: str | None = None
    """A project of Weights & Biases to log to, too."""

    changeable: ClassVar[tuple[str, ...]] = (
        *("run_dir", "log_every", "eval_every", "eval_batches", "checkpoint_every", "tensorboard", "wandb"),
        *("fsdp", "tensor"),
    )
    """Fields that may be others when a run goes on: nothing that is learned depends on them (up to the order of sums on
    other devices)."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "fsdp", "tensor", "sequence_length", "log_every")
        for field in (*counts, "eval_every", "checkpoint_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must lie in 0..steps ({self.steps}), got {self.warmup_steps}")

    @property
    def rows(self) -> int:
        """Of a batch that are read at once."""
        return self.batch_size // self.accumulate

    def mesh(self) -> jax.sharding.Mesh | None:
        """That of all devices; None for one. Raises ValueError where devices or rows do not divide so, and where other
        processes have some of the devices."""
        if jax.process_count() > 1:
            raise ValueError(f"a run uses the devices of one process, but JAX was told of {jax.process_count()}")
        mesh = training_mesh(self.fsdp, self.tensor)
        groups = mesh.size // self.tensor if mesh else 1
        if self.rows % groups:
            raise ValueError(
                f"batch_size / accumulate ({self.rows}) must be a multiple of the {groups} groups of devices that "
                "split it"
            )
        return mesh

    @property
    def folder(self) -> Path:
        """Checkpoints, logs and the exported model of this run."""
        return Path(self.run_dir) / self.name

    @property
    def processor_folder(self) -> Path:
        """The demo's processor, which all runs under one `run_dir` share."""
        return Path(self.run_dir) / "processor"

    @property
    def export_folder(self) -> Path:
        return self.folder / "export"


@dataclasses.dataclass(frozen=True)
class Task:
    """A recipe made concrete. `loss(params, constants, batch, key) -> (scalar, metrics)` is pure and jit-able;
    `constants` is whatever the loss reads but does not train (a frozen target), passed so that it is no literal."""

    params: Any
    constants: Any
    loss: Callable
    batches: Callable[[int], Iterator[dict]]  # from a step on, deterministic; an entry "ids" names the records
    validation: Callable[[], Iterator[dict]]
    export: Callable[[Any, Path, dict], None]
    """`export(params, folder, about)`; `about` holds the step and, where it was measured, the acceptance."""
    acceptance: Measurement | None = None
    shortfall: Callable[[], dict[str, int]] = dict
    """How many conversations were `truncated` and how many records `skipped` so far."""


def check_same(recipes: Sequence[Recipe], fields: Sequence[str]) -> None:
    """Raises ValueError where recipes cannot be trained together: they share a folder, or differ in one of `fields`."""
    folders = [str(recipe.folder) for recipe in recipes]
    if len({*folders}) < len(folders):
        raise ValueError(f"recipes that are trained together need folders of their own, got {', '.join(folders)}")
    for field in fields:
        values = [getattr(recipe, field) for recipe in recipes]
        if any(value != values[0] for value in values):
            told = ", ".join(f"{recipe.name} {value}" for recipe, value in zip(recipes, values, strict=True))
            raise ValueError(f"recipes that are trained together must have the same {field}, got {told}")


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW, linear warm-up then cosine or linear decay, gradients clipped; no decay on vectors (norms, biases)."""
    peak, end = recipe.learning_rate, recipe.learning_rate * recipe.final_learning_rate_ratio
    decay_steps = max(recipe.steps - recipe.warmup_steps, 1)
    if recipe.decay == "cosine":
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=recipe.final_learning_rate_ratio)
    else:
        decay = optax.linear_schedule(peak, end, decay_steps)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, peak, recipe.warmup_steps), decay], [recipe.warmup_steps]
    )
    slow = optax.masked(
        optax.scale(recipe.vision_learning_rate_ratio),
        lambda params: jax.tree_util.tree_map_with_path(lambda path, _: is_vision(path), params),
    )
    transformation = optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm) if recipe.clip_norm else optax.identity(),
        optax.clip(recipe.clip_value) if recipe.clip_value else optax.identity(),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=recipe.adam_b2,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
        slow if recipe.vision_learning_rate_ratio != 1.0 else optax.identity(),
    )
    if recipe.accumulate == 1:
        return transformation
    return optax.MultiSteps(transformation, recipe.accumulate).gradient_transformation()


def is_vision(path: Sequence[Any]) -> bool:
    """Whether a parameter's path lies in a vision tower or the projector behind it."""
    names = ("vision_tower", "multi_modal_projector", "projector")
    return any(str(getattr(key, "key", "")) in names for key in path)


LATER = {"accumulate": 1, "target_dtype": "float32", "noise_weight": 1.0, "quantize": None}
"""Fields that recipes did not have from the beginning, with what was done without them: hashes made then stay true."""

EMBEDDED_TARGET = {"demo": "runs/demo_target/export"}
"""What the embedded target was called in recipes before `demo` was a name for it: their hashes, too, stay true. A hash
tells how something was trained; which target it was trained for tells the fingerprint that is recorded beside it."""


def recorded(recipe: Recipe) -> dict:
    """The resolved recipe as `recipe.json` holds it."""
    return json.loads(json.dumps({"type": type(recipe).__name__, **dataclasses.asdict(recipe)}, default=str))


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits of everything that decides what is learned, the name left out."""
    fields = {name: value for name, value in recorded(recipe).items() if name not in ("name", *recipe.changeable)}
    fields = {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}
    if "target" in fields:
        fields["target"] = EMBEDDED_TARGET.get(fields["target"], fields["target"])
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def write_recipe(recipe: Recipe, resuming: bool) -> str | None:
    """Write `recipe.json`; returns a warning where a run that goes on has another number of steps.

    Raises ValueError, naming the fields, where it has any other recipe.
    """
    path, now, warning = recipe.folder / "recipe.json", recorded(recipe), None
    if resuming and path.exists():
        before = LATER | read_json(path)
        differing = [name for name in now if name in before and now[name] != before[name]]
        changes = {name: f"{name} {before[name]} -> {now[name]}" for name in differing if name not in recipe.changeable}
        if more := changes.pop("steps", None):
            warning = f"{recipe.name} goes on with another learning rate schedule: {more}"
        if changes:
            raise ValueError(
                f"{recipe.folder} holds checkpoints of another recipe ({', '.join(changes.values())}): "
                "set these fields back or give the run another name"
            )
    write_text(path, json.dumps(now, indent=2))
    return warning


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def load_recipe(name_or_path: str) -> Recipe:
    """The recipe that a file (`jaxspec.recipe_files.find_recipe`) holds as `recipe`. Raises FileNotFoundError, or
    ValueError where it holds none or fails, with the line."""
    path = str(find_recipe(name_or_path))
    try:
        recipe = runpy.run_path(path).get("recipe")
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        raise ValueError(f"{path} cannot be run: {where}{type(error).__name__}: {one_line(str(error))}") from error
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name_or_path}: `recipe` must be a recipe of jaxspec.training, got {type(recipe).__name__}")
    return recipe
