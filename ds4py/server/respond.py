"""From events to bytes on the wire: streams and whole answers, kept alive while a prompt is read.

An Exchange knows one protocol's wire shapes; this module knows time: when to say that the server
is still there, when the client has gone, and that its answer is then cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ds4py.errors import CapacityError, OptionsError, PromptError
from ds4py.server.errors import ApiError
from ds4py.server.generation import Turn
from ds4py.server.request import Chance, Event, Failed, Finished, Request, Scored
from ds4py.server.worker import Job, Worker
from ds4py.text.events import Content, Reasoning, ToolCallArguments, ToolCallStart

log = logging.getLogger("ds4.server")

MOST_AT_ONCE = 64
"""Events in one write: a model faster than the network must not keep the write from happening."""
PAUSE_S = 0.016
"""Between two looks for events, a screen's frame: tokens that come faster are sent together."""

Record = Callable[[list[str], Turn], None]
"""Keeps a turn under the ids of its calls."""
Over = Callable[[list[Job]], None]
"""Called when an exchange has ended, however it did."""


@dataclass(frozen=True)
class Pace:
    """When silence is broken. Agents give up after 300 s without a byte."""

    beat_s: float = 5.0
    """Between two signs of life in a stream."""
    whole_s: float = 20.0
    """After this the status of a whole answer is sent before the answer is known."""


@dataclass
class Answer:
    """One answer's events, added up."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, str]] = field(default_factory=list)
    """id, name and arguments of each."""
    chances: list[Chance] = field(default_factory=list)
    scored: Scored | None = None
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Reasoning):
            self.reasoning += event.text
        elif isinstance(event, Content):
            self.content += event.text
        elif isinstance(event, ToolCallStart):
            self.calls.append({"id": event.id, "name": event.name, "arguments": ""})
        elif isinstance(event, ToolCallArguments):
            self.calls[event.index]["arguments"] += event.text
        elif isinstance(event, Chance):
            self.chances.append(event)
        elif isinstance(event, Scored):
            self.scored = event
        elif isinstance(event, Finished):
            self.finished = event


class Exchange(Protocol):
    """One request of one protocol, and how its answers look on the wire."""

    requests: list[Request]
    streaming: bool

    def event(self, index: int, event: Event) -> str:
        """Frames for an event of answer `index`."""
        ...

    def beat(self) -> str:
        """Frames that say: still here."""
        ...

    def end(self) -> str:
        """The last frames, after all answers have finished."""
        ...

    def fail(self, error: ApiError) -> str:
        """The last frames when something went wrong."""
        ...

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        """The body that holds the answers."""
        ...

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body that holds an error."""
        ...


class Bridge:
    """Brings events from the worker's thread to this loop, waking it once for all that is there.

    Waking costs system calls and two changes of the thread that runs Python; once for every token
    of every stream, it would be the greater part of what the server adds to the model's time.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._posted: deque[tuple[Callable[[list[Event]], None], list[Event]]] = deque()
        self._lock = threading.Lock()
        self._due = False
        """Whether the loop is going to look; changed under the lock."""
        self._last = 0.0

    def post(self, put: Callable[[list[Event]], None], events: list[Event]) -> None:
        """Have `put` called with the events, on the loop. Called on the worker's thread."""
        self._posted.append((put, events))
        with self._lock:
            if self._due:
                return
            self._due = True
        with contextlib.suppress(RuntimeError):  # the loop ended: nobody is left to read
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        """Hand over what is there; while events keep coming, look again after a pause.

        The first one after a silence starts no pause: a first token may follow it closely.
        """
        now = self._loop.time()
        with self._lock:
            self._due = again = bool(self._posted) and now - self._last < 2 * PAUSE_S
        self._last = now if self._posted else self._last
        while self._posted:
            put, events = self._posted.popleft()
            put(events)
        if again:
            self._loop.call_later(PAUSE_S, self._deliver)


