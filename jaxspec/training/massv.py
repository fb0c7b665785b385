"""MASSV's recipe (arXiv 2505.10526, section 3): a small text model learns to see what the target sees, then to speak as
it does. Each phase is a run of its own; the second starts from the first one's export.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxspec.checkpoints.hub import resolve_folder
from jaxspec.checkpoints.names import abstract
from jaxspec.drafters.checkpoint import load_drafter_folder
from jaxspec.drafters.massv import MassvDrafter, check_tokenizer
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.llava import Projector
from jaxspec.targets.target import Target
from jaxspec.training.drafter import DrafterRecipe, Teacher
from jaxspec.training.losses import next_token_loss


@dataclasses.dataclass(frozen=True)
class MassvRecipe(DrafterRecipe):
    """A drafter made of a small text model."""

    method: str = "massv"
    lm: str = "runs/demo_lm/export"
    """Folder or repo id of a text model with the target's tokenizer; `init_from` takes its place in later phases."""
    phase: Literal[0, 1, 2] = 2
    """1: only the projector learns, the text model stays as it is. 2: both learn. 0: the text model learns without
    images, which is what 2 has to be compared with."""
    depth: int = 4
    top_k: int = 1
    total_tokens: int = 6
    """A chain of 5, as published."""

    def new_draft_model(self, target: Target) -> MassvDrafter:
        return new_massv(target, self.init_from or self.lm, self.phase != 0, self.seed)

    @property
    def needs_images(self) -> bool:
        return self.phase != 0

    def trains(self, path: tuple[Any, ...]) -> bool:
        return self.phase != 1 or path[0] == "projector"

    def loss(
        self, draft_model: MassvDrafter, model: VisionLanguageModel, teacher: Teacher, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Cross-entropy of the answers' tokens. Of the target only its vision features are used; what else the teacher
        computes falls away when the step is compiled."""
        context, answer = teacher
        sequence = draft_model.sequence(context)
        features, _ = draft_model.forward(sequence)
        ids, answer = (jnp.take_along_axis(x, sequence.places, axis=1) for x in (context.input_ids, answer))
        # Image tokens may lie outside of the text model's vocabulary; they are no part of an answer.
        ids = jnp.minimum(ids, draft_model.config.text.vocab_size - 1)
        return next_token_loss(draft_model.language_model, features, ids, answer & sequence.valid)


def new_massv(target: Target, source: str | Path, multimodal: bool, seed: int = 0) -> MassvDrafter:
    """A draft model for a loaded target from `source`, a text model or a MASSV drafter (folder or repo id), in float32.

    A projector that `source` lacks starts fresh; without `multimodal` there is none. Raises ValueError for a target
    without vision features or with another tokenizer than the text model's, and whatever `load_drafter_folder` raises.
    """
    folder = resolve_folder(source)
    check_tokenizer(folder, target.tokenizer)
    draft_model, _ = load_drafter_folder(folder, target.model)
    if not isinstance(draft_model, MassvDrafter):
        raise ValueError(f"{source} is no text model and no MASSV drafter: it holds a {type(draft_model).__name__}")
    if draft_model.config.multimodal == multimodal:
        return draft_model
    width = target.config.vision_width if multimodal else 0
    if multimodal and not width:
        raise ValueError("a multimodal drafter needs a target with vision features, this one reads only text")
    config = dataclasses.replace(draft_model.config, vision_width=width)
    changed = abstract(lambda rngs: MassvDrafter(config, rngs=rngs))
    changed.language_model = draft_model.language_model
    if multimodal:
        changed.projector = Projector(width, config.text.hidden_size, bias=True, rngs=nnx.Rngs(seed))
    return changed
