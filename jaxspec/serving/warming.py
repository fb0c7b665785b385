"""Compiling beforehand: first what a single request needs, then one number of slots after the other, while requests are
answered already in those that are compiled."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from jaxspec.detokenizer import TokenReader
from jaxspec.prompting import encode_prompt
from jaxspec.serving.reading import PromptReader
from jaxspec.serving.requests import Request
from jaxspec.serving.row import Row
from jaxspec.serving.slots import Slots
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.target import Target

WORDS, SIDE = "What is this?", 336


class WarmUp:
    """That of an engine.

    Args:
      target: whose usual prompts are read.
      slots: of which as many are offered as are compiled.
      reader: of prompts.
      trees: that rows may be decoded with.
      compiled: is told of every number of slots for which everything is compiled.
    """

    def __init__(
        self,
        target: Target,
        slots: Slots,
        reader: PromptReader,
        trees: Sequence[TreeConfig],
        compiled: Callable[[int], None],
    ) -> None:
        self.target, self.slots, self.reader, self.trees, self.compiled = target, slots, reader, trees, compiled
        self.waiting = slots.sizes[1:]

    def first(self) -> None:
        """What one request at a time needs."""
        self.slots.sizes = self.slots.sizes[:1]
        for prompt in usual_prompts(self.target):
            if len(prompt.input_ids) >= self.slots.capacity:
                continue
            params = SamplingParams().resolved(self.target.generation_defaults)
            row = Row(Request(prompt, params, 1), TokenReader(self.target.tokenizer), frozenset(), 1, lambda: None)
            self.reader.begin(row, keep=False)
        self.slots.compile(self.slots.sizes[0], self.trees)
        self.compiled(self.slots.sizes[0])

    def rest(self, stopped: Callable[[], bool]) -> bool:
        """What more need; whether it came to its end."""
        while self.waiting:
            if stopped():
                return False
            size = self.waiting.pop(0)
            self.slots.compile(size, self.trees)
            self.compiled(size)
            self.slots.sizes = [*self.slots.sizes, size]
        return True


def usual_prompts(target: Target) -> list[EncodedPrompt]:
    """A question, and one about a picture where the target sees. What its template refuses is left out."""
    picture = Image.fromarray(np.full((SIDE, SIDE, 3), 127, np.uint8))
    prompts = []
    for images in ([], [picture]) if target.adapter.image_token_ids else ([],):
        with contextlib.suppress(ValueError):
            prompts.append(encode_prompt(target, WORDS, images))
    return prompts