class Inbox:
    """The events of an exchange's answers."""

    def __init__(self, worker: Worker, requests: list[Request], bridge: Bridge) -> None:
        """Submits the requests. Raises Busy, NotReady."""
        self._bridge = bridge
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._gone = False
        self._waiting: asyncio.Future[None] | None = None
        self._worker = worker
        self._n_delivered = 0  # changed by the worker's thread only
        self._n_taken = 0
        self.jobs = [
            Job(request, self._deliver(index), self._backlog)
            for index, request in enumerate(requests)
        ]
        worker.submit(self.jobs)

    async def take(self, timeout: float) -> list[tuple[int, Event]]:
        """Some of the events that are there, and whose they are, as soon as there is one; none
        when there was none for `timeout` seconds.

        Raises ConnectionResetError when the client has gone. A future of its own, because
        `wait_for` on a queue takes five turns of the loop for every token.
        """
        if not self._events and not self._gone:
            self._waiting = self._loop.create_future()
            timer = self._loop.call_later(timeout, self._wake)
            try:
                await self._waiting
            finally:
                timer.cancel()
                self._waiting = None
        if self._gone and not self._events:
            raise ConnectionResetError
        taken = [self._events.popleft() for _ in range(min(len(self._events), MOST_AT_ONCE))]
        self._n_taken += len(taken)
        return taken

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def watch(self, receive: Receive) -> None:
        """Wait until the client has gone; then `take` says so, after what is already there."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.close()
        self._gone = True
        self._wake()

    def close(self) -> None:
        """Cancel what still runs."""
        self._worker.cancel(self.jobs)

    def _backlog(self) -> int:
        return self._n_delivered - self._n_taken

    def _deliver(self, index: int) -> Callable[[list[Event]], None]:
        def deliver(events: list[Event]) -> None:
            self._n_delivered += len(events)
            self._bridge.post(put, events)

        def put(events: list[Event]) -> None:
            self._events.extend((index, event) for event in events)
            self._wake()

        return deliver


class Answering(Response):
    """What both kinds of answer do: run the exchange, keep its turns, notice a lost client."""

    def __init__(
        self, exchange: Exchange, inbox: Inbox, pace: Pace, record: Record, over: Over
    ) -> None:
        super().__init__()
        self._exchange, self._inbox = exchange, inbox
        self._pace, self._record, self._over = pace, record, over
        self._answers = [Answer() for _ in exchange.requests]
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.ensure_future(self._inbox.watch(receive))
        try:
            await self._run(send)
        except OSError:
            pass  # the client has gone, and so has its answer
        finally:
            self._inbox.close()
            watcher.cancel()
            self._over(self._inbox.jobs)

    async def _run(self, send: Send) -> None:
        raise AssertionError("each kind has its own")

    @property
    def _complete(self) -> bool:
        return all(answer.finished for answer in self._answers)

    async def _add(self, index: int, event: Event) -> None:
        """Note an event. Raises ApiError where the answer failed."""
        if isinstance(event, Failed):
            raise _as_api_error(event.error)
        answer = self._answers[index]
        answer.add(event)
        generation = self._inbox.jobs[index].generation
        if isinstance(event, Finished) and answer.calls and generation is not None:
            turn = generation.turn
            if turn is not None:
                ids = [call["id"] for call in answer.calls]
                await asyncio.to_thread(self._record, ids, turn)


class Stream(Answering):
    """Server-sent events, as they come."""

    def __init__(
        self, exchange: Exchange, inbox: Inbox, pace: Pace, record: Record, over: Over
    ) -> None:
        super().__init__(exchange, inbox, pace, record, over)
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"

    async def _run(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while not self._complete:
                frames = await self._frames()
                if frames:
                    await _send_body(send, frames, more=True)
            last = self._exchange.end()
        except OSError:
            raise
        except Exception as error:
            last = self._exchange.fail(_as_api_error(error))
        await _send_body(send, last, more=False)

    async def _frames(self) -> str:
        """What is there by now, as one write; a sign of life when there is nothing."""
        events = await self._inbox.take(self._pace.beat_s)
        if not events:
            return self._exchange.beat()
        frames = ""
        for index, event in events:
            await self._add(index, event)
            frames += self._exchange.event(index, event)
        return frames


class Whole(Answering):
    """One JSON body. After a while the status is sent, then white space until the answer is."""

    async def _run(self, send: Send) -> None:
        self.headers["content-type"] = "application/json"
        status, started = 200, False
        try:
            wait = self._pace.whole_s
            while not self._complete:
                events = await self._inbox.take(wait)
                for index, event in events:
                    await self._add(index, event)
                if events:
                    continue
                if not started:
                    await self._start(send, 200)
                started, wait = True, self._pace.beat_s
                await _send_body(send, " ", more=True)
            body = self._exchange.whole(self._answers)
        except OSError:
            raise
        except Exception as failure:
            error = _as_api_error(failure)
            status, body = error.status, self._exchange.error(error)
            for name, value in error.headers().items():
                self.headers[name] = value
        text = to_json(body)
        if not started:
            self.headers["content-length"] = str(len(text.encode()))
            await self._start(send, status)
        await _send_body(send, text, more=False)

    async def _start(self, send: Send, status: int) -> None:
        await send({"type": "http.response.start", "status": status, "headers": self.raw_headers})


_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def to_json(value: Any) -> str:
    """JSON for the wire. Half a surrogate pair, which no encoding has, is written as an escape."""
    text = _ENCODE(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":"))
    return text


def reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(to_json(value), status, headers, media_type="application/json")


def frame(data: Any, event: str | None = None) -> str:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {to_json(data)}\n\n"


async def _send_body(send: Send, text: str, more: bool) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptError | OptionsError | CapacityError):  # the request is at fault
        return ApiError(str(error))
    log.error("an answer failed", exc_info=error)
    return ApiError(f"the engine failed ({type(error).__name__}); see the server's log", 500)
