"""`Generator`: prompts in, text and statistics out, over the jitted decode loop.

Shapes are bucketed and prompts are read in programs of their own (jaxspec/programs.py), so a service compiles few:
for every shape of the tower, every size of chunk and every size of cache.
"""

import copy
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxspec.arguments import (
    check_encoded,
    check_prompt,
    check_sampling,
    image_list,
    image_lists,
    length_limit,
    limit_list,
    prompt_list,
    sampling_list,
    whole_number,
)
from jaxspec.buckets import coarse_bucket
from jaxspec.detokenizer import Detokenizer, TokenReader
from jaxspec.drafters.drafter import Drafter
from jaxspec.drafters.registry import METHODS
from jaxspec.metrics import AcceptanceWatch, GenerationStats, emitted_per_round
from jaxspec.programs import CHUNK, Programs
from jaxspec.prompting import ImageLike, Prompt, encode_prompt
from jaxspec.speculation.logprobs import Logprobs
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.state import DecodeState, Request, finish
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.generation import GenerationDefaults
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.target import Target

ROUNDS_PER_SLICE = 4
"""Verification steps between two looks of the host, when streaming or watching for stop strings."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One finished request."""

    tokens: np.ndarray  # i32 [n], without the prompt, up to a stop token or the token that completed a stop string
    accepted: np.ndarray  # bool [n], True where the token came from the draft
    text: str  # without special tokens, up to where a stop string begins
    finish_reason: str  # "stop", "length", or "error"
    stats: GenerationStats
    text_ends: np.ndarray  # i32 [n], how many characters of the text are complete after each token
    error: str | None = None  # why the answer ends here: the sentence, where finish_reason is "error"
    logprobs: Logprobs[np.ndarray] | None = None  # of the n tokens with k alternatives, where SamplingParams asks for k
    cause: str | None = None  # what was raised then, for the log and not for whoever asked

    def checked(self) -> "Result":
        """The result itself; raises FloatingPointError, with its sentence, where it ended in an error."""
        if self.error is not None:
            raise FloatingPointError(self.error)
        return self


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a stream yields: the text that has become certain, and the tokens of the latest rounds."""

    text: str
    tokens: np.ndarray  # i32 [n]
    accepted: np.ndarray  # bool [n]
    text_ends: np.ndarray  # i32 [n], characters of the whole text that are complete after each token
    result: Result | None = None  # on the last piece
    logprobs: Logprobs[np.ndarray] | None = None  # of these tokens, as in `Result`


class Generator:
    """Generates with a target, sped up by a drafter where there is one.

    Args:
      target: from `load_target`.
      drafter: from `load_drafter` for this target, or None for autoregressive decoding.
      tree: the drafter's own tree by default.
      max_length: most tokens of prompt and answer together; by default all of the target's positions up to 4096.
      allow_local_files: whether paths within messages are opened; those in `images` always are.
      prefill_chunk: tokens of a prompt that are read at a time, a multiple of 4 and at least 16; answers do not depend
        on it.
      generation_config: whether what a request's SamplingParams leave unset is taken from the target's folder
        (`SamplingParams.resolved`); without it they are greedy and unpenalised.

    The answer does not depend on drafter, tree or batch (up to floating-point ties). Raises ValueError for a drafter of
    another target, a tree that the vocabulary cannot fill or the drafter cannot draft, a `max_length` beyond the
    target's positions, and a folder whose sampling defaults are out of range. A drafter with parameters whose drafts
    are hardly ever accepted, or far less often than its folder says, is warned of once (`AcceptanceWarning`), from 64
    greedy rounds on.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        tree: TreeConfig | None = None,
        max_length: int | None = None,
        allow_local_files: bool = False,
        generation_config: bool = True,
        prefill_chunk: int = CHUNK,
    ) -> None:
        if not isinstance(target, Target):
            raise ValueError(f"target must be a Target, from load_target; got {type(target).__name__}")
        if not isinstance(drafter, Drafter | None):
            raise ValueError(f"drafter must be a Drafter, from load_drafter; got {type(drafter).__name__}")
        if not isinstance(tree, TreeConfig | None):
            raise ValueError(f"tree must be a TreeConfig, got {type(tree).__name__}")
        self.max_length = length_limit(max_length, target.config.text.max_position_embeddings)
        if drafter is None:
            if tree is not None and tree.total_tokens > 1:
                raise ValueError(f"a tree of {tree.total_tokens} tokens needs a drafter")
            tree = TreeConfig.autoregressive()
        else:
            check_drafter(drafter, target)
            tree = tree or drafter.tree
            if check_tree := getattr(drafter.model, "check_tree", None):
                check_tree(tree)
        tree.check_vocabulary(target.model.vocab_size)
        self.target, self.drafter, self.tree = target, drafter, tree
        self.generation_defaults = target.generation_defaults if generation_config else GenerationDefaults()
        self._usual_penalties = SamplingParams().resolved(self.generation_defaults).penalties
        self.acceptance_watch = None
        """Judges the drafter, where there is one that is to earn something."""
        if drafter is not None and jax.tree.leaves(nnx.state(drafter.model)):  # prompt lookup may find nothing
            own = tree == drafter.tree
            self.acceptance_watch = AcceptanceWatch(drafter.about.get("mean_acceptance_length") if own else None)
        self.allow_local_files = allow_local_files
        draft_model = drafter.model if drafter else None
        self.programs = Programs(target.model, target.adapter, draft_model, tree, prefill_chunk)
        self._params = self.programs.params_of(target.model, draft_model)

    @property
    def compilations(self) -> int:
        """Programs compiled so far, by this generator and all that share its programs."""
        return self.programs.compilations

    @property
    def acceptance_warning(self) -> str | None:
        """The sentence that was warned with, if the drafter has been found to be of no use."""
        return None if self.acceptance_watch is None else self.acceptance_watch.warning

    @property
    def judges_drafter(self) -> bool:
        """Whether there is a drafter that is to earn something, in training or without parameters it is not."""
        return self.acceptance_watch is not None

    @functools.cached_property
    def token_reader(self) -> TokenReader:
        """How this generator's answers become text."""
        return TokenReader(self.target.tokenizer)

    def with_drafter(self, drafter: Drafter) -> "Generator":
        """This generator with other parameters in its drafter: compiled programs and tree are shared, so that a drafter
        can be measured again and again while it trains; it is not warned of. Raises ValueError for a drafter of another
        structure or of another target."""
        if not isinstance(drafter, Drafter):
            raise ValueError(f"with_drafter needs a Drafter, from load_drafter; got {type(drafter).__name__}")
        check_drafter(drafter, self.target)
        try:
            params = self.programs.params_of(self.target.model, drafter.model)
        except ValueError:
            problem = f"with_drafter needs a drafter of the same method and config, got a {drafter.method} one"
            raise ValueError(problem) from None
        other = copy.copy(self)
        other.drafter, other._params, other.acceptance_watch = drafter, params, None
        return other

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[ImageLike] = (),
        sampling: SamplingParams = SamplingParams(),
        max_new_tokens: int = 256,
        raw: bool = False,
    ) -> Result:
        """One request; see `generate_batch`. Raises FloatingPointError where the target's logits are not finite."""
        return self._single(prompt, images, sampling, max_new_tokens, raw).run()[0].checked()

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
        read, and image marks without images. A request whose logits are not finite ends with the finish_reason "error"
        and a sentence in `error`; the others go on.
        """
        return self._prepare(prompts, images, sampling, max_new_tokens, raw).run()

    def generate_encoded(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
        max_new_tokens: int | Sequence[int] = 256,
    ) -> list[Result]:
        """`generate_batch` of prompts that are encoded already (`jaxspec.prompting.encode_prompt`)."""
        return self._batch(prompt_list(prompts), sampling, max_new_tokens).run()

    def stream(
        self,
        prompt: Prompt,
        images: Sequence[ImageLike] = (),
        sampling: SamplingParams = SamplingParams(),
        max_new_tokens: int = 256,
        raw: bool = False,
        rounds_per_piece: int = ROUNDS_PER_SLICE,
    ) -> Iterator[Piece]:
        """The same request in pieces. Texts join to the result's text; the last piece carries the result. Bad input
        raises ValueError at once, not with the first piece."""
        rounds = whole_number("rounds_per_piece", rounds_per_piece, 1)
        return self._single(prompt, images, sampling, max_new_tokens, raw).pieces(rounds)

    def _single(self, prompt, images, sampling, max_new_tokens, raw) -> "Batch":
        check_prompt(prompt, "the prompt")
        limit = whole_number("max_new_tokens", max_new_tokens, 1)
        return self._prepare([prompt], [image_list(images)], sampling, limit, raw)

    def _prepare(self, prompts, images, sampling, max_new_tokens, raw) -> "Batch":
        prompts = prompt_list(prompts)
        images = image_lists(images, len(prompts))
        # What costs nothing to check comes before the pictures are read.
        sampling, max_new_tokens = sampling_list(sampling, len(prompts)), limit_list(max_new_tokens, len(prompts))
        for index, prompt in enumerate(prompts):
            check_prompt(prompt, f"prompt {index}")
        requests = zip(prompts, images, strict=True)
        encoded = [encode_prompt(self.target, *request, raw, self.allow_local_files) for request in requests]
        return self._batch(encoded, sampling, max_new_tokens)

    def _batch(self, prompts: list[EncodedPrompt], sampling, max_new_tokens) -> "Batch":
        if not prompts:
            raise ValueError("a batch needs at least one prompt, got none")
        params, limits = sampling_list(sampling, len(prompts)), limit_list(max_new_tokens, len(prompts))
        for index, prompt in enumerate(prompts):
            check_encoded(prompt, f"prompt {index}", self.target.adapter)
            self.check_length(prompt, f"prompt {index}")
            check_sampling(params[index], limits[index], self.target.model.vocab_size)
            params[index] = params[index].resolved(self.generation_defaults)
            limits[index] = min(limits[index], self.max_length - len(prompt.input_ids))
        return Batch(self, prompts, params, limits)

    def check_length(self, prompt: EncodedPrompt, name: str = "the prompt") -> None:
        """Raises ValueError for a prompt that leaves no room for an answer."""
        if len(prompt.input_ids) >= self.max_length:
            raise ValueError(
                f"{name} has {len(prompt.input_ids)} tokens; with max_length {self.max_length} it may have at most "
                f"{self.max_length - 1}"
            )


def check_drafter(drafter: Drafter, target: Target) -> None:
    """Raises ValueError for a drafter that was loaded for another target, or whose sizes are not this one's."""
    theirs = drafter.target_fingerprint
    ours = None if theirs is None else target.fingerprint()  # which reads the files
    if ours is not None:
        if theirs != ours:
            raise ValueError(f"the {drafter.method} drafter was loaded for the target {theirs}, not for {ours}")
        return
    method = METHODS.get(drafter.method)
    if method is not None and (problems := method.misfits(drafter.model.config, target.config)):
        raise ValueError(f"the {drafter.method} drafter was made for another target: {', '.join(problems)}")


