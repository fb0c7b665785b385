"""Checkpoints of a run: the two latest states, to resume from, and the parameters with the highest acceptance.

Writing goes on in the background while training does. A write that fails (a full disk) ends the run in one sentence;
what was complete before stays, since orbax gives a checkpoint its name only when all of it is there.
"""

import contextlib
import logging
import os
import re
from collections.abc import Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxspec.quiet import quiet

LATEST, BEST = "checkpoints", "best"


class Checkpoints:
    """A context. `folder` is the run's; `keep_best` where acceptance will be measured.

    Raises OSError, naming the checkpoint that is intact, where one cannot be written.
    """

    def __init__(self, folder: Path, keep_best: bool) -> None:
        self.folder = folder.absolute()
        self.names = (LATEST, BEST) if keep_best else (LATEST,)
        self.managers: dict[str, ocp.CheckpointManager] = {}
        self.begun: int | None = None  # the step whose checkpoint the background may still be writing

    def __enter__(self) -> "Checkpoints":
        with contextlib.ExitStack() as stack:
            # Its threads log every failure with a traceback each; it is raised here anyway.
            stack.enter_context(quiet("absl", logging.CRITICAL))
            self.managers = {name: stack.enter_context(manager(self.folder / name)) for name in self.names}
            self.stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing waits for what is being written; where the run ends in an error, that one says more than another.
        with contextlib.suppress(OSError, ValueError) if error else contextlib.nullcontext():
            self.stack.__exit__(kind, error, trace)

    @property
    def latest(self) -> ocp.CheckpointManager:
        return self.managers[LATEST]

    @property
    def best(self) -> ocp.CheckpointManager:
        """There only with `keep_best`."""
        return self.managers[BEST]

    def resume(self, state: Any, step: int) -> Any:
        """The state saved at `step`, or `state` (its structure and shardings) at 0. Later ones are deleted."""
        for later in [each for each in self.latest.all_steps() if each > step]:
            self.latest.delete(later)
        return restore(self.latest, step, state) if step else state

    def save(self, step: int, state: Any) -> None:
        self.finish()
        self.begun = step
        with self.writing(f"the checkpoint of step {step}"):
            self.latest.save(step, args=ocp.args.StandardSave(state))

    def offer(self, step: int, params: Any, about: dict[str, Any]) -> None:
        """Keep `params` as the best if their `mean_acceptance_length` is higher than that of the best so far.

        A resumed run comes again to steps that it has offered before, on some devices with slightly other numbers.
        """
        kept = self.best_about()
        if kept and (score(kept) >= score(about) or step == self.best.best_step()):
            return
        with self.writing(f"the best checkpoint (step {step})"):
            self.best.save(step, args=ocp.args.StandardSave(params), metrics=about, force=True)  # also before the last
            self.best.wait_until_finished()  # so that `best_about` is what can be read

    def best_about(self) -> dict[str, Any] | None:
        """What was said of the best parameters when they were offered."""
        step = self.best.best_step()
        return None if step is None else self.best.metrics(step)

    def best_params(self, params: Any) -> Any:
        return restore(self.best, self.best.best_step(), params)

    def finish(self) -> int | None:
        """Wait until all is written; the step that can be resumed from."""
        with self.writing(f"the checkpoint of step {self.begun}"):
            self.latest.wait_until_finished()
        return self.latest.latest_step()

    @contextlib.contextmanager
    def writing(
        self, what: str, failures: type[Exception] | tuple[type[Exception], ...] = (OSError, ValueError)
    ) -> Generator[None]:
        """Failures to write, from this block or from what the background still had to do, in one sentence."""
        try:
            yield
        except failures as error:  # the storage under orbax raises ValueError with the system's code in it
            steps = self.latest.all_steps(read=True)
            intact = f"the checkpoint of step {max(steps)} is intact" if steps else "no checkpoint was complete yet"
            raise OSError(
                f"{what} could not be written to {self.folder}: {reason(error)}; {intact}: "
                "the same command goes on once that is mended"
            ) from error


def manager(folder: Path, read_only: bool = False) -> ocp.CheckpointManager:
    best = folder.name == BEST
    with quiet("absl"):  # it warns of everything that reading alone switches off
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1 if best else 2,
            best_fn=score if best else None,
            best_mode="max",
            create=not read_only,
            read_only=read_only,
        )
        return ocp.CheckpointManager(folder, options=options)


def restore(source: ocp.CheckpointManager, step: int | None, like: Any) -> Any:
    """The tree saved at `step` (None: the last of the source) with the structure and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return source.restore(step, args=ocp.args.StandardRestore(abstract))


def score(about: Mapping[str, Any]) -> float:
    return about["mean_acceptance_length"] or 0.0  # None where no round was run


def reason(error: Exception) -> str:
    """The system's words for what went wrong."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else str(error)
