"""`python -m jaxspec export`: a trained drafter as a folder in the published layout."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.checks import whole_number
from jaxspec.drafters.checkpoint import (
    EMBEDDING,
    is_drafter_folder,
    load_drafter_folder,
    read_drafter_folder,
    save_drafter_folder,
)
from jaxspec.drafters.drafter import Drafter, load_drafter
from jaxspec.drafters.eagle import EagleHead
from jaxspec.drafters.registry import METHODS
from jaxspec.drafters.vocabulary import covered, most_frequent
from jaxspec.metrics import Acceptance
from jaxspec.targets.target import DTYPES, Target, load_target


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a drafter (safetensors and config.json) in the layout that its authors publish.

    Nothing about a drafter changes on the way but, where asked, the type of its numbers.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder that training exported, any other drafter folder or repo id, or the folder of a run: of that the best
    checkpoint is taken, or the latest where acceptance was not measured."""
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """A new folder, or a drafter folder to replace."""
    target: Annotated[str | None, tyro.conf.arg(metavar="PATH|REPO")] = None
    """The drafter must fit this target. For a run, the target of its recipe by default."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default as in SOURCE, or as the run's recipe says."""
    draft_vocab_size: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Let an EAGLE-like head draft only so many tokens, those that are most frequent in the target's own answers, with
    the target's LM head of these. Nothing is trained, answers stay the same; a draft step reads so much less."""
    answers_dir: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """The answers, made by `python -m jaxspec distill`. For a run, those of its recipe by default."""

    def run(self, console: Console, arguments: Sequence[str]) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.draft_vocab_size is None and self.answers_dir is not None:
            raise ValueError("answers-dir tells the tokens of a draft vocabulary: give --draft-vocab-size")
        source, output = resolve_folder(self.source), Path(self.output)
        check_replaceable(output)
        if (source / "config.json").is_file():
            drafter, dtype, embedding = self.from_drafter(source)
        elif (source / "recipe.json").is_file():
            drafter, dtype, embedding = self.from_run(source)
        else:
            raise FileNotFoundError(f"{source} is neither a drafter folder (config.json) nor a run (recipe.json)")
        dtype = self.dtype or dtype
        output.parent.mkdir(parents=True, exist_ok=True)
        save_drafter_folder(
            drafter.model, drafter.method, drafter.tree, None, output, dtype, drafter.about, embedding=embedding
        )
        step = f" of step {drafter.about['step']}" if "step" in drafter.about else ""
        if self.draft_vocab_size is not None:
            share = drafter.about["draft_vocab_coverage"]
            step += f", drafting {self.draft_vocab_size} tokens, {share:.2%} of what the answers are made of"
        console.print(f"{METHODS[drafter.method].title} drafter{step}, {dtype}: {output}", markup=False)

    def from_drafter(self, folder: Path) -> tuple[Drafter, str, np.ndarray | None]:
        """The drafter, the dtype that holds all its tensors, and its copy of the embedding."""
        raw, tensors, name = read_drafter_folder(folder)
        embedding = tensors.get(EMBEDDING)
        if self.draft_vocab_size is not None and (self.target is None or self.answers_dir is None):
            raise ValueError("a draft vocabulary needs the target and its own answers: give --target and --answers-dir")
        if self.target is not None:
            target = load_target(self.target)
            drafter = self.narrowed(load_drafter(folder, target), target, self.answers_dir)
            embedding = embedding_of(target) if embedding is None else embedding
        else:
            model, tree = load_drafter_folder(folder, None)
            drafter = Drafter(model, tree, name, raw.get("jaxspec", {}))
        if embedding is None and METHODS[drafter.method].copies_embedding:
            raise ValueError(f"{folder} has no {EMBEDDING}: name its target with --target")
        return drafter, jnp.result_type(*(array.dtype for array in tensors.values())).name, embedding

    def from_run(self, folder: Path) -> tuple[Drafter, str, np.ndarray | None]:
        from jaxspec.training.runs import drafter_of_run, read_recipe  # what training needs loads slowly

        recipe = read_recipe(folder)
        target = load_target(self.target or recipe.target, recipe.target_dtype)
        drafter = drafter_of_run(folder, recipe, target)
        drafter = self.narrowed(drafter, target, self.answers_dir or recipe.answers_dir)
        return drafter, recipe.save_dtype, embedding_of(target)

    def narrowed(self, drafter: Drafter, target: Target, answers_dir: str | None) -> Drafter:
        """The drafter with the draft vocabulary that is asked for, if any. What it accepted before is not told of it.
        Raises ValueError for a drafter that cannot have one, and for answers of another target."""
        size = self.draft_vocab_size
        if size is None or answers_dir is None:
            return drafter
        if not isinstance(drafter.model, EagleHead):
            raise ValueError(
                f"a {METHODS[drafter.method].title} drafter can have no draft vocabulary, only heads of "
                "EAGLE's kind can"
            )
        drafter.tree.check_vocabulary(whole_number("draft_vocab_size", size, 1))
        from jaxspec.data.answers import AnswerSource  # what reads data sets loads slowly

        answers = AnswerSource.of_target(answers_dir, target.fingerprint())
        ids = most_frequent(answers.said(), target.model.vocab_size, size)
        measured = {field.name for field in dataclasses.fields(Acceptance)}
        about = {name: value for name, value in drafter.about.items() if name not in measured}
        about["draft_vocab_coverage"] = covered(answers.said(), ids)
        return dataclasses.replace(drafter, model=drafter.model.narrowed(target.model, ids), about=about)


def embedding_of(target: Target) -> np.ndarray:
    return np.asarray(target.model.embedding)


def check_replaceable(output: Path) -> None:
    """Raises ValueError for what exists and is neither empty nor a drafter folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())) or is_drafter_folder(output):
        return
    raise ValueError(f"{output} exists and is no drafter folder: it is not replaced")
