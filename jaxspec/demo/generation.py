"""The numbered examples of each split: one place that decides which random seed belongs to which scene.

Training data, held-out scores and the demo all number their scenes by (split, seed, index), so that nothing that is
scored was ever trained on, and every example can be made again without a stored file.
"""

from __future__ import annotations

import numpy as np

from jaxspec.demo.language import Turn, ask
from jaxspec.demo.scenes import Scene, sample_scene

SPLITS = ("train", "validation", "test")


def numbered_scene(split: str, index: int, seed: int = 0) -> tuple[Scene, list[Turn]]:
    """Scene number `index` of `split` with its two or three turns; the same arguments always give the same scene.

    Raises:
      ValueError: unknown split, or a negative number.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    if index < 0 or seed < 0:
        raise ValueError(f"index and seed must be at least 0; got index {index} and seed {seed}.")
    rng = np.random.default_rng([SPLITS.index(split), seed, index])
    scene = sample_scene(rng)
    return scene, ask(scene, rng)


def conversation_of(turns: list[Turn]) -> list[dict[str, str]]:
    """The turns in LLaVA's JSON style; the picture belongs to the first question."""
    conversation = []
    for number, turn in enumerate(turns):
        marker = "" if number else "<image>\n"
        conversation.append({"from": "human", "value": marker + turn.question})
        conversation.append({"from": "gpt", "value": turn.answer})
    return conversation
