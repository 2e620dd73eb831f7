"""One connection, with the limits uvicorn leaves to its users.

A head that does not arrive, a reader that does not read, and more idle connections than there are
file descriptors must not keep others from being served.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ds4py.server.errors import ApiError
from ds4py.server.respond import to_json

MAX_HEAD = 1 << 16
"""Bytes of a request line and its headers."""


class Connection(H11Protocol):
    """uvicorn's, with three timers and a cap."""

    HEAD_S: ClassVar[float] = 20.0
    """How long a request's head may take to arrive."""
    STALLED_S: ClassVar[float] = 120.0
    """How long a client may leave its answer unread."""
    MAX_CONNECTIONS: ClassVar[int] = 1000
    """Beyond this the connection that has been idle longest is closed for each new one."""

    _head_timer: asyncio.TimerHandle | None = None
    _stalled_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()
        self.__class__._order[self] = None
        if len(self.connections) > self.MAX_CONNECTIONS:
            idle = next((c for c in self._order if c is not self and not c._busy()), None)
            if idle is not None:
                idle.transport.abort()

    _order: ClassVar[dict[Connection, None]] = {}
    """All connections, the one that has been idle longest first."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._order.pop(self, None)
        self._stop("_head_timer")
        self._stop("_stalled_timer")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.MUST_CLOSE:
            return  # bytes behind what was said to be the last request: its answer still goes out
        if not self._busy() and self._head_timer is None:
            self._expect_head()
        super().data_received(data)
        if self._busy():
            self._stop("_head_timer")

    def on_response_complete(self) -> None:
        self._stop("_head_timer")
        if self in self._order:
            self._order[self] = self._order.pop(self)  # its idle time begins anew
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_timer = self.loop.call_later(self.STALLED_S, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop("_stalled_timer")
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Tell what is wrong, unless an answer is under way: then the connection just ends."""
        cycle: Any = self.cycle
        if self._busy() and not cycle.response_started:
            cycle.disconnected = True  # its body cannot be read, and this is its answer
            cycle.message_event.set()
        elif self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or self._busy():
            self.transport.abort()
            return
        error = sys.exc_info()[1]  # uvicorn calls this where it catches h11's
        if getattr(error, "error_status_hint", 400) == 431:
            told = ApiError(f"the request's head is longer than {MAX_HEAD} bytes", 431)
        else:
            told = ApiError("this is not an HTTP request that can be read")
        body = to_json(told.openai()).encode()
        headers = [("content-type", "application/json"), ("connection", "close")]
        headers.append(("content-length", str(len(body))))
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (
                h11.Response(status_code=told.status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _should_upgrade(self) -> bool:
        return False  # there is no other protocol here; uvicorn would log which to install

    def _busy(self) -> bool:
        """Whether a request is being answered."""
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.HEAD_S, self.transport.abort)

    def _stop(self, name: str) -> None:
        timer = getattr(self, name)
        if timer is not None:
            timer.cancel()
            setattr(self, name, None)
