"""The training loop: one jitted step, checkpoints that resume exactly, acceptance measured on the way.

Data is addressed by step and randomness by `fold_in(seed, step)`, so parameters, optimizer state and the step number
are the whole state of a run. Several recipes that read the same batches can be trained in one run: arrays that their
losses share are passed once, so XLA computes once what all of them compute, the pass of a frozen target above all.
"""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console

from jaxspec.sharding import ROWS, place_batch
from jaxspec.splitting import using
from jaxspec.stopping import CatchSignals, Stopped
from jaxspec.training.flops import flops_of
from jaxspec.training.member import Member, TrainState
from jaxspec.training.recipe import Recipe, Task, check_same, optimizer

COMMON = (
    *("run_dir", "seed", "steps", "batch_size", "accumulate", "fsdp", "tensor", "sequence_length", "length_buckets"),
    *("log_every", "eval_every", "eval_batches", "checkpoint_every"),
)
"""Fields of `Recipe` that recipes trained together share."""

Metrics = list[dict[str, jax.Array]]
Step = Callable[[list[TrainState], list[jax.Array], dict[str, Any]], tuple[list[TrainState], Metrics]]
Losses = Callable[[list[Any], list[jax.Array], dict[str, Any]], Metrics]


class Running(NamedTuple):
    """A step that the device may still be busy with."""

    step: int  # 1-based
    metrics: Sequence[dict[str, jax.Array]]
    parts: Sequence[dict]  # of its batch


