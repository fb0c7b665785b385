"""The training loop: one jitted step, checkpoints that resume exactly, logged losses, a progress bar.

Data is addressed by step and randomness by `fold_in(seed, step)`, so parameters, optimizer state and the step number
are the whole state of a run.
"""

import dataclasses
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxspec.stopping import CatchSignals, Stopped
from jaxspec.training.recipe import Recipe, Task, optimizer, write_text


class TrainState(NamedTuple):
    step: jax.Array  # i32 []
    params: Any
    opt_state: Any


def make_step(recipe: Recipe, task: Task):
    """`step(state, constants, batch) -> (state, metrics)`, state donated."""
    tx = optimizer(recipe)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, constants, batch):
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        grads_of = jax.value_and_grad(task.loss, has_aux=True)
        (loss, metrics), grads = grads_of(state.params, constants, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **metrics}
        return TrainState(state.step + 1, params, opt_state), metrics

    return step


def evaluate(recipe: Recipe, task: Task, state: TrainState, loss) -> dict[str, float]:
    """Mean metrics over the validation batches; the key is fixed, so runs are comparable."""
    totals: dict[str, float] = {}
    count = 0
    for batch in task.validation():
        value, metrics = loss(state.params, task.constants, batch, jax.random.key(recipe.seed))
        for name, metric in {"loss": value, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(metric)
        count += 1
    return {name: total / count for name, total in totals.items()}


def train(recipe: Recipe, task: Task) -> Any:
    """Run or resume to `recipe.steps`, export, and return the final parameters.

    Raises FloatingPointError at a loss that is not finite (the last checkpoint is kept), Stopped after a signal.
    """
    folder = recipe.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.json", json.dumps(dataclasses.asdict(recipe), indent=2, default=str))
    console = Console()
    params = jax.tree.map(jnp.copy, task.params)  # each step donates the state: no buffer may serve twice
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer(recipe).init(params))
    step_fn, loss_fn = make_step(recipe, task), jax.jit(task.loss)

    with (
        ocp.CheckpointManager(folder / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager,
        Log(folder / "log.jsonl", console, recipe) as log,
        CatchSignals() as signals,
    ):
        if manager.latest_step() is not None:
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(abstract))
            console.print(f"resuming {recipe.name} at step {int(state.step)} of {recipe.steps}")
        start = int(state.step)
        batches = task.batches(start)
        previous = None  # metrics are read one step late, so the host never waits for the step just started
        for index in range(start, recipe.steps):
            state, metrics = step_fn(state, task.constants, next(batches))
            if previous is not None:
                log.step(index, previous)
            previous = metrics
            done = index + 1
            if done % recipe.eval_every == 0 or done == recipe.steps:
                log.validation(done, evaluate(recipe, task, state, loss_fn))
            if done % recipe.checkpoint_every == 0 or done == recipe.steps or signals.received:
                manager.save(done, args=ocp.args.StandardSave(state))
            if signals.received:
                manager.wait_until_finished()
                raise Stopped(f"{recipe.name} stopped at step {done}; run the same command to resume")
        if previous is not None:
            log.step(recipe.steps, previous)
        manager.wait_until_finished()
    task.export(state.params, recipe.export_folder)
    console.print(f"{recipe.name}: exported to {recipe.export_folder}")
    return state.params


class Log:
    """A progress bar, a line per `log_every` steps, and `log.jsonl`."""

    def __init__(self, path: Path, console: Console, recipe: Recipe):
        self.path, self.console, self.recipe = path, console, recipe
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self.bar = Progress(
            *columns, TextColumn("{task.fields[rate]}"), console=console, disable=not console.is_terminal
        )

    def __enter__(self):
        self.file = self.path.open("a")
        self.bar.start()
        self.row = self.bar.add_task(self.recipe.name, total=self.recipe.steps, rate="")
        self.since, self.since_step = time.perf_counter(), None
        return self

    def __exit__(self, *exc):
        self.bar.stop()
        self.file.close()

    def step(self, index: int, metrics: dict) -> None:
        """Metrics of step number `index` (1-based)."""
        if self.since_step is None:
            self.since, self.since_step = time.perf_counter(), index
        if index % self.recipe.log_every and index != self.recipe.steps:
            return
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(jnp.isfinite, values.values())):
            raise FloatingPointError(f"{self.recipe.name}: not finite at step {index}: {values}; last checkpoint kept")
        now = time.perf_counter()
        rate = (index - self.since_step) / max(now - self.since, 1e-9)
        self.since, self.since_step = now, index
        self.bar.update(self.row, completed=index, rate=f"{rate:.2f} step/s")
        self.write("train", index, values, f"{rate:.2f} step/s")

    def validation(self, index: int, values: dict[str, float]) -> None:
        self.write("validation", index, values, "")
        self.since, self.since_step = time.perf_counter(), index

    def write(self, split: str, index: int, values: dict[str, float], note: str) -> None:
        self.file.write(json.dumps({"split": split, "step": index, "time": time.time(), **values}) + "\n")
        self.file.flush()
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.console.print(f"{split:>10} {index:6d}  {text}  {note}", highlight=False, soft_wrap=True)
