"""`Generator`: prompts in, text and statistics out, over the jitted decode loop.

Shapes are bucketed, so a service compiles a handful of programs: one per (batch, prompt bucket, cache bucket, images).
"""

import copy
import dataclasses
import numbers
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.buckets import bucket
from jaxspec.metrics import GenerationStats
from jaxspec.prompting import ImageLike, Prompt, encode_prompt
from jaxspec.speculation import loop
from jaxspec.speculation.sampling import BatchSampling, SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.prompts import EncodedPrompt, stack_prompts

ROUNDS_PER_SLICE = 4
"""Verification steps between two looks of the host, when streaming or watching for stop strings."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished request."""

    tokens: np.ndarray  # i32 [n], without the prompt; a stop token is the last one
    accepted: np.ndarray  # bool [n], True where the token came from the draft
    text: str  # without special tokens and stop strings
    finish_reason: str  # "stop" or "length"
    stats: GenerationStats


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream yields: the text that has become certain, and the tokens of the latest rounds."""

    text: str
    tokens: np.ndarray  # i32 [n]
    accepted: np.ndarray  # bool [n]
    result: Result | None = None  # on the last piece


class Generator:
    """Generates with a target, sped up by a drafter where there is one.

    Args:
      target: from `load_target`.
      drafter: from `load_drafter`, or None for autoregressive decoding.
      tree: the drafter's own tree by default.
      max_length: most tokens of prompt and answer together.
      allow_local_files: whether paths within messages are opened; those in `images` always are.

    The answer does not depend on drafter, tree or batch (up to floating-point ties). Raises ValueError for a tree that
    the vocabulary cannot fill or the drafter cannot draft, and for a `max_length` beyond the target's positions.
    """

    def __init__(
        self,
        target,
        drafter=None,
        tree: TreeConfig | None = None,
        max_length: int = 4096,
        allow_local_files: bool = False,
    ):
        limit = target.config.text.max_position_embeddings
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {max_length}")
        if drafter is None:
            if tree is not None and tree.total_tokens > 1:
                raise ValueError(f"a tree of {tree.total_tokens} tokens needs a drafter")
            tree = TreeConfig.autoregressive()
        else:
            tree = tree or drafter.tree
            if check_tree := getattr(drafter.model, "check_tree", None):
                check_tree(tree)
        tree.check_vocabulary(target.config.text.vocab_size)
        self.target, self.drafter, self.tree = target, drafter, tree
        self.max_length = min(max_length, limit)
        self.allow_local_files = allow_local_files
        graph, self._params = nnx.split((target.model, drafter.model if drafter else None))
        self._graph, self._traced = graph, []

        def counted(function):
            def traced(params, *args, **kwargs):
                self._traced.append(function)  # runs when jit traces, that is once per compiled program
                model, head = nnx.merge(graph, params)
                return function(model, head, tree, *args, **kwargs)

            return traced

        self._prefill = jax.jit(counted(loop.prefill), static_argnames=("capacity", "max_new"))
        self._decode = jax.jit(counted(loop.decode), donate_argnums=1)

    @property
    def compilations(self) -> int:
        """Programs compiled so far, by this generator and all that share its programs."""
        return len(self._traced)

    def with_drafter(self, drafter) -> "Generator":
        """This generator with other parameters in its drafter: compiled programs and tree are shared, so that a drafter
        can be measured again and again while it trains. Raises ValueError for a drafter of another structure."""
        graph, params = nnx.split((self.target.model, drafter.model))
        if graph != self._graph:
            raise ValueError(f"with_drafter needs a drafter of the same method and config, got a {drafter.method} one")
        other = copy.copy(self)
        other.drafter, other._params = drafter, params
        return other

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[ImageLike] = (),
        sampling: SamplingParams = SamplingParams(),
        max_new_tokens: int = 256,
        raw: bool = False,
    ) -> Result:
        """One request; see `generate_batch`."""
        return self.generate_batch([prompt], [images], [sampling], [max_new_tokens], raw)[0]

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Sequence[ImageLike]] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        max_new_tokens: int | Sequence[int] = 256,
        raw: bool = False,
    ) -> list[Result]:
        """Lists with one entry per request (`sampling` and `max_new_tokens` may also be one for all).

        Raises ValueError, before anything is compiled, for prompts that do not fit `max_length`, images that cannot be
        read, and image marks without images.
        """
        return self._prepare(prompts, images, sampling, max_new_tokens, raw).run()

    def generate_encoded(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        max_new_tokens: int | Sequence[int] = 256,
    ) -> list[Result]:
        """`generate_batch` of prompts that are encoded already (`jaxspec.prompting.encode_prompt`)."""
        return self._batch(prompts, sampling, max_new_tokens).run()

    def stream(
        self,
        prompt: Prompt,
        images: Sequence[ImageLike] = (),
        sampling: SamplingParams = SamplingParams(),
        max_new_tokens: int = 256,
        raw: bool = False,
        rounds_per_piece: int = ROUNDS_PER_SLICE,
    ) -> Iterator[Piece]:
        """The same request in pieces. Texts join to the result's text; the last piece carries the result."""
        batch = self._prepare([prompt], [images], sampling, max_new_tokens, raw)
        state = batch.start()
        seen, shown = 0, ""
        while True:
            finished = batch.finished(state)
            result = batch.results(state)[0]
            # A text may still change at its end: half a character, or the beginning of a stop string.
            text = result.text if finished else stable_text(result.text, batch.sampling[0].stop)
            tokens, accepted = result.tokens[seen:], result.accepted[seen:]
            yield Piece(text[len(shown) :], tokens, accepted, result if finished else None)
            if finished:
                return
            seen, shown = len(result.tokens), text
            state = batch.advance(state, rounds_per_piece)

    def _prepare(self, prompts, images, sampling, max_new_tokens, raw) -> "Batch":
        if isinstance(prompts, str):
            raise ValueError("generate_batch needs a list of prompts, got one string; generate takes a single prompt")
        count = len(prompts)
        images = [()] * count if images is None else images
        if len(images) != count:
            raise ValueError(f"images has {len(images)} entries for {count} prompts")
        requests = zip(prompts, images, strict=True)
        encoded = [encode_prompt(self.target, *request, raw, self.allow_local_files) for request in requests]
        return self._batch(encoded, sampling, max_new_tokens)

    def _batch(self, prompts: Sequence[EncodedPrompt], sampling, max_new_tokens) -> "Batch":
        count = len(prompts)
        if not count:
            raise ValueError("a batch needs at least one prompt, got none")
        sampling = [sampling] * count if isinstance(sampling, SamplingParams) else list(sampling)
        limits = [max_new_tokens] * count if isinstance(max_new_tokens, numbers.Integral) else list(max_new_tokens)
        for name, values in (("sampling", sampling), ("max_new_tokens", limits)):
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} entries for {count} prompts")
        for index, prompt in enumerate(prompts):
            if limits[index] < 1:
                raise ValueError(f"max_new_tokens must be at least 1, got {limits[index]}")
            self.check_length(prompt, f"prompt {index}")
            limits[index] = min(int(limits[index]), self.max_length - len(prompt.input_ids))
        return Batch(self, list(prompts), sampling, limits)

    def check_length(self, prompt: EncodedPrompt, name: str = "the prompt") -> None:
        """Raises ValueError for a prompt that leaves no room for an answer."""
        if len(prompt.input_ids) >= self.max_length:
            raise ValueError(
                f"{name} has {len(prompt.input_ids)} tokens; with max_length {self.max_length} it may have at most "
                f"{self.max_length - 1}"
            )