class Constants:
    """What the losses of tasks read but do not train, as a flat list that holds every array once."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        leaves, self.structure = jax.tree.flatten([task.constants for task in tasks])
        unique = {id(leaf): leaf for leaf in leaves}
        places = {name: place for place, name in enumerate(unique)}
        self.arrays, self.places = list(unique.values()), [places[id(leaf)] for leaf in leaves]

    def of_tasks(self, arrays: Sequence[jax.Array]) -> list[Any]:
        return jax.tree.unflatten(self.structure, [arrays[place] for place in self.places])


def make_step(
    recipes: Sequence[Recipe],
    tasks: Sequence[Task],
    constants: Constants,
    mesh: Mesh | None = None,
    shardings: Any = None,
) -> jax.stages.Wrapped:
    """`step(states, constants.arrays, batch) -> (states, metrics)`, a list each; states are donated, and lie on a mesh
    as `shardings` say."""
    optimizers = [optimizer(recipe) for recipe in recipes]

    def updated(task: Task, tx, state: TrainState, own, batch, key):
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, own, batch, key)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
        return TrainState(state.step + 1, params, opt_state), metrics

    @partial(jax.jit, donate_argnums=0, out_shardings=shardings and (shardings, None))
    def step(states, arrays, batch):
        key = jax.random.fold_in(jax.random.key(recipes[0].seed), states[0].step)
        each = zip(tasks, optimizers, states, constants.of_tasks(arrays), strict=True)
        with using(mesh, ROWS):
            results = [updated(*parts, batch, key) for parts in each]
        return [state for state, _ in results], [metrics for _, metrics in results]

    return step


def make_losses(
    recipes: Sequence[Recipe], tasks: Sequence[Task], constants: Constants, mesh: Mesh | None = None
) -> Losses:
    """`losses(params, constants.arrays, batch) -> metrics`, a list each; the key is fixed, so runs are comparable."""

    @jax.jit
    def losses(params, arrays, batch):
        key, metrics = jax.random.key(recipes[0].seed), []
        for task, own, constant in zip(tasks, params, constants.of_tasks(arrays), strict=True):
            with using(mesh, ROWS):
                loss, others = task.loss(own, constant, batch, key)
            metrics.append({"loss": loss, **others})
        return metrics

    return losses


def update(
    members: Sequence[Member], step: Step, constants: Constants, parts: Sequence[dict], mesh: Mesh | None
) -> list[dict]:
    """One step of all members on the parts of a batch; returns their metrics, means over the parts."""
    found = []
    for part in parts:
        states, metrics = step([member.state for member in members], constants.arrays, arrays(part, mesh))
        for member, state in zip(members, states, strict=True):
            member.state = state
        found.append(metrics)
    return found[0] if len(found) == 1 else jax.tree.map(lambda *each: sum(each) / len(each), *found)


def evaluate(members: Sequence[Member], losses: Losses, constants: Constants, step: int, mesh: Mesh | None) -> None:
    """The mean metrics over the validation batches, and what the data that all of them read has lacked."""
    totals: list[dict[str, float]] = [{} for _ in members]
    count = 0
    for batch in members[0].task.validation():
        metrics = losses([member.state.params for member in members], constants.arrays, arrays(batch, mesh))
        for total, values in zip(totals, metrics, strict=True):
            total.update({name: total.get(name, 0.0) + float(value) for name, value in values.items()})
        count += 1
    for member, total in zip(members, totals, strict=True):
        member.evaluated(step, {name: value / count for name, value in total.items()}, members[0].task.shortfall())


def train(recipe: Recipe, task: Task) -> Any:
    """`train_together` with one recipe; returns its parameters."""
    return train_together([recipe], [task])[0]


def train_together(recipes: Sequence[Recipe], tasks: Sequence[Task]) -> list[Any]:
    """Run or resume to `steps`, export, and return the final parameters of each recipe.

    The batches are those of the first task; what the recipes must have in common is `COMMON`. A folder holds the same
    as after a run of its own.

    Raises FloatingPointError at a loss or gradient that is not finite (naming the step and its records), OSError where
    something cannot be written (the last checkpoint is intact in both cases), ValueError for recipes that do not go
    together, for the folder of another recipe and for folders without a common step, Stopped after a signal.
    """
    check_same(recipes, COMMON)
    mesh, accumulate = recipes[0].mesh(), recipes[0].accumulate
    console, steps = Console(), recipes[0].steps
    with contextlib.ExitStack() as stack, CatchSignals() as signals:
        pairs = zip(recipes, tasks, strict=True)
        members = [stack.enter_context(Member(recipe, task, console)) for recipe, task in pairs]
        start = common_step(members)
        for member in members:
            member.begin(start, mesh, alone=len(members) == 1)
        constants = Constants(tasks)
        shardings = mesh and jax.tree.map(lambda leaf: leaf.sharding, [member.state for member in members])
        step_fn = make_step(recipes, tasks, constants, mesh, shardings)
        losses = make_losses(recipes, tasks, constants, mesh)

        def settle(running: Running) -> None:
            for member, metrics in zip(members, running.metrics, strict=True):
                member.settle(running.step, metrics, running.parts)

        batches, running = tasks[0].batches(start * accumulate), None
        for done in range(start + 1, steps + 1):
            parts = [next(batches) for _ in range(accumulate)]
            if done == start + 1 and len(members) == 1:  # of several, what they share would count many times
                states = [members[0].state]
                flops = flops_of(step_fn, states, constants.arrays, arrays(parts[0], mesh)) * accumulate
                members[0].log.machine(flops, devices_of(states[0]))
            metrics = update(members, step_fn, constants, parts, mesh)
            if running is not None:
                settle(running)  # one step late, so the host never waits for the step just started
            running = Running(done, metrics, parts)
            last = done == steps
            evaluating = done % recipes[0].eval_every == 0 or last
            stopping = signals.received  # read once: a signal may come at any time
            saving = done % recipes[0].checkpoint_every == 0 or last or stopping
            if not (evaluating or saving):
                continue
            settle(running)  # nothing is judged or saved that a bad step has left
            running = None
            if evaluating:
                evaluate(members, losses, constants, done, mesh)
                for member in members:
                    if member.measures_at(done):
                        member.measure(done)
            if saving:
                for member in members:
                    member.save(done)
            if stopping:
                for member in members:
                    member.checkpoints.finish()
                names = ", ".join(recipe.name for recipe in recipes)
                raise Stopped(f"{names} stopped at step {done}; run the same command to resume")
            for member in members:
                member.log.restart(done)
        return [member.finish() for member in members]


def common_step(members: Sequence[Member]) -> int:
    """The latest step that all of them have saved. Raises ValueError where some would begin again."""
    latest = {member.recipe.name: max(member.saved_steps()) for member in members}
    common = max(set.intersection(*(member.saved_steps() for member in members)))
    if not common and any(latest.values()):
        told = ", ".join(f"{name} {step}" for name, step in latest.items())
        raise ValueError(f"the runs have saved no common step to go on from (latest: {told}): train them apart")
    return common


def arrays(batch: dict, mesh: Mesh | None = None) -> dict:
    """What a loss reads of a batch, on the devices of a mesh; ids may be anything."""
    return place_batch({name: value for name, value in batch.items() if name != "ids"}, mesh)


def devices_of(state: TrainState) -> set[jax.Device]:
    return set().union(*(leaf.sharding.device_set for leaf in jax.tree.leaves(state.params)))
