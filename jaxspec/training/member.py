"""One recipe in a run of the loop: its state, its folder with checkpoints and log, what it is judged by."""

import contextlib
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console

from jaxspec.sharding import place_parameters
from jaxspec.training.acceptance import summary
from jaxspec.training.checkpoints import Checkpoints
from jaxspec.training.log import Log
from jaxspec.training.recipe import Recipe, Task, optimizer, write_recipe


class TrainState(NamedTuple):
    step: jax.Array  # i32 []
    params: Any
    opt_state: Any


def initial_state(recipe: Recipe, params: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(recipe).init(params))


class Member:
    """A context; entering it reads the folder, `begin` says at which step the run starts.

    Raises ValueError for the folder of another recipe, OSError where something cannot be written.
    """

    def __init__(self, recipe: Recipe, task: Task, console: Console) -> None:
        self.recipe, self.task, self.console = recipe, task, console
        self.about: dict | None = None  # of the last measurement of this run
        self.idle = False  # whether a step without a gradient has been told

    def __enter__(self) -> "Member":
        self.recipe.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self.checkpoints = stack.enter_context(
                Checkpoints(self.recipe.folder, keep_best=self.task.acceptance is not None)
            )
            saved = self.checkpoints.latest.latest_step()
            if saved is not None and saved > self.recipe.steps:
                raise ValueError(f"{self.recipe.name} has run {saved} steps already, steps is {self.recipe.steps}")
            if warning := write_recipe(self.recipe, resuming=saved is not None):
                self.console.print(f"warning: {warning}", style="yellow", markup=False)
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.__exit__(kind, error, trace)

    def saved_steps(self) -> set[int]:
        """Those that the run can go on from."""
        return {0, *self.checkpoints.latest.all_steps()}

    def begin(self, start: int, mesh: Mesh | None, alone: bool) -> None:
        """Take up step `start`, one of `saved_steps`, on a mesh if there is one; later steps are void. `alone` where
        the run has no others."""
        params = jax.tree.map(jnp.copy, self.task.params)  # each step donates the state: no buffer may serve twice
        self.state = self.checkpoints.resume(place_parameters(initial_state(self.recipe, params), mesh), start)
        if start:
            self.console.print(f"resuming {self.recipe.name} at step {start} of {self.recipe.steps}")
        writing = partial(self.checkpoints.writing, "log.jsonl", OSError)
        log = Log(self.recipe.folder, self.console, self.recipe, start, alone, writing)
        self.log = self.stack.enter_context(log)

    def settle(self, step: int, metrics: dict[str, jax.Array], parts: Sequence[dict]) -> None:
        """Wait for a step, whose batch had these parts, and log it. Raises FloatingPointError where it left no state
        worth keeping."""
        if not all(np.isfinite(metrics[name]) for name in ("loss", "grad_norm")):
            kept = self.checkpoints.finish()
            raise FloatingPointError(describe(self.recipe.name, step, metrics, parts, kept))
        if not self.idle and metrics["grad_norm"] == 0:
            self.idle = True
            about = f"the gradient of step {step}{records_of(parts)} is 0: nothing was learned from it"
            self.console.print(f"warning: {self.recipe.name}: {about}; more may follow", style="yellow", markup=False)
        self.log.step(step, metrics, sum(map(tokens_of, parts)))

    def evaluated(self, step: int, metrics: dict[str, float], shortfall: dict[str, int]) -> None:
        """Log the means over the validation batches, if there are any, and what the data has lacked."""
        if metrics:
            self.log.validation(step, metrics)
        self.log.data(step, shortfall)

    def measures_at(self, step: int) -> bool:
        acceptance = self.task.acceptance
        if acceptance is None:
            return False
        return step == self.recipe.steps or bool(acceptance.every and step % acceptance.every == 0)

    def measure(self, step: int) -> None:
        """What the state accepts; the best so far is kept."""
        assert self.task.acceptance is not None  # `measures_at` has said so
        accepted = self.task.acceptance.measure(self.state.params)
        self.log.acceptance(step, accepted)
        self.about = summary(step, accepted)
        self.checkpoints.offer(step, self.state.params, self.about)

    def save(self, step: int) -> None:
        self.checkpoints.save(step, self.state)

    def finish(self) -> Any:
        """Export what the recipe wants and return the last parameters. Raises ValueError where no step has ever had a
        gradient: what was never trained is not exported."""
        self.checkpoints.finish()
        if not has_learned(self.state):
            raise ValueError(
                f"{self.recipe.name}: the gradient was 0 in every step, nothing was learned and nothing is exported; "
                "do the batches hold anything that the loss counts?"
            )
        params, acceptance = self.state.params, self.task.acceptance
        if acceptance is None:
            about = {"step": self.recipe.steps}
        else:
            if self.checkpoints.best_about() is None or (acceptance.export == "last" and self.about is None):
                self.measure(self.recipe.steps)
            about = self.about
            if acceptance.export == "best":
                params, about = self.checkpoints.best_params(params), self.checkpoints.best_about()
        assert about is not None  # from a measurement of this run or of one that it goes on from
        with self.checkpoints.writing("the export", OSError):
            self.task.export(params, self.recipe.export_folder, about)
        self.console.print(f"{self.recipe.name}: exported step {about['step']} to {self.recipe.export_folder}")
        return self.state.params


def has_learned(state: TrainState) -> bool:
    """Whether any gradient so far was not 0, in this run or in those that it goes on from: Adam keeps their squares."""
    squares = optax.tree.get_all_with_path(state.opt_state, "nu")
    return any(bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves([value for _, value in squares]))


def records_of(parts: Sequence[dict]) -> str:
    """The records of a batch by name, as a remark; nothing where they have none."""
    ids = [str(each) for part in parts for each in part.get("ids", ())]
    return f" (records {', '.join(ids)})" if ids else ""


def tokens_of(batch: dict) -> int:
    """Tokens of prompts and answers, without padding; 0 for batches that hold none."""
    return int(np.sum(batch["prompts"].lengths)) if "prompts" in batch else 0


def describe(name: str, step: int, metrics: dict, parts: Sequence[dict], kept: int | None) -> str:
    """Why a run that went astray ends."""
    values = ", ".join(f"{key} {float(value):g}" for key, value in metrics.items())
    checkpoint = "no checkpoint was saved yet" if kept is None else f"the checkpoint of step {kept} is kept"
    return f"{name}: not finite at step {step}{records_of(parts)}: {values}; {checkpoint}"
