"""One request on its way through an engine: what it has said so far, who listens, and how it ended."""

import threading
import time
from collections.abc import Callable

import numpy as np

from jaxspec.detokenizer import Detokenizer, TokenReader
from jaxspec.generator import Piece, Result
from jaxspec.metrics import GenerationStats, emitted_per_round
from jaxspec.serving.requests import Matcher, Request, Served, Stream
from jaxspec.speculation.logprobs import Logprobs


class Row:
    """Made when a request is submitted; belongs to one thread at a time.

    Args:
      request: its sampling resolved, its limit cut to what there is room for.
      reader: of the target's tokenizer.
      stop_token_ids: the target's and the request's own.
      width: tokens that a round may emit, at most.
      wake: called when it is cancelled.
    """

    def __init__(
        self,
        request: Request,
        reader: TokenReader,
        stop_token_ids: frozenset[int],
        width: int,
        wake: Callable[[], None],
    ) -> None:
        self.request, self.stop_token_ids, self.width, self._wake = request, stop_token_ids, width, wake
        self.stream = Stream(self.cancel)
        self.text = Detokenizer(reader, request.sampling.stop)
        self.matcher: Matcher | None = None
        """Made when its prompt is read."""
        self.tokens: list[int] = []
        self.accepted: list[bool] = []
        self.seen = 0
        """Tokens that the host has taken from the device."""
        self.done = self.failed = False
        """What the device says of it."""
        self.unseen_depth: int | None = None
        """How deep the tree of a round was that the host has not seen yet."""
        self.failure: str | None = None
        """Why it cannot go on, where something went wrong."""
        self.cause: str | None = None
        """What was raised then."""
        self.over = False
        self.cached_tokens = 0
        self.submitted = time.perf_counter()
        self.began = self.first = 0.0
        self._cancelled = threading.Event()
        self._logprobs: list[Logprobs[np.ndarray]] = []
        self._drafted_depth = 0
        self._handed = 0  # tokens that pieces have told

    def cancel(self) -> None:
        """From any thread."""
        self._cancelled.set()
        self._wake()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()

    @property
    def wants_logprobs(self) -> bool:
        return self.request.sampling.logprobs is not None

    def take(self, tokens: np.ndarray, accepted: np.ndarray, logprobs: Logprobs[np.ndarray] | None = None) -> None:
        """The next tokens i32 `[n]` as the device has them; what comes behind a stop string is none of the answer."""
        if not self.first:
            self.first = time.perf_counter()
        self.seen += len(tokens)
        before = self.text.count
        self.text.add(tokens)
        new = self.text.count - before
        self.tokens += tokens[:new].tolist()
        self.accepted += accepted[:new].tolist()
        if self.wants_logprobs and logprobs is not None:
            count = self.request.sampling.logprobs
            own = logprobs.token_logprobs[:new], logprobs.top_ids[:new, :count], logprobs.top_logprobs[:new, :count]
            self._logprobs.append(Logprobs(*own))

    def drafted(self, rounds: int, depth: int) -> None:
        """So many rounds were seen, of trees of that depth but for the one that was unseen before."""
        first = depth if self.unseen_depth is None else self.unseen_depth
        self._drafted_depth += first + (rounds - 1) * depth if rounds else 0
        self.unseen_depth = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string or a stop token has ended it."""
        return self.text.stopped or (bool(self.tokens) and self.tokens[-1] in self.stop_token_ids)

    def tell(self) -> None:
        """Hand over what has come since the last piece, if anything has."""
        if len(self.tokens) > self._handed:
            self.stream.put(self._piece())

    def finish(self, reason: str, error: str | None = None, cause: str | None = None) -> Result:
        """The last piece. Nothing may be taken after it."""
        self.over = True
        self.text.finish()
        now = time.perf_counter()
        began, first = self.began or now, self.first or now
        accepted = np.array(self.accepted, bool)
        emitted = emitted_per_round(accepted[1:], self.width)
        stats = GenerationStats.of(
            emitted,
            self._drafted_depth,
            prompt_tokens=len(self.request.prompt.input_ids),
            generated_tokens=len(self.tokens),
            prefill_seconds=first - began,
            decode_seconds=now - first,
        )
        tokens, ends = np.array(self.tokens, np.int32), np.array(self.text.ends, np.int32)
        logprobs = joined(self._logprobs) if self.wants_logprobs else None
        result = Result(tokens, accepted, self.text.text, reason, stats, ends, error, logprobs, cause)
        self.stream.served = Served(
            began - self.submitted, first - self.submitted, now - self.submitted, self.cached_tokens
        )
        self.stream.put(self._piece(result))
        return result

    def _piece(self, result: Result | None = None) -> Piece:
        new = slice(self._handed, len(self.tokens))
        self._handed = len(self.tokens)
        logprobs = None
        if self.wants_logprobs:
            whole = joined(self._logprobs)
            logprobs = Logprobs(whole.token_logprobs[new], whole.top_ids[new], whole.top_logprobs[new])
        return Piece(
            self.text.take(),
            np.array(self.tokens[new], np.int32),
            np.array(self.accepted[new], bool),
            np.array(self.text.ends[new], np.int32),
            result,
            logprobs,
        )


def joined(parts: list[Logprobs[np.ndarray]]) -> Logprobs[np.ndarray]:
    """One behind the other; `parts` becomes the whole."""
    if not parts:
        return Logprobs(np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))
    if len(parts) > 1:
        parts[:] = [
            Logprobs(
                np.concatenate([part.token_logprobs for part in parts]),
                np.concatenate([part.top_ids for part in parts]),
                np.concatenate([part.top_logprobs for part in parts]),
            )
        ]
    return parts[0]


def sentence(error: Exception) -> str:
    """What an exception says, in one line of some length."""
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
