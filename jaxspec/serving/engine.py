"""The engine: one target, one drafter, many requests at once.

    with Engine(target, drafter) as engine:
        stream = engine.submit(prompt, SamplingParams(temperature=1.0, seed=7), max_new_tokens=200)
        for piece in stream: ...           # or: async for; or stream.result()

Two threads share the device: one reads prompts (reading.py), the engine's own runs rounds for all rows that have begun
(slots.py), with as much drafting as pays (adaptive.py). Between two rounds rows come and go. An answer is the same as
alone, at every temperature.
"""

import logging
import threading
import time
from collections import Counter, deque

import numpy as np

from jaxspec.arguments import check_encoded, check_sampling
from jaxspec.checks import whole_number
from jaxspec.drafters.drafter import Drafter
from jaxspec.generator import Generator, not_finite
from jaxspec.metrics import Acceptance
from jaxspec.serving.adaptive import Controller, Load, named, smaller_trees
from jaxspec.serving.reading import Begun, Cancelled, FairQueue, PromptReader, ReadingThread
from jaxspec.serving.requests import MIB, EngineSettings, Grammar, QueueFull, Request, Stopping, Stream
from jaxspec.serving.row import Row, sentence
from jaxspec.serving.slots import STOP_WIDTH, Ran, Slots, rounds_of
from jaxspec.serving.stats import EngineStats
from jaxspec.serving.warming import WarmUp
from jaxspec.speculation.params import SamplingParams
from jaxspec.speculation.tree import TreeConfig
from jaxspec.targets.prompts import EncodedPrompt
from jaxspec.targets.target import Target

log = logging.getLogger(__name__)
STOPPED = "the engine has stopped"


