"""What a training run is: the fields every recipe shares, and the task a recipe turns into."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import optax


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Fields common to every run; `configs/*.py` hold one instance each, overridden from the command line."""

    name: str
    run_dir: str = "runs"
    seed: int = 0
    steps: int = 1000
    batch_size: int = 8
    sequence_length: int = 384
    learning_rate: float = 1e-3
    final_learning_rate_ratio: float = 0.05
    warmup_steps: int = 100
    adam_b2: float = 0.95
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    log_every: int = 20
    eval_every: int = 250
    eval_batches: int = 8
    checkpoint_every: int = 250

    def __post_init__(self):
        for field in ("steps", "batch_size", "sequence_length", "log_every", "eval_every", "checkpoint_every"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(f"warmup_steps must lie in 0..steps ({self.steps}), got {self.warmup_steps}")

    @property
    def folder(self) -> Path:
        """Checkpoints, logs and the exported model of this run."""
        return Path(self.run_dir) / self.name

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
    batches: Callable[[int], Iterator[dict]]  # from a step on, deterministic
    validation: Callable[[], Iterator[dict]]
    export: Callable[[Any, Path], None]


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW, linear warm-up then cosine decay, global-norm clip; no decay on vectors (norms, biases)."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=recipe.learning_rate,
        warmup_steps=recipe.warmup_steps,
        decay_steps=recipe.steps,
        end_value=recipe.learning_rate * recipe.final_learning_rate_ratio,
    )
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=recipe.adam_b2,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )

