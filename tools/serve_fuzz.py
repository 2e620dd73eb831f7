"""Requests nobody would send, to a real `ds4 serve`: any number of them, from a seed.

    python -m tools.serve_fuzz --requests 20000 --seed 1

Three clients at once: schemathesis on the server's own OpenAPI document, bodies made from the
models of its endpoints by Hypothesis, and bare sockets with damaged bytes, slow readers and clients
that leave. Every answer must be complete, of a documented status and in its API's shape. Prints
what was found and, as the last line, JSON; the exit code is 1 when anything was found, or when
memory or files grow. The first kind needs the extra `fuzz`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11
import httpx2
import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st

from ds4py.server import describe
from ds4py.server.anthropic import CountBody, MessagesBody
from ds4py.server.openai_chat import ChatBody
from ds4py.server.openai_completions import CompletionBody
from ds4py.server.openai_responses import ResponsesBody
from tools.serve_load import Server

PATIENCE_S = 120.0
"""No answer takes longer than this; one that does hangs."""
PATHS: dict[str, Any] = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
}
ENDS = {"/v1/responses": "response.", "/v1/messages": '"type":"message_stop"'}
"""What the last line of a stream holds; elsewhere it is [DONE]."""
OVERLOAD = (429, 503, 529)
DOCUMENTED = {200, *(int(status) for status in describe.ERRORS), 529} - {500}

words = st.sampled_from(
    "user assistant system tool text function auto required none json_schema json_object enabled "
    "tool_use tool_result thinking function_call function_call_output message reasoning f c1 "
    "</think> <｜User｜> ｜DSML｜ object string \ud800 \x00 é".split(" ")
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(), st.floats(), words, st.text()
)
keys = st.sampled_from(
    "role content type text name id tool_calls function arguments tool_call_id call_id output "
    "input parameters properties required strict schema json_schema input_schema tool_use_id "
    "thinking signature reasoning_content effort format enum $ref".split()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=25,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
        optional={
            "content": st.one_of(words, values),
            "tool_calls": values,
            "tool_call_id": words,
            "type": words,
        },
    ),
    max_size=4,
)


plain = st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": words}), min_size=1)
tool = {"name": "f", "parameters": {"type": "object", "properties": {"c1": {"type": "integer"}}}}
RIGHT: dict[str, Any] = {
    "messages": plain | messages,
    "input": words | plain | messages,
    "prompt": words | st.lists(st.integers(0, 2047), max_size=5),
    "max_tokens": st.integers(1, 9),
    "max_output_tokens": st.integers(1, 9),
    "stream": st.booleans(),
    "stream_options": st.just({"include_usage": True}),
    "temperature": st.floats(0, 1),
    "n": st.integers(1, 3),
    "stop": words,
    "logprobs": st.booleans() | st.integers(0, 5),
    "system": words,
    "tools": st.just([{"type": "function", "function": tool}])
    | st.just([{"type": "function", **tool}])
    | st.just([{"name": "f", "input_schema": tool["parameters"]}]),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "any"}]),
    "response_format": st.just({"type": "json_object"}),
    "reasoning_effort": st.sampled_from(["none", "low", "high", "max"]),
    "thinking": st.just({"type": "disabled"}),
}
"""Values of fields that are often taken."""
NEEDED = ("messages", "max_tokens", "max_output_tokens")


def bodies(model: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly right ones: a wrong field in a right body goes further than noise."""
    fields = {name: RIGHT.get(name, values) | values for name in model.model_fields}
    needed = st.fixed_dictionaries({name: RIGHT[name] for name in NEEDED if name in fields})
    some = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)
    more = some.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))
    return st.builds(lambda first, second: {**first, **second}, needed, more)


requests = st.sampled_from(sorted(PATHS)).flatmap(
    lambda path: st.tuples(st.just(path), bodies(PATHS[path]))
)
"""A path and a body for it."""


class Wrong(AssertionError):
    """An answer that should not have been given."""


def check(path: str, status: int, headers: Any, text: str) -> None:
    """Raise Wrong unless the answer is whole, of a documented status and in shape."""
    if status not in DOCUMENTED:
        raise Wrong(f"status {status}: {text[:300]}")
    if status in OVERLOAD and not headers.get("retry-after"):
        raise Wrong(f"status {status} without Retry-After")
    if headers.get("content-type", "").startswith("text/event-stream"):
        lines = text.rstrip("\n").split("\n")  # not at the other ends of lines that Unicode has
        if ENDS.get(path, "[DONE]") not in lines[-1]:
            raise Wrong(f"the stream ends with {lines[-1][:300]}")
        if any('"server_error"' in line or '"api_error"' in line for line in lines):
            raise Wrong(f"the stream failed: {lines[-3:]}")
        return
    body = json.loads(text)
    if status != 200 and not body["error"]["message"]:
        raise Wrong("an error says nothing")
    if path and status != 200 and ("request_id" in body) != path.startswith("/v1/messages"):
        raise Wrong(f"an error in the shape of another API: {text[:300]}")


@dataclass(frozen=True)
class Wire:
    """Bytes for a connection, and what the client does besides."""

    data: bytes
    then: str
    """"read" the answers, "slow"ly, "leave" at once, "reset", or read "some" of it."""
    cuts: tuple[int, ...] = ()
    """Where the bytes are cut into several writes."""


def wired(path: str, text: bytes, draw: Any) -> bytes:
    """A request as bytes, in one of the ways to frame it."""
    frame = draw(st.sampled_from(["length", "chunked", "old", "close"]))
    version = "1.0" if frame == "old" else "1.1"
    head = f"POST {path} HTTP/{version}\r\nHost: localhost\r\n".encode()
    if frame == "close":
        head += b"Connection: close\r\n"
    if frame != "chunked":
        return head + b"Content-Length: %d\r\n\r\n" % len(text) + text
    size = draw(st.integers(1, 4000))
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


DAMAGE: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "none": lambda data, at, junk: data,
    "cut": lambda data, at, junk: data[:at],
    "overwrite": lambda data, at, junk: data[:at] + junk + data[at + len(junk) :],
    "insert": lambda data, at, junk: data[:at] + junk + data[at:],
    "twice": lambda data, at, junk: data + data,
    "garbage behind": lambda data, at, junk: data + junk,
    "long header": lambda data, at, junk: _header(data, b"X: " + (junk or b"x") * (at % 90_000)),
    "many headers": lambda data, at, junk: _header(data, b"\r\n".join([b"X: y"] * (at % 3000 + 1))),
    "odd header": lambda data, at, junk: _header(data, b"X-Odd: " + junk),
    "wrong length": lambda data, at, junk: data.replace(b"Length: ", b"Length: 1", 1),
    "two lengths": lambda data, at, junk: _header(data, b"Content-Length: %d" % at),
    "both framings": lambda data, at, junk: _header(data, b"Transfer-Encoding: chunked"),
    "packed": lambda data, at, junk: _header(data, b"Content-Encoding: gzip"),
    "expects": lambda data, at, junk: _header(data, b"Expect: 100-continue"),
    "upgrade": lambda data, at, junk: _header(data, b"Connection: upgrade\r\nUpgrade: websocket"),
    "method": lambda data, at, junk: data.replace(b"POST", b"PATCH", 1),
    "target": lambda data, at, junk: data.replace(b" /v1/", b" http://localhost/v1/", 1),
    "odd target": lambda data, at, junk: data.replace(b" /v1/", b" /%" + junk + b"/../", 1),
    "bad text": lambda data, at, junk: data.replace(b'"', b'"\xff', 1),
}


def _header(data: bytes, line: bytes) -> bytes:
    head, end, body = data.partition(b"\r\n\r\n")
    return head + b"\r\n" + line + end + body


@st.composite
def wires(draw: Any) -> Wire:
    """A request or two, perhaps damaged, and how the client goes on."""
    path, body = draw(requests)
    text = json.dumps(body).encode()
    data = wired(path, text, draw)
    for name in draw(st.lists(st.sampled_from(sorted(DAMAGE)), min_size=1, max_size=2)):
        data = DAMAGE[name](data, draw(st.integers(0, len(data))), draw(st.binary(max_size=9)))
    then = draw(st.sampled_from(["read", "read", "slow", "leave", "reset", "some"]))
    cuts = draw(st.lists(st.integers(0, len(data)), max_size=3))
    return Wire(data, then, tuple(sorted(cuts)))


def complete(data: bytes) -> tuple[int, str]:
    """How many requests the bytes hold, and what follows: "end", "part" of one, or "garbage".

    Asks h11, which is what reads them on the other side.
    """
    there = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 16)
    if data:  # nothing would mean the end of the connection
        there.receive_data(data)
    n = 0
    while True:
        try:
            event = there.next_event()
        except h11.RemoteProtocolError:
            return n, "garbage"
        if isinstance(event, h11.EndOfMessage):
            n += 1
            there.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            there.send(h11.EndOfMessage())
            if there.our_state is not h11.DONE or there.their_state is not h11.DONE:
                return n, "end"
            there.start_next_cycle()
        elif event is h11.NEED_DATA:
            clean = there.their_state is h11.IDLE and not there.trailing_data[0]
            return n, "end" if clean else "part"
        elif event is h11.PAUSED:  # the bytes behind belong to another protocol
            return n, "end"


def exchange(address: tuple[str, int], wire: Wire) -> list[int]:
    """Do what the wire says; the statuses of the answers. Raises Wrong, TimeoutError."""
    n, rest = complete(wire.data)
    statuses: list[int] = []
    with socket.socket() as connection:
        if wire.then == "slow":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.settimeout(PATIENCE_S)
        connection.connect(address)
        with contextlib.suppress(ConnectionError):  # it may refuse before all is sent
            for start, end in zip((0, *wire.cuts), (*wire.cuts, len(wire.data)), strict=True):
                connection.sendall(wire.data[start:end])
        if wire.then == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if wire.then in ("leave", "reset"):
            return statuses
        try:
            if wire.then == "some":
                if n:
                    connection.recv(200)
                return statuses
            reader = _Reader(connection, 1 if wire.then == "slow" else 8192)
            for _ in range(n):
                answer = _read_answer(reader, wire, whole=True)
                statuses.append(answer.status)
                if answer.will_close:
                    return statuses
            if rest == "part":
                with contextlib.suppress(OSError):  # it may have ended the connection already
                    connection.shutdown(socket.SHUT_WR)
            if rest != "end":
                with contextlib.suppress(http.client.RemoteDisconnected):
                    statuses.append(_read_answer(reader, wire, whole=False).status)
        except http.client.RemoteDisconnected:
            raise Wrong("the connection ended without an answer") from None
        except ConnectionError:
            if n and rest == "end":
                raise Wrong("the connection was reset before its answer") from None
    return statuses


class _Reader(io.BufferedReader):
    """What comes on a connection, for one HTTPResponse after the other."""

    def __init__(self, connection: socket.socket, at_once: int) -> None:
        super().__init__(socket.SocketIO(connection, "r"), at_once)

    def makefile(self, mode: str) -> _Reader:
        return self

    def close(self) -> None:
        """Not by the end of an answer."""


def _read_answer(reader: _Reader, wire: Wire, whole: bool) -> http.client.HTTPResponse:
    """Read one answer, that of a whole request or not. Raises Wrong, RemoteDisconnected."""
    answer = http.client.HTTPResponse(reader, method="POST")  # type: ignore[arg-type]
    answer.begin()
    text = answer.read().decode()
    target = wire.data.split(b" ", 2)[1].decode("latin-1")
    path = target.removeprefix("http://localhost").partition("?")[0]
    check(path if whole and path in PATHS else "", answer.status, answer.headers, text)
    return answer