class Engine:
    """Answers many requests at once.

    Args:
      target: from `load_target`.
      drafter: from `load_drafter` for this target, or None.
      tree: the drafter's own by default.
      settings: how requests share them.

    Raises ValueError as `Generator`.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        tree: TreeConfig | None = None,
        settings: EngineSettings = EngineSettings(),
    ) -> None:
        generator = Generator(
            target, drafter, tree, settings.max_length, False, settings.generation_config, settings.prefill_chunk
        )
        self.target, self.drafter, self.tree, self.settings = target, drafter, generator.tree, settings
        self.max_length = generator.max_length
        self.generation_defaults = generator.generation_defaults
        self.programs, params = generator.programs, generator._params
        self._reader_of_tokens = generator.token_reader
        width = self.tree.max_depth + 1
        adaptive = settings.adaptive and not settings.batch_invariant
        self._trees = smaller_trees(self.tree) if adaptive else [self.tree]
        self._controller = Controller(self._trees)
        self._slots = Slots(self.programs, params, self.max_length, settings.max_num_seqs, width)
        if settings.batch_invariant:
            self._slots.sizes = [settings.max_num_seqs]
        self._prompts = PromptReader(
            self.programs,
            params,
            self.max_length,
            target.stop_token_ids,
            settings.image_cache_bytes,
            self.prefix_cache_bytes,
        )
        self._watch = generator.acceptance_watch
        self._usual_penalties = SamplingParams().resolved(self.generation_defaults).penalties
        self._queue, self._begun, self._reading = FairQueue(), deque[Begun](), 0
        self._read = 0  # prompts whose reading has begun so far
        self._changed = threading.Condition()
        self._news, self._stopping, self._deadline = False, False, float("inf")
        self.failure: str | None = None
        """Why it answers nothing any more, where something broke it: for who runs it, not for clients."""
        self._cause: str | None = None  # what was raised then
        self._counts: Counter[str] = Counter()
        self._positions = np.zeros(width - 1, np.int64)
        self._tree_name = ""
        self._warm = threading.Event()
        self._threads: list[threading.Thread | ReadingThread] = []

    @property
    def prefix_cache_bytes(self) -> int:
        """What prompts read before may take."""
        given, slots = self.settings.prefix_cache_bytes, self._slots
        if self.settings.batch_invariant:
            return 0
        return max(256 * MIB, slots.nbytes // 4) if given is None else given

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> "Engine":
        """Begin to answer. `ready` says when everything is compiled; requests are answered before that, too."""
        if self._threads:
            raise RuntimeError("an engine starts once")
        reading = ReadingThread(self._prompts, self._next_row, self._has_begun, self._reading_failed)
        rounds = threading.Thread(target=self._run, name="jaxspec-rounds", daemon=True)
        self._threads = [reading, rounds]
        for thread in self._threads:
            thread.start()
        return self

    def stop(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, go on answering those that were taken for so long, cancel the others, end the
        threads."""
        with self._changed:
            self._news = self._stopping = True
            self._deadline = time.perf_counter() + drain_seconds
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def ready(self) -> bool:
        """Whether everything that usual requests need is compiled."""
        return self._warm.is_set()

    @property
    def acceptance_warning(self) -> str | None:
        """The sentence that was warned with, if the drafter has been found to be of no use."""
        return None if self._watch is None else self._watch.warning

    # -- requests ------------------------------------------------------------------------------------------------

    def check(self, prompt: EncodedPrompt, sampling: SamplingParams, max_new_tokens: int) -> None:
        """Raises ValueError for what cannot be answered."""
        self._resolved(prompt, sampling, max_new_tokens, None)

    def submit(
        self,
        prompt: EncodedPrompt,
        sampling: SamplingParams = SamplingParams(),
        max_new_tokens: int = 256,
        grammar: Grammar | None = None,
        client: str = "",
    ) -> Stream:
        """Queue a request, from any thread.

        Args:
          prompt: from `encode_prompt`.
          sampling: how tokens are chosen, and where the answer stops.
          max_new_tokens: at least 1; cut to what there is room for.
          grammar: that the answer must follow.
          client: whose it is; clients take turns.

        Raises ValueError for what cannot be answered, QueueFull and Stopping where it is not taken.
        """
        request = self._resolved(prompt, sampling, max_new_tokens, grammar, client)
        ends = frozenset((*self.target.stop_token_ids, *request.sampling.stop_token_ids))
        with self._changed:
            if self._stopping:
                raise Stopping(STOPPED if self.failure else "the engine is being stopped and takes no more requests")
            waiting, limit = len(self._queue), self.settings.max_queued_requests
            # Who can have a slot at once does not wait.
            if waiting >= limit + max(0, self._slots.free - self._reading - len(self._begun)):
                raise QueueFull(f"{waiting} requests wait already, as many as may")
            row = Row(request, self._reader_of_tokens, ends, self._slots.width, self._wake)
            self._queue.put(row)
            self._changed.notify_all()
        return row.stream

    def stats(self) -> EngineStats:
        """A snapshot, from any thread."""
        with self._changed:
            running = len(self._slots.running) + len(self._begun) + self._reading
            counts, waiting = Counter(self._counts), len(self._queue)
            positions = tuple(self._positions.tolist())
        finished = {name.removeprefix("finished "): n for name, n in counts.items() if name.startswith("finished ")}
        return EngineStats(
            running=running,
            waiting=waiting,
            slots=self.settings.max_num_seqs,
            accepted_at_position=positions,
            finished=finished,
            images=self._prompts.images.use(),
            prefixes=self._prompts.prefixes.use(),
            compilations=self.programs.compilations,
            tree=self._tree_name,
            costs=tuple(self._controller.table()),
            **{name: n for name, n in counts.items() if not name.startswith("finished ")},
        )

    def _resolved(
        self,
        prompt: EncodedPrompt,
        sampling: SamplingParams,
        max_new_tokens: int,
        grammar: Grammar | None,
        client: str = "",
    ) -> Request:
        check_encoded(prompt, "the prompt", self.target.adapter)
        length, limit = len(prompt.input_ids), whole_number("max_new_tokens", max_new_tokens, 1)
        if length >= self.max_length:
            raise ValueError(
                f"the prompt has {length} tokens; with max_length {self.max_length} it may have at most "
                f"{self.max_length - 1}"
            )
        check_sampling(sampling, limit, self.target.model.vocab_size)
        most = STOP_WIDTH - len(self.target.stop_token_ids)
        if len(sampling.stop_token_ids) > most:
            raise ValueError(f"stop_token_ids may have {most} entries, got {len(sampling.stop_token_ids)}")
        sampling = sampling.resolved(self.generation_defaults)
        if grammar is not None and sampling.min_tokens:
            raise ValueError(
                f"min_tokens cannot be kept where a grammar says when an answer ends, got {sampling.min_tokens}"
            )
        return Request(prompt, sampling, min(limit, self.max_length - length), grammar, client)

    # -- between the threads -------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _next_row(self) -> Row | None:
        """For the reading thread: the next prompt, once there will be a slot for it. One more may wait with its first
        token, so that a slot is taken as soon as it is free."""
        with self._changed:
            while True:
                if self._stopping and (self._overdue or not len(self._queue)):
                    return None
                if len(self._queue) and len(self._begun) < max(1, self._slots.free):
                    row = self._queue.get()
                    row.began = time.perf_counter()
                    self._reading, self._read = self._reading + 1, self._read + 1
                    return row
                self._changed.wait()

    def _has_begun(self, begun: Begun) -> None:
        over = self._over(begun.row)
        with self._changed:
            self._reading -= 1
            self._counts["prompt_tokens"] += len(begun.row.request.prompt.input_ids)
            self._counts["cached_prompt_tokens"] += begun.row.cached_tokens
            if not over and self.failure is None:
                begun.row.tell()  # before the other thread has anything to tell
                self._begun.append(begun)
            self._changed.notify_all()
        if over:
            self._end(begun.row)
        elif self.failure is not None:
            self._finish(begun.row, "error", STOPPED, self._cause)

    def _reading_failed(self, row: Row, error: Exception) -> None:
        with self._changed:
            self._reading -= 1
            self._changed.notify_all()
        if isinstance(error, Cancelled):
            self._finish(row, "cancelled")
        else:
            log.error("reading a prompt failed", exc_info=error)
            self._finish(row, "error", "reading the prompt failed", sentence(error))

    @property
    def _overdue(self) -> bool:
        return time.perf_counter() >= self._deadline

    # -- the engine's thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # e.g. what is compiled beforehand does not fit the device
            self._break(error)

    def _break(self, error: Exception) -> None:
        """Everybody hears that nothing more will be answered."""
        log.error(STOPPED, exc_info=error)
        with self._changed:
            self._stopping, self._deadline, self._cause = True, 0.0, sentence(error)
            self.failure = f"{STOPPED}: {self._cause}"
            left = [*self._queue.remove(lambda row: True), *(each.row for each in self._begun), *self._slots.clear()]
            self._begun.clear()
            self._changed.notify_all()
        for row in left:
            self._finish(row, "error", STOPPED, self._cause)

    def _serve(self) -> None:
        if self.settings.warm_up:
            warm_up = WarmUp(self.target, self._slots, self._prompts, self._trees, self._costs)
            warm_up.first()
            rest = threading.Thread(target=self._warm_up_rest, args=(warm_up,), name="jaxspec-warm-up", daemon=True)
            self._threads.append(rest)  # a process that ended while it compiles would be aborted
            rest.start()
        else:
            self._warm.set()
        while self._wait():
            self._leave()
            self._join()
            if self._slots.running:
                self._decode()

    def _costs(self, size: int) -> None:
        """Measure what rounds in so many slots take, if nothing else is done meanwhile."""
        if len(self._trees) == 1:
            return
        for tree in self._trees:
            before, busy = self._read, self.stats().running
            seconds = self._slots.time(size, tree)
            if not busy and before == self._read and np.isfinite(seconds):
                self._controller.costs(Load(size), tree, seconds)

    def _warm_up_rest(self, warm_up: WarmUp) -> None:
        try:
            if not warm_up.rest(lambda: self._stopping):
                return
        except Exception:
            log.exception("only %s requests can be answered at once", self._slots.sizes[-1])
        self._warm.set()
        self._wake()

    def _wait(self) -> bool:
        """Until there is something to do. False when all is done and nothing more will come."""
        with self._changed:
            self._changed.notify_all()  # whatever the last turn did to slots: there may be room for a prompt
            while True:
                if self._stopping and self._overdue:
                    for row in [*self._queue.rows(), *(each.row for each in self._begun), *self._slots.running]:
                        row.cancel()
                busy = bool(self._begun or self._slots.running)
                if busy or self._news:
                    self._news = False
                    return True
                if self._stopping and not len(self._queue) and not self._reading:
                    return False
                left = self._deadline - time.perf_counter() if self._stopping else None
                self._changed.wait(left if left is None or left > 0 else 0.1)

    def _leave(self) -> None:
        """Rows that nobody waits for any more."""
        with self._changed:
            gone = self._queue.remove(lambda row: row.cancelled)
            gone += [each.row for each in self._begun if each.row.cancelled]
            self._begun = deque(each for each in self._begun if not each.row.cancelled)
        running = [row for row in self._slots.running if row.cancelled]
        self._slots.remove(running)
        for row in [*gone, *running]:
            self._finish(row, "cancelled")

    def _join(self) -> None:
        """Rows that have begun take free slots."""
        while self._begun and self._slots.free:
            with self._changed:
                begun = self._begun.popleft()
                more = len(self._begun) + self._reading + len(self._queue)
                self._changed.notify_all()
            try:
                self._slots.insert(begun.row, begun.state, more)
            except Exception as error:  # e.g. no memory for more slots
                self._lose([begun.row, *self._slots.clear()], error)
        if not self._begun and not self._reading and not len(self._queue):
            self._slots.shrink()

    def _decode(self) -> None:
        """Some rounds for all rows."""
        load = Load(len(self._slots.rows), self._slots.looks)
        tree, trying = self._controller.choose(load)
        seconds = self._controller.seconds(load, tree)
        rounds, reading, read = 1 if seconds is None else rounds_of(seconds), self._reading, self._read
        try:
            ran = self._slots.run(tree, 1 if trying else rounds)
        except Exception as error:  # noqa: BLE001
            self._lose(self._slots.clear(), error)
            return
        self._count(ran, disturbed=bool(reading or self._reading or read != self._read))
        over = [row for row in self._slots.running if self._over(row)]
        self._slots.remove(over)
        for row in self._slots.running:
            row.tell()
        for row in over:
            self._end(row)

    def _lose(self, rows: list[Row], error: Exception) -> None:
        """The rows are lost, the engine is not."""
        log.error("decoding failed", exc_info=error)
        for row in rows:
            self._finish(row, "error", "decoding failed", sentence(error))

    def _count(self, ran: Ran, disturbed: bool) -> None:
        """What the rounds say of costs, drafts and drafter."""
        load = Load(ran.slots, ran.looked)
        self._controller.measured(load, ran.tree, ran.rounds, ran.seconds, ran.emitted, disturbed)
        total: np.ndarray = sum(ran.emitted, np.zeros(len(self._positions) + 1, np.int64))
        rounds, depth = int(total.sum()), ran.tree.max_depth
        with self._changed:
            self._tree_name = named(ran.tree)
            self._counts["rounds"] += rounds
            if depth:
                reached = total[::-1].cumsum()[::-1][1:]  # rounds that emitted at least i + 2 tokens
                self._positions += reached
                self._counts["drafts"] += rounds
                self._counts["draft_tokens"] += rounds * depth
                self._counts["accepted_tokens"] += int(reached.sum())
        if self._watch is not None and ran.tree == self.tree:
            judged = [
                Acceptance.from_histogram(emitted)
                for row, emitted in zip(ran.rows, ran.emitted, strict=True)
                if row.request.sampling.temperature == 0
                and row.request.sampling.penalties == self._usual_penalties
                and row.matcher is None
            ]
            self._watch.add(judged)

    @staticmethod
    def _over(row: Row) -> bool:
        return row.done or row.stopped or row.failure is not None

    def _end(self, row: Row) -> None:
        """A row that needs no more rounds."""
        if row.failed or row.failure is not None:
            length = len(row.request.prompt.input_ids)
            self._finish(row, "error", row.failure or not_finite(length, len(row.tokens)), row.cause)
        else:
            self._finish(row, "stop" if row.stopped else "length")

    def _finish(self, row: Row, reason: str, error: str | None = None, cause: str | None = None) -> None:
        if reason == "cancelled" and self._stopping and self._overdue:
            error = "the engine was stopped before the answer was complete"
        with self._changed:
            self._counts[f"finished {reason}"] += 1
            self._counts["generated_tokens"] += len(row.tokens)
        row.finish(reason, error, cause)
