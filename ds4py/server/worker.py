"""The one thread that touches the model: admits requests, reads prompts, writes answers.

Requests wait in a bounded queue, first come first served. A prompt is read in slices, and between
two slices every running answer gets as much time as the slice took, so that a long prompt neither
stalls the others nor starves. Cancelling is a flag, looked at before every slice and every token;
what a session has read stays there for the next request that begins so.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from ds4py.engine.engine import Engine
from ds4py.engine.scheduler import Scheduler
from ds4py.engine.session import Session, Token
from ds4py.errors import CapacityError
from ds4py.server.errors import Busy, NotReady
from ds4py.server.generation import Generation
from ds4py.server.request import Event, Failed, Reading, Request

Opener = Callable[[Callable[[str, int, int], None]], tuple[Engine, Scheduler]]
"""Loads the model, reporting progress, and makes what its sessions come from."""
MAX_RESERVED = 4096
"""Tokens of answer that memory is kept free for; agents ask for far more than they use."""

SLICE = 128
"""Prompt tokens read at a time while answers are running."""
SHARED = 64
"""Tokens that two prompts must have in common for one to wait while the other is read."""
MAX_BACKLOG = 4096
"""Events a client may be behind before its answer waits for it."""


@dataclass(eq=False)
class Job:
    """One request on its way. `deliver` is called on the worker's thread, with its events."""

    request: Request
    deliver: Callable[[list[Event]], None]
    backlog: Callable[[], int] = lambda: 0
    """How many delivered events the client has not been sent yet."""
    cancelled: bool = False
    generation: Generation | None = None
    session: Session | None = None
    reading: Iterator[tuple[int, int]] | None = None
    tokens: Iterator[Token] | None = None
    n_read: int = 0


