"""The compiled programs of a target with its drafter, and the host's part in running them.

Programs are shared by everything that decodes with the same models: a generator, its copies with other parameters, an
engine. Each is compiled once for every shape it meets: encoding per shape of the tower, reading per size of chunk (of
chunk and cache where something was read before), beginning per size of prompt and cache, decoding per size of cache.
"""

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxspec.buckets import images_bucket
from jaxspec.checks import whole_number
from jaxspec.drafters.contract import DraftModel
from jaxspec.speculation import loop, prefill
from jaxspec.speculation.prefill import ImageFeatures, Read
from jaxspec.speculation.state import STOP_TOKENS, DecodeState, Report, Request, insert, moved, placed, report
from jaxspec.speculation.tree import Tree, TreeConfig
from jaxspec.splitting import mesh_of, using, whole
from jaxspec.targets.adapter import PromptAdapter
from jaxspec.targets.chunks import Step, images_of, position_offset, steps_of
from jaxspec.targets.contract import VisionLanguageModel
from jaxspec.targets.images import ImageLayout
from jaxspec.targets.prompts import EncodedPrompt

CHUNK = 512
"""Tokens of a prompt that are read at a time."""


class Programs:
    """What is compiled for a target's model, a draft model (or None) and a tree; parameters are arguments, so that
    copies with other ones share it. Where they lie on a mesh, everything runs on it (splitting.py).

    Args:
      model: the target's.
      adapter: of its family.
      draft_model: what drafts for it, or None for autoregressive decoding.
      tree: what it drafts where no other tree is asked for.
      chunk: tokens of a prompt that are read at a time, a multiple of 4 and at least 16.

    Raises ValueError for another chunk.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        adapter: PromptAdapter,
        draft_model: DraftModel | None,
        tree: TreeConfig,
        chunk: int = CHUNK,
    ) -> None:
        self.adapter, self.tree, self.chunk = adapter, tree, whole_number("prefill_chunk", chunk, 16)
        if self.chunk % 4:
            raise ValueError(f"prefill_chunk must be a multiple of 4, got {self.chunk}")
        self.graph, params = nnx.split((model, draft_model))
        self.mesh = mesh_of(params)
        self.vocab_size = model.vocab_size
        self.traced: list[str] = []

        def draft(model, draft_model, state, tree):
            return loop.drafted(model, draft_model, tree, state)

        def confirm(model, draft_model, state, drafted, tree, allowed):
            state, taken = loop.confirm(model, draft_model, tree, state, drafted, allowed)
            return loop.taught(model, draft_model, state, taken)

        def compiled(function: Callable, place: Callable = placed, **options: Any) -> Callable:
            def run(params, *args, **kwargs):
                self.traced.append(function.__name__)  # runs when jit traces, that is once per compiled program
                with using(self.mesh):
                    return place(function(*nnx.merge(self.graph, params), *args, **kwargs))

            return jax.jit(run, **options)

        self._encode = compiled(prefill.encode_image, whole)
        self._no_images = compiled(prefill.no_images, static_argnums=(1, 2))
        self._place = jax.jit(self._counted(prefill.place), donate_argnums=0)
        self._with_room = jax.jit(self._counted(prefill.with_room), static_argnums=1)
        self._read = compiled(prefill.read_chunk, donate_argnums=1)
        self._begin = compiled(loop.begin, static_argnames=("capacity", "max_images"))
        self._idle = compiled(loop.idle, static_argnums=(1, 2, 3, 4))
        self._decode = compiled(loop.decode, donate_argnums=1, static_argnums=3)
        self._decode_undrafted = compiled(loop.decode_undrafted, donate_argnums=1, static_argnums=3)
        self._draft = compiled(draft, static_argnums=2)
        self._confirm = compiled(confirm, donate_argnums=1, static_argnums=3)
        self.insert = jax.jit(self._counted(insert), donate_argnums=0)
        self.moved = jax.jit(self._counted(moved))
        self._report = jax.jit(self._counted(report), static_argnums=(2, 3))

    def _counted(self, function: Callable) -> Callable:
        @functools.wraps(function)
        def run(*args):
            self.traced.append(function.__name__)
            with using(self.mesh):
                return placed(function(*args))

        return run

    def decode(self, params: Any, state: DecodeState, rounds: Any, tree: TreeConfig | None = None) -> DecodeState:
        """As `loop.decode`, with another tree if one is given; `state` is consumed."""
        return self._decode(params, state, rounds, tree or self.tree)

    def decode_undrafted(self, params: Any, state: DecodeState, rounds: Any, window: int) -> DecodeState:
        """As `loop.decode_undrafted`; `state` is consumed."""
        return self._decode_undrafted(params, state, rounds, window)

    def draft(self, params: Any, state: DecodeState, tree: TreeConfig | None = None) -> Tree:
        """The tree that the next round would verify: the first half of a round, for a host that looks at it."""
        return self._draft(params, state, tree or self.tree)

    def confirm(
        self, params: Any, state: DecodeState, drafted: Tree, allowed: Any, tree: TreeConfig | None = None
    ) -> DecodeState:
        """The second half: the state after the round in which the target verified `drafted`, with what `allowed` u32
        `[B, N, W]` lets follow each node; `state` is consumed."""
        return self._confirm(params, state, drafted, tree or self.tree, allowed)

    def idle(
        self, params: Any, batch: int, capacity: int, stop_tokens: int = STOP_TOKENS, extras: bool = False
    ) -> DecodeState:
        """As `loop.idle`."""
        return self._idle(params, batch, capacity, stop_tokens, extras)

    def report(self, state: DecodeState, seen: np.ndarray, width: int, logprobs: bool = False) -> Report[jax.Array]:
        """As `state.report`."""
        return self._report(state, seen, width, logprobs)

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return len(self.traced)

    def params_of(self, model: VisionLanguageModel, draft_model: DraftModel | None) -> nnx.State:
        """The parameters of models with the structure of these programs'. Raises ValueError for others."""
        graph, params = nnx.split((model, draft_model))
        if graph != self.graph:
            raise ValueError("the programs are of models with another structure")
        return params

    def encode(self, params: Any, layout: ImageLayout) -> ImageFeatures:
        """The table of an image; good for every prompt that has the same image (`ImageLayout.key`)."""
        return self._encode(params, self.adapter.collate([layout]))

    def read(
        self,
        params: Any,
        prompts: Sequence[EncodedPrompt],
        capacity: int,
        tables: Mapping[Hashable, ImageFeatures] | None = None,
        past: Read | None = None,
        starts: Sequence[int] | None = None,
    ) -> Read:
        """A batch of prompts, for caches of `capacity` positions. Tables of images are taken from `tables` by their
        key, where they are there. With `past` (consumed) the first `starts[row]` tokens of each are in it already.

        Raises ValueError for a prompt that is longer than `capacity`, and for one of which nothing is left to read: its
        last token must be, since the answer begins with what the target makes of it."""
        for row, prompt in enumerate(prompts):
            length, start = len(prompt.input_ids), starts[row] if starts else 0
            if length > capacity:
                raise ValueError(f"prompt {row} has {length} tokens, the caches have {capacity} positions")
            if not 0 <= start < length:
                raise ValueError(f"prompt {row} has {length} tokens and cannot be read on from token {start}")
        tables, images = dict(tables or {}), images_of(prompts)
        steps = steps_of(self.adapter, prompts, self.chunk, capacity, starts)
        for step in steps:
            for key in step.placements:
                if key not in tables:
                    tables[key] = self.encode(params, images[key])
        read = past
        for step in steps:
            if read is not None and read.cache.capacity < capacity:
                read = self.with_room(read, capacity)
            read = self.read_step(params, read, step, tables)
        assert read is not None  # there is at least one step
        return read

    def with_room(self, read: Read, capacity: int) -> Read:
        """As `prefill.with_room`; the same where it has that room."""
        return read if read.cache.capacity == capacity else self._with_room(read, capacity)

    def read_step(self, params: Any, read: Read | None, step: Step, tables: Mapping[Hashable, ImageFeatures]) -> Read:
        """One chunk of it; `read` is consumed."""
        images, (batch, length) = None, step.chunk.input_ids.shape
        if self.adapter.image_token_ids:  # chunks of all sizes, with images and without, share the programs
            width = max(length, self.chunk)
            images = self._no_images(params, batch, width)
            for key, index in step.placements.items():
                index = np.pad(index, ((0, 0), (0, width - length)), constant_values=-1)
                images = self._place(images, tables[key], index)
        return self._read(params, read, step.chunk, images)

    def begin(
        self,
        params: Any,
        read: Read,
        request: Request[np.ndarray],
        prompts: Sequence[EncodedPrompt],
        capacity: int,
        allowed: np.ndarray | None = None,
        room: int | None = None,
    ) -> DecodeState:
        """The state after the first token of each row, among what is `allowed` u32 `[B, 1, W]`. With `room` it has so
        many positions only, at least one more than its prompts have tokens, and is to be inserted into one of
        `capacity`. Raises ValueError for a row whose prompt and new tokens need more than `capacity` positions."""
        for row, (prompt, limit) in enumerate(zip(prompts, np.asarray(request.max_new_tokens), strict=True)):
            if len(prompt.input_ids) + limit > capacity:
                raise ValueError(
                    f"prompt {row} has {len(prompt.input_ids)} tokens and may have {limit} new ones, the caches have "
                    f"{capacity} positions"
                )
        offsets = np.array([position_offset(prompt) for prompt in prompts], np.int32)
        bound = images_bucket(max(len(prompt.images) for prompt in prompts)) if self.adapter.image_token_ids else 0
        return self._begin(params, read, request, offsets, capacity=room or capacity, max_images=bound, allowed=allowed)