class Batch:
    """One batch on its way through prefill and decode: arrays, times, and what the host reads back."""

    def __init__(
        self, generator: Generator, prompts: list[EncodedPrompt], sampling: list[SamplingParams], limits: list[int]
    ):
        self.generator, self.prompts, self.sampling, self.limits = generator, prompts, sampling, limits
        self.prefill_seconds = self.decode_seconds = 0.0
        longest = bucket(max(len(prompt.input_ids) for prompt in prompts))
        self.max_new = bucket(max(limits))
        self.capacity = max(longest, min(longest + self.max_new, generator.max_length))
        self.prompt = stack_prompts(generator.target.config, prompts, longest)
        stops = [(*generator.target.stop_token_ids, *params.stop_token_ids) for params in sampling]
        width = -(-max(map(len, stops)) // 4) * 4  # in steps of 4: extra stop tokens rarely mean another program
        self.request = loop.Request(
            sampling=BatchSampling.from_params(sampling),
            max_new_tokens=np.array(limits, np.int32),
            stop_token_ids=np.array([[*row, *[-1] * (width - len(row))] for row in stops], np.int32),
        )

    def run(self) -> list[Result]:
        """From prefill to the last answer."""
        state = self.start()
        watching = any(params.stop for params in self.sampling)
        while not self.finished(state):
            state = self.advance(state, ROUNDS_PER_SLICE if watching else self.generator.max_length)
        return self.results(state)

    def start(self) -> loop.DecodeState:
        started = time.perf_counter()
        state = self.generator._prefill(
            self.generator._params, self.prompt, self.request, capacity=self.capacity, max_new=self.max_new
        )
        jax.block_until_ready(state.root)
        self.prefill_seconds = time.perf_counter() - started
        return state

    def advance(self, state: loop.DecodeState, rounds: int) -> loop.DecodeState:
        """Up to `rounds` more rounds; `state` is consumed."""
        started = time.perf_counter()
        state = self.generator._decode(self.generator._params, state, jnp.int32(rounds))
        jax.block_until_ready(state.done)
        self.decode_seconds += time.perf_counter() - started
        return state

    def finished(self, state: loop.DecodeState) -> bool:
        done = np.asarray(state.done)
        if done.all() or not any(params.stop for params in self.sampling):
            return bool(done.all())
        tokens, counts = np.asarray(state.tokens), np.asarray(state.counts)
        return all(
            done[row] or self.stop_at(tokens[row, : counts[row]], params.stop)[0] is not None
            for row, params in enumerate(self.sampling)
        )

    def results(self, state: loop.DecodeState) -> list[Result]:
        """What the rows hold now."""
        tokens, drafted, counts, emitted = map(
            np.asarray, jax.device_get((state.tokens, state.from_draft, state.counts, state.emitted))
        )
        results = []
        for row, params in enumerate(self.sampling):
            ids = tokens[row, : counts[row]]
            stop, text = self.stop_at(ids, params.stop)
            if stop is not None:
                ids = ids[:stop]
            stop_ids = {*self.generator.target.stop_token_ids, *params.stop_token_ids}
            stopped = stop is not None or (len(ids) > 0 and int(ids[-1]) in stop_ids)
            stats = GenerationStats.of(
                emitted[row],
                prompt_tokens=len(self.prompts[row].input_ids),
                generated_tokens=len(ids),
                prefill_seconds=self.prefill_seconds,
                decode_seconds=self.decode_seconds,
            )
            results.append(Result(ids, drafted[row, : len(ids)], text, "stop" if stopped else "length", stats))
        return results

    def stop_at(self, ids: np.ndarray, stops: tuple[str, ...]) -> tuple[int | None, str]:
        """How many tokens stay when the text is cut at the stop string that is complete first (None where there is
        none), and the text. The answer is the same however many tokens follow that one."""

        def decode(count):
            return self.generator.target.tokenizer.decode(ids[:count], skip_special_tokens=True).lstrip(" ")

        text = decode(len(ids))
        if not any(stop in text for stop in stops):
            return None, text
        count = next(n for n in range(1, len(ids) + 1) if any(stop in decode(n) for stop in stops))
        text = decode(count)
        return count, text[: min(text.find(stop) for stop in stops if stop in text)]


def stable_text(text: str, stops: tuple[str, ...]) -> str:
    """The part of a growing text that later tokens cannot change."""
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]
