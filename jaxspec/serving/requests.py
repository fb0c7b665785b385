"""What goes into an engine and what comes out: settings, requests, streams of pieces, and what it refuses."""

import asyncio
import dataclasses
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from jaxspec.checks import whole_number
from jaxspec.generator import Piece, Result
from jaxspec.programs import CHUNK
from jaxspec.speculation.params import SamplingParams
from jaxspec.targets.prompts import EncodedPrompt

MIB = 2**20


class Refused(RuntimeError):
    """An engine takes no more requests at the moment."""


class QueueFull(Refused):
    """As many wait as may."""


class Stopping(Refused):
    """It is being stopped, or was."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """How an engine shares a target among requests.

    Raises ValueError for values out of range.
    """

    max_length: int | None = None
    """Most tokens of prompt and answer together; by default all of the target's positions up to 4096."""
    max_num_seqs: int = 8
    """Requests that are answered at once."""
    max_queued_requests: int = 256
    """Requests that may wait."""
    adaptive: bool = True
    """Draft only as much as pays at the moment; otherwise always the whole tree."""
    batch_invariant: bool = False
    """Always the whole tree, in all slots, and prompts read from their beginning: then how numbers are rounded does not
    depend on what else is asked, either, which decides where two tokens are as good as equal."""
    prefill_chunk: int = CHUNK
    """Tokens of a prompt that are read between two rounds of the others."""
    image_cache_bytes: int = 256 * MIB
    """What the features of images seen before may take; 0 keeps none."""
    prefix_cache_bytes: int | None = None
    """What prompts read before may take; 0 keeps none. By default a quarter of what the slots take, and 256 MiB at
    least."""
    generation_config: bool = True
    """Where a request says nothing of its sampling, the target's generation_config.json does."""
    warm_up: bool = True
    """Compile beforehand what usual requests need; otherwise everything is compiled when it is first needed, and a
    request that needs something new may hold up the others."""

    def __post_init__(self) -> None:
        for name, least in (
            ("max_num_seqs", 1),
            ("max_queued_requests", 0),
            ("image_cache_bytes", 0),
        ):
            whole_number(name, getattr(self, name), least)
        if self.prefix_cache_bytes is not None:
            whole_number("prefix_cache_bytes", self.prefix_cache_bytes, 0)


class Matcher(Protocol):
    """What one answer may go on with, while it comes; W words of 32 tokens each say so as bits."""

    def start(self) -> np.ndarray:
        """What it may begin with, u32 `[W]`."""
        ...

    def accept(self, tokens: list[int]) -> None:
        """Go on by these tokens."""
        ...

    def tree(self, tokens: np.ndarray, parents: np.ndarray, refill: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Of a tree of tokens and parents i32 `[N]`, whose root has been accepted: the tokens, with `refill` other ones
        in place of those that may not be, and what may follow each, u32 `[N, W]`."""
        ...


class Grammar(Protocol):
    """What an answer must look like."""

    def matcher(self, stop_token_ids: Sequence[int] = ()) -> Matcher:
        """For one answer, which these may end, too."""
        ...


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to be answered."""

    prompt: EncodedPrompt
    sampling: SamplingParams
    max_new_tokens: int
    grammar: Grammar | None = None  # that the answer must follow
    client: str = ""  # whose it is: clients take turns in the queue


@dataclasses.dataclass(frozen=True)
class Served:
    """What serving a request took, beside its `Result.stats`. Seconds."""

    queue_seconds: float  # from submission until its prompt began to be read
    first_token_seconds: float  # from submission until the first token
    total_seconds: float  # from submission until the end
    cached_tokens: int  # of the prompt, taken from one read before


class Stream:
    """The answer to one request while it comes: an iterator of `Piece`s, plain or asynchronous, for one reader.

    The last piece carries the `Result`; one whose finish_reason is "error" (not finite logits, an exception in the
    engine) says why in `Result.error`, a sentence for whoever asked; "cancelled" is one that was ended from outside.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._over = False
        self.served: Served | None = None
        """Set with the last piece."""

    def cancel(self) -> None:
        """End it at the next round; from any thread, more than once if need be."""
        self._cancel()

    # -- the engine's side ---------------------------------------------------------------------------------------

    def put(self, piece: Piece) -> None:
        """Hand over the next piece, from the engine's thread."""
        self._pieces.put(piece)
        with self._lock:
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            loop, event = waiting
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:  # its loop is closed: nobody reads any more
                self.cancel()

    # -- the reader's side ---------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Piece]:
        while not self._over:
            yield self._taken(self._pieces.get())

    async def __aiter__(self) -> AsyncIterator[Piece]:
        while not self._over:
            event = asyncio.Event()
            with self._lock:
                self._waiting = asyncio.get_running_loop(), event
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                await event.wait()
                piece = self._pieces.get_nowait()
            yield self._taken(piece)

    def result(self) -> Result:
        """The whole answer; waits for it."""
        result = None
        for piece in self:
            result = piece.result
        assert result is not None  # the last piece has it
        return result

    def _taken(self, piece: Piece) -> Piece:
        self._over = piece.result is not None
        return piece