class Fuzz:
    """Counts what was asked and answered, and keeps what was wrong."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.seed = server, seed
        self.asked: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.found: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def run(self, kind: str, strategy: Any, ask: Callable[[Any], list[int]], n: int) -> None:
        """Ask n times, in lots, as Hypothesis remembers all that a lot has made."""
        for lot in range(0, n, 250):

            @hypothesis.settings(
                max_examples=min(250, n - lot),
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @hypothesis.seed(self.seed * 1_000_003 + lot)
            @hypothesis.given(strategy)
            def one(example: Any) -> None:
                self.asked[kind] += 1
                try:
                    self.statuses.update(ask(example))
                except Exception as error:
                    self.note(kind, error, example)

            one()
            print(f"{kind}: {self.asked[kind]} of {n} asked", file=sys.stderr, flush=True)

    def note(self, kind: str, error: Exception, example: Any) -> None:
        """Keep a finding; of those that are alike, one in full."""
        text = f"{kind}: {type(error).__name__}: {str(error).splitlines()[0][:160]}"
        self.found[text] += 1
        if text not in self._first:
            self._first[text] = repr(example)
            shown = repr(example)
            shown = shown if len(shown) < 3000 else f"{shown[:1500]} ... {shown[-1500:]}"
            print(f"{text}\n  {shown}\n  {str(error)[:2000]}", flush=True)

    def bodies(self, n: int) -> None:
        with httpx2.Client(base_url=self.server.url, timeout=PATIENCE_S) as client:

            def ask(request: tuple[str, Any]) -> list[int]:
                path, body = request
                answer = client.post(path, content=json.dumps(body))
                check(path, answer.status_code, answer.headers, answer.text)
                return [answer.status_code]

            self.run("body", requests, ask, n)

    def sockets(self, n: int) -> None:
        address = ("127.0.0.1", self.server.port)
        self.run("socket", wires(), lambda wire: exchange(address, wire), n)

    def document(self, n: int) -> None:
        import schemathesis
        from schemathesis import checks
        from schemathesis.generation import GenerationMode

        schema = schemathesis.openapi.from_url(f"{self.server.url}/openapi.json")
        strategies = [
            found.ok().as_strategy(mode)
            for found in schema.get_all_operations()
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
            if mode is GenerationMode.POSITIVE or found.ok().body
        ]
        checks.load_all_checks()
        wanted = [
            checks.CHECKS.get_one(name)
            for name in (
                "status_code_conformance",
                "content_type_conformance",
                "response_schema_conformance",
            )
        ]

        def ask(case: Any) -> list[int]:
            path = case.operation.path
            if isinstance(case.body, dict):  # not the whole context every time
                for name in NEEDED[1:]:
                    if name in getattr(PATHS.get(path), "model_fields", ()):
                        case.body.setdefault(name, 8)
            answer = case.call(base_url=self.server.url, timeout=PATIENCE_S)
            case.validate_response(answer, checks=wanted)
            if path in PATHS and not answer.stream_cut_short:  # by schemathesis
                check(path, answer.status_code, _flat(answer.headers), answer.content.decode())
            return [answer.status_code]

        self.run("document", st.one_of(strategies), ask, n)


def _flat(headers: Any) -> dict[str, str]:
    return {name.lower(): values[0] for name, values in headers.items()}


@contextlib.contextmanager
def sampled(server: Server, every_s: float) -> Iterator[list[tuple[int, int]]]:
    """Resident bytes and open files of the server, every so often while the block runs."""
    samples: list[tuple[int, int]] = []
    over = threading.Event()

    def run() -> None:
        while not over.wait(every_s):
            samples.append(server.used())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def fuzz(n: int, seed: int, kinds: list[str]) -> dict[str, Any]:
    """Ask the server n times; what came of it."""
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), "--context", "256", "--queue", "256")
        made, started = Fuzz(server, seed), time.monotonic()

        def run(kind: str) -> None:
            try:
                getattr(made, kind)(-(-n // len(kinds)))
            except Exception as error:
                traceback.print_exc()
                made.note(kind, error, None)

        threads = [threading.Thread(target=run, args=(kind,)) for kind in kinds]
        with sampled(server, 2.0) as samples:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        state, (memory, files), code = server.finish()
    settled = samples[len(samples) // 4] if samples else (memory, files)
    return {
        "asked": dict(made.asked),
        "statuses": dict(made.statuses),
        "seconds": round(time.monotonic() - started),
        "found": sum(made.found.values()),
        "answers": state["finished"],
        "cancelled": state["cancelled"],
        "failed": state["failed"],
        "active_at_end": state["active"] + state["waiting"],
        "memory_mb": [round(m / 1e6) for m, _ in samples[:: max(1, len(samples) // 10)]]
        + [round(memory / 1e6)],
        "files": [settled[1], files],
        "grown": memory > settled[0] * 1.1 + 20e6 or files > settled[1] + 5,
        "logged": sum("Traceback" in line for line in server.said),
        "exit_code": code,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kinds", nargs="+", choices=("document", "bodies", "sockets"),
        default=["document", "bodies", "sockets"],
    )  # fmt: skip
    given = parser.parse_args()
    report = fuzz(given.requests, given.seed, given.kinds)
    for name, value in report.items():
        print(f"{name:15} {value}")
    print(json.dumps(report))
    bad = ("found", "grown", "logged", "active_at_end", "exit_code")
    return int(any(report[name] for name in bad))


if __name__ == "__main__":
    sys.exit(main())
