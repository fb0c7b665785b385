"""The training loop: one jitted step, checkpoints that resume exactly, acceptance measured on the way.

Data is addressed by step and randomness by `fold_in(seed, step)`, so parameters, optimizer state and the step number
are the whole state of a run.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from jaxspec.stopping import CatchSignals, Stopped
from jaxspec.training.acceptance import summary
from jaxspec.training.checkpoints import Checkpoints
from jaxspec.training.flops import flops_of
from jaxspec.training.log import Log
from jaxspec.training.recipe import Recipe, Task, optimizer, write_recipe


class TrainState(NamedTuple):
    step: jax.Array  # i32 []
    params: Any
    opt_state: Any


class Running(NamedTuple):
    """A step that the device may still be busy with."""

    step: int  # 1-based
    metrics: dict[str, jax.Array]
    batch: dict


def initial_state(recipe: Recipe, params: Any) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(recipe).init(params))


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
        value, metrics = loss(state.params, task.constants, arrays(batch), jax.random.key(recipe.seed))
        for name, metric in {"loss": value, **metrics}.items():
            totals[name] = totals.get(name, 0.0) + float(metric)
        count += 1
    return {name: total / count for name, total in totals.items()}


def train(recipe: Recipe, task: Task) -> Any:
    """Run or resume to `recipe.steps`, export, and return the final parameters.

    Raises FloatingPointError at a loss or gradient that is not finite (naming the step and its records), OSError where
    something cannot be written (the last checkpoint is intact in both cases), ValueError for the folder of another
    recipe, Stopped after a signal.
    """
    recipe.folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    with Checkpoints(recipe.folder, keep_best=task.acceptance is not None) as checkpoints, CatchSignals() as signals:
        saved = checkpoints.latest.latest_step()
        if saved is not None and saved > recipe.steps:
            raise ValueError(f"{recipe.name} has run {saved} steps already, steps is {recipe.steps}")
        if warning := write_recipe(recipe, resuming=saved is not None):
            console.print(f"warning: {warning}", style="yellow", markup=False)
        params = jax.tree.map(jnp.copy, task.params)  # each step donates the state: no buffer may serve twice
        state = checkpoints.resume(initial_state(recipe, params))
        start = int(state.step)
        if saved is not None:
            console.print(f"resuming {recipe.name} at step {start} of {recipe.steps}")
        step_fn, loss_fn = make_step(recipe, task), jax.jit(task.loss)

        with Log(recipe.folder, console, recipe, start) as log:

            def settle(running: Running) -> None:
                """Wait for a step and log it, if it left a state worth keeping."""
                if not all(np.isfinite(running.metrics[name]) for name in ("loss", "grad_norm")):
                    kept = checkpoints.finish()
                    raise FloatingPointError(describe(recipe, running, kept))
                log.step(running.step, running.metrics, tokens_of(running.batch))

            def measure(step: int) -> dict:
                """What `state` accepts; the best so far is kept."""
                accepted = task.acceptance.measure(state.params)
                log.acceptance(step, accepted)
                about = summary(step, accepted)
                checkpoints.offer(step, state.params, about)
                return about

            batches = task.batches(start)
            running = about = None
            for index in range(start, recipe.steps):
                batch = next(batches)
                if index == start:
                    log.machine(flops_of(step_fn, state, task.constants, arrays(batch)), devices_of(state))
                state, metrics = step_fn(state, task.constants, arrays(batch))
                if running is not None:
                    settle(running)  # one step late, so the host never waits for the step just started
                done, last = index + 1, index + 1 == recipe.steps
                running = Running(done, metrics, batch)
                evaluating = done % recipe.eval_every == 0 or last
                stopping = signals.received  # read once: a signal may come at any time
                saving = done % recipe.checkpoint_every == 0 or last or stopping
                if not (evaluating or saving):
                    continue
                settle(running)  # nothing is judged or saved that a bad step has left
                running = None
                if evaluating:
                    if values := evaluate(recipe, task, state, loss_fn):
                        log.validation(done, values)
                    if task.acceptance and (last or (task.acceptance.every and done % task.acceptance.every == 0)):
                        about = measure(done)
                if saving:
                    checkpoints.save(done, state)
                if stopping:
                    checkpoints.finish()
                    raise Stopped(f"{recipe.name} stopped at step {done}; run the same command to resume")
                log.restart(done)

            checkpoints.finish()
            params = state.params
            if task.acceptance is None:
                about = {"step": recipe.steps}
            else:
                if checkpoints.best_about() is None or (task.acceptance.export == "last" and about is None):
                    about = measure(recipe.steps)
                if task.acceptance.export == "best":
                    params, about = checkpoints.best_params(params), checkpoints.best_about()
        with checkpoints.writing("the export", OSError):
            task.export(params, recipe.export_folder, about)
    console.print(f"{recipe.name}: exported step {about['step']} to {recipe.export_folder}")
    return state.params


def arrays(batch: dict) -> dict:
    """What a loss reads of a batch; ids may be anything."""
    return {name: value for name, value in batch.items() if name != "ids"}


def tokens_of(batch: dict) -> int:
    """Tokens of prompts and answers, without padding; 0 for batches that hold none."""
    return int(np.sum(batch["prompts"].lengths)) if "prompts" in batch else 0


def devices_of(state: TrainState) -> set[jax.Device]:
    return set().union(*(leaf.sharding.device_set for leaf in jax.tree.leaves(state.params)))


def describe(recipe: Recipe, running: Running, kept: int | None) -> str:
    """Why a run that went astray ends."""
    values = ", ".join(f"{name} {float(value):g}" for name, value in running.metrics.items())
    records = f" (records {', '.join(map(str, running.batch['ids']))})" if "ids" in running.batch else ""
    checkpoint = "no checkpoint was saved yet" if kept is None else f"the checkpoint of step {kept} is kept"
    return f"{recipe.name}: not finite at step {running.step}{records}: {values}; {checkpoint}"