class Batch:
    """One batch on its way through prefill and decode: arrays, times, texts, and what the host reads back."""

    def __init__(
        self, generator: Generator, prompts: list[EncodedPrompt], sampling: list[SamplingParams], limits: list[int]
    ) -> None:
        self.generator, self.prompts, self.sampling, self.limits = generator, prompts, sampling, limits
        self.prefill_seconds = self.decode_seconds = 0.0
        self.watching = any(params.stop for params in sampling)
        needed = max(len(prompt.input_ids) + limit for prompt, limit in zip(prompts, limits, strict=True))
        self.capacity = min(coarse_bucket(needed), generator.max_length)
        target, ids = generator.target, [prompt.input_ids for prompt in prompts]
        self.request = Request.of(sampling, ids, limits, target.stop_token_ids, target.model.vocab_size)

    @functools.cached_property
    def texts(self) -> list[Detokenizer]:
        """What the rows say."""
        return [Detokenizer(self.generator.token_reader, params.stop) for params in self.sampling]

    def run(self) -> list[Result]:
        """From prefill to the last answer."""
        state = self.start()
        while not self.finished(state):
            state = self.advance(state, ROUNDS_PER_SLICE if self.watching else self.generator.max_length)
        return self.results(state)

    def pieces(self, rounds: int) -> Iterator[Piece]:
        """The same for a single row, `rounds` rounds at a time."""
        state, seen = self.start(), 0
        while True:
            result = self.results(state)[0] if self.finished(state) else None
            tokens, drafted = self.read(state)
            text = self.texts[0]
            new = slice(seen, text.count)
            failed = result is not None and result.error is not None
            ends = np.array(text.ends[new], np.int32)
            logprobs = self.logprobs(state, 0, new)
            yield Piece(text.take(), tokens[0, new], drafted[0, new], ends, None if failed else result, logprobs)
            if result is not None:
                result.checked()
                return
            seen = text.count
            state = self.advance(state, rounds)

    def start(self) -> DecodeState:
        started = time.perf_counter()
        programs, params = self.generator.programs, self.generator._params
        read = programs.read(params, self.prompts, self.capacity)
        state = programs.begin(params, read, self.request, self.prompts, self.capacity)
        jax.block_until_ready(state.root)
        self.prefill_seconds = time.perf_counter() - started
        return self.watched(state)

    def advance(self, state: DecodeState, rounds: int) -> DecodeState:
        """Up to `rounds` more rounds; `state` is consumed."""
        started = time.perf_counter()
        state = self.generator.programs.decode(self.generator._params, state, jnp.int32(rounds))
        jax.block_until_ready(state.done)
        self.decode_seconds += time.perf_counter() - started
        return self.watched(state)

    def watched(self, state: DecodeState) -> DecodeState:
        """The state with the rows done whose stop strings have come: they decode no further."""
        if not self.watching:
            return state
        self.read(state)
        stopped = np.array([text.stopped for text in self.texts])
        return finish(state, stopped) if (stopped & ~np.asarray(state.done)).any() else state

    def read(self, state: DecodeState) -> tuple[np.ndarray, np.ndarray]:
        """Takes in what the rows have said since the last look. Their tokens i32 `[B, T]`, and which were drafted."""
        tokens, drafted, counts = map(np.asarray, jax.device_get((state.tokens, state.from_draft, state.counts)))
        for row, text in enumerate(self.texts):
            text.add(tokens[row, text.count : counts[row]])
        return tokens, drafted

    def logprobs(self, state: DecodeState, row: int, columns: slice) -> Logprobs[np.ndarray] | None:
        """Of these tokens of a row, where it asks for them."""
        count = self.sampling[row].logprobs
        if state.logprobs is None or count is None:
            return None
        own = jax.tree.map(lambda part: part[row], jax.device_get(state.logprobs))
        return Logprobs(own.token_logprobs[columns], own.top_ids[columns, :count], own.top_logprobs[columns, :count])

    def finished(self, state: DecodeState) -> bool:
        return bool(np.asarray(state.done).all())

    def results(self, state: DecodeState) -> list[Result]:
        """The answers, once all rows are done. Each counts the rounds up to the one that gave its last token."""
        tokens, drafted = self.read(state)
        failed, width, results = np.asarray(state.failed), self.generator.tree.max_depth + 1, []
        for row, (text, params) in enumerate(zip(self.texts, self.sampling, strict=True)):
            text.finish()
            ids, accepted = tokens[row, : text.count], drafted[row, : text.count]
            stop_ids = {*self.generator.target.stop_token_ids, *params.stop_token_ids}
            reason, error = "length", None
            if text.stopped or (len(ids) and int(ids[-1]) in stop_ids):
                reason = "stop"
            elif failed[row]:
                reason = "error"
                error = f"prompt {row}: {not_finite(len(self.prompts[row].input_ids), len(ids))}"
            stats = GenerationStats.of(
                emitted_per_round(accepted[1:], width),
                prompt_tokens=len(self.prompts[row].input_ids),
                generated_tokens=len(ids),
                prefill_seconds=self.prefill_seconds,
                decode_seconds=self.decode_seconds,
            )
            logprobs, ends = self.logprobs(state, row, slice(text.count)), np.array(text.ends, np.int32)
            results.append(Result(ids, accepted, text.text, reason, stats, ends, error, logprobs))
        if self.generator.acceptance_watch:
            usual = self.generator._usual_penalties
            judged = [params.temperature == 0 and params.penalties == usual for params in self.sampling]
            self.generator.acceptance_watch.add([each.stats for each, use in zip(results, judged, strict=True) if use])
        return results


def not_finite(prompt_tokens: int, generated: int) -> str:
    """Why an answer ends after so many tokens, where the target's numbers leave its dtype."""
    return (
        f"the logits of the token at position {prompt_tokens + generated} are not finite (NaN or infinity), after "
        f"{generated} generated tokens; weights or activations of the target leave the range of its dtype"
    )