@dataclass
class Counters:
    """What happened since the start; written by the worker's thread, read by all."""

    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    read_tokens: int = 0
    """Of prompts, those that were not cached, as they are read."""
    written_tokens: int = 0
    """Of answers, as they are written."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finished: dict[str, int] = field(default_factory=dict)
    """Answers by the reason they ended for."""


class Worker:
    """Owns engine and sessions on a thread of its own. `submit` and `cancel` may come from any."""

    def __init__(self, opener: Opener, slots: int, queue_length: int) -> None:
        self._opener = opener
        self.n_slots = slots
        self._queue_length = queue_length
        self._wake = threading.Condition()
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []
        self._stopping = False
        self._scheduler: Scheduler | None = None
        self._retry_at = 0.0  # when there may be memory for the first of the queue
        self._decode_until = 0.0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.engine: Engine | None = None
        self.loading = (0, 0)
        """(done, total) of what is loaded, while it is."""
        self.error: BaseException | None = None
        """Why the model could not be loaded, or why the thread ended."""
        self.opened = threading.Event()
        """Set when the model is loaded, or cannot be."""
        self.ended: Callable[[], object] = lambda: None
        """Called on the worker's thread when it ends."""
        self.counters = Counters()
        self.sessions: dict[str, int] = {}
        """The scheduler's statistics when a request last came or went."""
        self.engine_stats: dict[str, Any] = {}
        """The engine's statistics at the same moment."""

    def start(self) -> None:
        """Load the model and begin."""
        self._thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue the jobs of one client. Raises Busy or NotReady; then none is queued."""
        with self._wake:
            if self._stopping or self.engine is None:
                raise NotReady(self._why_not())
            if self._queue and len(self._queue) + len(jobs) > self._queue_length:
                self.counters.refused += 1
                raise Busy(len(self._queue))
            self.counters.requests += len(jobs)
            self._queue.extend(jobs)
            self._wake.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Stop the jobs within one step; nothing more is delivered for them."""
        with self._wake:
            for job in jobs:
                if job.cancelled:
                    continue
                job.cancelled = True
                if job in self._queue:
                    self._queue.remove(job)
                finished = job.generation is not None and job.generation.finished is not None
                self.counters.cancelled += not finished
            self._wake.notify()

    def stop(self, timeout: float | None = None) -> None:
        """End everything that runs, with an error where it is not complete; return when done."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _why_not(self) -> str:
        if self._stopping:
            return "the server is shutting down"
        done, total = self.loading
        share = f" ({100 * done // total} %)" if total else ""
        return f"the model is being loaded{share}; try again"

    @property
    def n_waiting(self) -> int:
        return len(self._queue)

    @property
    def n_active(self) -> int:
        return len(self._active)

    @property
    def n_reading(self) -> int:
        """Active requests whose prompt is still being read."""
        return sum(job.tokens is None for job in list(self._active))

    # What follows runs on the worker's thread.

    def _run(self) -> None:
        try:
            engine, self._scheduler = self._opener(self._progress)
            self.engine = engine
        except BaseException as error:
            if not self._stopping:
                self.error = error
            return
        finally:
            self.opened.set()
        try:
            while self._wait():
                self._admit()
                self._turn()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._end_all()
            self.ended()

    def _progress(self, stage: str, done: int, total: int) -> None:
        """Raises NotReady when nobody waits for the model any more."""
        self.loading = (done, total)
        if self._stopping:
            raise NotReady(self._why_not())

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when stopping."""
        with self._wake:
            while not self._stopping and not self._active:
                pause = self._retry_at - perf_counter()
                if self._queue and pause <= 0:
                    break
                self._wake.wait(pause if self._queue else None)
            return not self._stopping

    def _admit(self) -> None:
        """Give sessions to the requests that have waited longest."""
        assert self._scheduler is not None and self.engine is not None
        assert self.engine.tokenizer is not None
        while len(self._active) < self.n_slots and perf_counter() >= self._retry_at:
            with self._wake:
                job = next((job for job in self._queue if not self._is_being_read(job)), None)
            if job is None:
                return
            prompt = self._scheduler.respell(job.request.prompt)
            answer = min(job.request.sampling.max_tokens or MAX_RESERVED, MAX_RESERVED)
            error: Exception | None = None
            try:
                job.session = self._scheduler.acquire(prompt, answer=answer)
            except CapacityError as full:
                if full.retry_after is not None:
                    self._retry_at = perf_counter() + full.retry_after
                    return
                error = full
            except Exception as failure:
                error = failure
            with self._wake:
                if job in self._queue:
                    self._queue.remove(job)
            if error is not None:
                self._fail(job, error)
                continue
            self._active.append(job)
            job.generation = Generation(job.request, prompt, self.engine.tokenizer)
            self._take_stock()

    def _is_being_read(self, job: Job) -> bool:
        """Whether another request is reading the beginning of the same prompt just now.

        Waiting for it costs nothing: what it has read is then there for both. So several answers
        to one prompt (`n`), or a request that is sent again, read it once.
        """
        wanted = job.request.prompt
        return any(
            other.tokens is None
            and other.generation is not None
            and other.generation.prompt[:SHARED] == wanted[:SHARED]
            and len(wanted) > SHARED
            for other in self._active
        )

    def _turn(self) -> None:
        """One slice of one prompt, if it is time for one, and one token for every answer."""
        for job in [job for job in self._active if job.cancelled]:
            self._leave(job)
        self._read_one()
        writing = [job for job in self._active if job.tokens is not None]
        ready = [job for job in writing if job.backlog() < MAX_BACKLOG]
        for job in ready:  # those that wait for a token share one step of the model
            self._write_one(job)
        if writing and not ready and len(writing) == len(self._active):
            with self._wake:
                self._wake.wait(0.02)  # every client is behind

    def _read_one(self) -> None:
        """The first prompt's next slice; then that prompt goes to the end of the line."""
        assert self.engine is not None
        if self._writing and perf_counter() < self._decode_until:
            return
        job = next((job for job in self._active if job.tokens is None), None)
        if job is None:
            return
        generation, session = job.generation, job.session
        assert generation is not None and session is not None
        start = perf_counter()
        try:
            if job.reading is None:
                job.reading = generation.read(session, self._slice)
            progress = next(job.reading, None)
            if progress is not None:
                self.counters.read_tokens += progress[0] - job.n_read
                job.n_read = progress[0]
                job.deliver([Reading(*progress)])
            if progress is None or progress[0] == progress[1]:
                self._deliver(job, generation.begin(session, self.engine.context))
                if generation.finished is None:
                    job.tokens = generation.stream(session)
        except Exception as error:
            self._fail(job, error)
        if job in self._active:
            self._active.remove(job)
            self._active.append(job)
        now = perf_counter()
        self._decode_until = now + (now - start)

    @property
    def _writing(self) -> bool:
        return any(job.tokens is not None for job in self._active)

    def _slice(self) -> int:
        """Tokens of the next slice, whoever came first: short while answers are running."""
        assert self.engine is not None
        return SLICE if self._writing else self.engine.options.prefill_chunk

    def _write_one(self, job: Job) -> None:
        """The next token of an answer."""
        if job.cancelled:
            self._leave(job)
            return
        assert job.generation is not None and job.tokens is not None
        try:
            token = next(job.tokens)
        except Exception as error:
            self._fail(job, error)
            return
        self.counters.written_tokens += 1
        self._deliver(job, job.generation.take(token))

    def _deliver(self, job: Job, events: list[Event]) -> None:
        generation = job.generation
        assert generation is not None
        if generation.finished is not None:
            self._leave(job)  # before the client knows, so that its next request finds the session
            self._count(generation)
        if events:
            job.deliver(events)

    def _count(self, generation: Generation) -> None:
        finished, counters = generation.finished, self.counters
        assert finished is not None
        counters.prompt_tokens += finished.usage.prompt
        counters.cached_tokens += finished.usage.cached
        counters.prefill_s += finished.prefill_s
        counters.decode_s += finished.decode_s
        counters.finished[finished.reason] = counters.finished.get(finished.reason, 0) + 1

    def _fail(self, job: Job, error: Exception) -> None:
        self.counters.failed += 1
        self._leave(job)
        job.deliver([Failed(error)])

    def _leave(self, job: Job) -> None:
        """Give the job's session back; what it has read stays."""
        assert self._scheduler is not None
        if job.tokens is not None:
            job.tokens.close()  # type: ignore[attr-defined]
        if job in self._active:
            self._active.remove(job)
        if job.session is not None:
            finished = job.generation.finished if job.generation is not None else None
            calls = finished is not None and finished.reason == "tool_calls"
            self._scheduler.release(job.session, awaiting_tool=calls)
            job.session = None
        self._retry_at = 0.0
        self._take_stock()

    def _take_stock(self) -> None:
        """Copy what other threads may ask about the engine and its sessions."""
        assert self._scheduler is not None and self.engine is not None
        self.sessions = dict(self._scheduler.stats())
        self.engine_stats = dict(self.engine.stats())

    def _end_all(self) -> None:
        with self._wake:
            self._stopping = True
            waiting = list(self._queue)
            self._queue.clear()
        reason = NotReady("the server is shutting down")
        for job in waiting:
            job.deliver([Failed(reason)])
        for job in list(self._active):
            self._leave(job)
            if not job.cancelled:
                job.deliver([Failed(reason)])
        if self._scheduler is not None:
            self._scheduler.close()
