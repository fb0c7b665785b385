"""TEMPORARY: the engine's interface, answering one request after the other. To be replaced by the real one."""

import dataclasses
import queue
import threading
import time

import numpy as np

from jaxspec.drafters.drafter import Drafter
from jaxspec.generator import Generator, Piece, Result
from jaxspec.metrics import GenerationStats
from jaxspec.serving.requests import EngineSettings, QueueFull, Request, Served, Stopping, Stream
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.target import Target


@dataclasses.dataclass(frozen=True)
class CacheUse:
    hits: int = 0
    misses: int = 0
    bytes: int = 0
    limit: int = 0


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What an engine did so far, and does now; totals count from its start."""

    running: int  # requests in a slot
    waiting: int  # in the queue
    slots: int
    drafts: int = 0  # rounds with a draft, over rows
    draft_tokens: int = 0  # drafted depth: most draft tokens that could have been accepted
    accepted_tokens: int = 0
    accepted_at_position: tuple[int, ...] = ()  # entry i: rounds in which at least i + 1 draft tokens were accepted
    rounds: int = 0  # verification steps over rows, with drafts or without
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)  # finish_reason -> requests
    images: CacheUse = CacheUse()
    prefixes: CacheUse = CacheUse()
    compilations: int = 0
    tree: str = ""  # what the latest round drafted, such as "3/8/30" or "none"


class Engine:
    """Answers many requests at once.

    Args:
      target: from `load_target`.
      drafter: from `load_drafter` for this target, or None.
      tree: the drafter's own by default.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        tree: TreeConfig | None = None,
        settings: EngineSettings = EngineSettings(),
    ) -> None:
        self.settings = settings
        self.generator = Generator(target, drafter, tree, settings.max_length)
        self.target, self.drafter, self.tree = target, drafter, self.generator.tree
        self.max_length = self.generator.max_length
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting = 0
        self._stopping = False
        self._counts = {"rounds": 0, "drafts": 0, "accepted_tokens": 0, "prompt_tokens": 0, "generated_tokens": 0}
        self._finished: dict[str, int] = {}
        self._running = 0
        self.ready = False

    def start(self) -> "Engine":
        """Begin to answer, in a thread of its own. `ready` says when everything is compiled."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.ready = True
        return self

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, answer those that were taken for so long, cancel the others, end the thread."""
        self._stopping = True
        self._queue.put(None)
        self._thread.join()

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def check(self, prompt: EncodedPrompt, sampling: SamplingParams, max_new_tokens: int) -> None:
        """Raises ValueError for what cannot be answered."""
        self.generator.check_length(prompt)

    def submit(
        self,
        prompt: EncodedPrompt,
        sampling: SamplingParams = SamplingParams(),
        max_new_tokens: int = 256,
        grammar=None,
        client: str = "",
    ) -> Stream:
        """Queue a request. Raises ValueError for what cannot be answered, `QueueFull`, `Stopping`."""
        if self._stopping:
            raise Stopping("the engine is stopping")
        self.check(prompt, sampling, max_new_tokens)
        if self._waiting >= self.settings.max_queued_requests:
            raise QueueFull(f"{self._waiting} requests wait already")
        cancelled = threading.Event()
        stream = Stream(cancelled.set)
        self._waiting += 1
        self._queue.put(
            (Request(prompt, sampling, max_new_tokens, grammar, client), stream, cancelled, time.perf_counter())
        )
        return stream

    def stats(self) -> EngineStats:
        return EngineStats(
            self._running, self._waiting, self.settings.max_num_seqs, finished=dict(self._finished), **self._counts
        )

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            request, stream, cancelled, submitted = job
            self._waiting -= 1
            self._running = 1
            started = first = time.perf_counter()
            batch = self.generator._batch([request.prompt], request.sampling, request.max_new_tokens)
            last = None
            for number, piece in enumerate(batch.pieces(1)):
                first = time.perf_counter() if number == 0 else first
                last = piece
                if piece.result is not None or cancelled.is_set():
                    break
                stream.put(piece)
            result = last.result
            if result is None:
                stats = GenerationStats.of([0], prompt_tokens=len(request.prompt.input_ids))
                none = np.zeros(0, np.int32)
                result = Result(none, none.astype(bool), "", "cancelled", stats, none)
                last = dataclasses.replace(last, result=result)
            now = time.perf_counter()
            stream.served = Served(started - submitted, first - submitted, now - submitted, 0)
            self._counts["rounds"] += result.stats.rounds
            self._counts["generated_tokens"] += len(result.tokens)
            self._counts["prompt_tokens"] += len(request.prompt.input_ids)
            self._finished[result.finish_reason] = self._finished.get(result.finish_reason, 0) + 1
            self._running = 0
            stream.put(last)
