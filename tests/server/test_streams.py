"""Time: signs of life, clients that leave, queues, slow readers, failures in the middle.

Nothing here waits by the clock: hooks in the scripted model hold it where a test wants it.
"""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from ds4py.server.app import Rules
from ds4py.server.connection import Connection
from ds4py.server.respond import Pace
from tests.server.scripted import Running, Script, ScriptedEngine

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
OFF: Any = {"thinking": {"type": "disabled"}}
HELLO: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 10_000}
QUICK = Rules(pace=Pace(beat_s=0.02, whole_s=0.05))


class Gate:
    """Holds the model at a hook until it is opened; tells when it got there."""

    def __init__(self, at: int = 0) -> None:
        self.at = at
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, position: int) -> None:
        if position == self.at and not self.opened.is_set():
            self.reached.set()
            assert self.opened.wait(30)


def eventually(what: Callable[[], bool]) -> None:
    """Wait for something that another thread is about to do."""
    pause = threading.Event()
    for _ in range(6000):
        if what():
            return
        pause.wait(0.005)
    raise AssertionError("it never happened")


def until(connection: socket.socket, marker: bytes) -> bytes:
    """What comes up to and with the marker."""
    data = b""
    while marker not in data:
        piece = connection.recv(10_000)
        assert piece, data
        data += piece
    return data


def lines_of(response: httpx2.Response) -> Iterator[str]:
    return (line for line in response.iter_lines() if line)


BEATS: Any = {
    CHAT: (HELLO, lambda line: line.startswith(": ")),
    RESPONSES: ({"input": "hi"}, lambda line: line == "event: response.in_progress"),
    MESSAGES: (
        {**HELLO, "thinking": {"type": "enabled"}},
        lambda line: '"thinking":""}' in line and "thinking_delta" in line,
    ),
    f"{MESSAGES}?": (HELLO, lambda line: line == "event: ping"),
}


@pytest.mark.parametrize("path", BEATS)
def test_a_stream_shows_signs_of_life_while_the_prompt_is_read(path: str) -> None:
    body, is_beat = BEATS[path]
    gate = Gate()
    script = Script(["I think.</think>An answer."], before_slice=gate)
    with (
        Running(ScriptedEngine(script), QUICK) as server,
        server.http() as http,
        http.stream("POST", path, json={**body, "stream": True}) as response,
    ):
        lines = lines_of(response)
        beats = 0
        while beats < 3:
            beats += is_beat(next(lines))
        gate.opened.set()
        rest = list(lines)
    text = "\n".join(rest)
    assert "answer" in text.replace('"', "") or "answer" in "".join(text.split())
    if path.startswith(MESSAGES):
        events = [json.loads(line[6:]) for line in rest if line.startswith("data: ")]
        started = [e["index"] for e in events if e["type"] == "content_block_start"]
        assert started == sorted(set(started))  # the silent block went on as the real one


def test_a_whole_answer_shows_signs_of_life_after_a_while() -> None:
    gate = Gate()
    script = Script(["An answer."], before_slice=gate)
    running = Running(ScriptedEngine(script), QUICK)
    with running as server, server.post(CHAT, {**HELLO, **OFF}) as connection:
        data = until(connection, b"1\r\n \r\n1\r\n \r\n")
        assert b" 200 OK" in data and b"An answer" not in data
        gate.opened.set()
        assert b'"content":"An answer."' in until(connection, b"0\r\n\r\n")


def test_a_client_that_leaves_frees_its_slot_within_one_step() -> None:
    gate = Gate(at=50)
    script = Script(["word "], ends=False, before_token=gate)
    with Running(ScriptedEngine(script), slots=1) as server:
        with server.post(CHAT, {**HELLO, **OFF, "stream": True}) as connection:
            assert b" 200 " in connection.recv(100)
            assert gate.reached.wait(30)
        eventually(lambda: server.worker.counters.cancelled > 0)
        gate.opened.set()
        assert script.closed.acquire(timeout=30)
        answer = server.openai().chat.completions.create(model="m", max_tokens=2, **HELLO_CREATE)
        assert answer.usage and answer.usage.completion_tokens == 2
        assert answer.usage.prompt_tokens_details.cached_tokens > 0  # type: ignore[union-attr]
    assert server.scheduler.n_lent == 0


HELLO_CREATE: Any = {"messages": HELLO["messages"], "extra_body": OFF}


@pytest.mark.parametrize("where", ["reading", "whole", "queue"])
def test_a_client_that_leaves_elsewhere(where: str) -> None:
    """While its prompt is read, while a whole answer is made, in the queue: only its own ends."""
    gate = Gate()
    hook = "before_slice" if where == "reading" else "before_token"
    script = Script(["one two"], ends=where == "queue", **{hook: gate})  # type: ignore[arg-type]
    with Running(ScriptedEngine(script), slots=1) as server:
        first = server.post(CHAT, {**HELLO, **OFF})
        assert gate.reached.wait(30)
        if where == "queue":
            server.post(CHAT, {**HELLO, **OFF}).close()
        else:
            first.close()
        eventually(lambda: server.worker.counters.cancelled > 0)
        gate.opened.set()
        if where == "queue":
            until(first, b"one two")
        first.close()
        answer = server.openai().chat.completions.create(model="m", max_tokens=1, **HELLO_CREATE)
        assert answer.choices[0].message.content
        assert server.worker.counters.cancelled == 1


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    gate = Gate()
    script = Script(["word"], before_token=gate)
    with Running(ScriptedEngine(script), slots=1, queue=1) as server, server.http() as http:
        waiting = [server.post(CHAT, {**HELLO, **OFF})]
        assert gate.reached.wait(30)
        waiting.append(server.post(CHAT, {**HELLO, **OFF}))
        eventually(lambda: server.worker.n_waiting == 1)
        response = http.post(CHAT, json={**HELLO, **OFF, "stream": True})
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        response = http.post(MESSAGES, json=HELLO)
        assert response.status_code == 529 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "overloaded_error"
        assert http.get("/status").json()["waiting"] == 1
        assert "ds4_requests_refused_total 2.0" in http.get("/metrics").text
        gate.opened.set()
        for connection in waiting:
            until(connection, b"word")
            connection.close()


def test_while_the_model_is_loaded() -> None:
    loading, done = threading.Event(), threading.Event()
    engine: Any = ScriptedEngine(Script(["word"]))

    class Loading(Running):
        def __enter__(self) -> Running:
            def opener(progress: Any) -> Any:
                progress("load", 1, 4)
                loading.set()
                assert done.wait(30)
                return engine, self.scheduler

            self.worker._opener = opener
            self._thread.start()
            assert loading.wait(30)
            return self

    with Loading(engine) as server, server.http() as http:
        response = http.post(CHAT, json=HELLO)
        assert response.status_code == 503 and "25 %" in response.text
        assert response.headers["retry-after"]
        assert http.get("/health").status_code == 503
        done.set()
        assert server._ready.wait(30)
        assert http.post(CHAT, json=HELLO).is_success


def broken(position: int) -> None:
    if position == 3:
        raise ZeroDivisionError("the model broke")


def test_a_failure_in_the_middle_is_told_in_each_protocol() -> None:
    script = Script(["one two three four five six"], before_token=broken)
    with Running(ScriptedEngine(script)) as server, server.http() as http:
        text = http.post(CHAT, json={**HELLO, **OFF, "stream": True}).text
        assert '"type":"server_error"' in text and text.endswith("data: [DONE]\n\n")
        text = http.post(MESSAGES, json={**HELLO, "stream": True}).text
        assert 'event: error\ndata: {"type":"error","error":{"type":"api_error"' in text
        text = http.post(RESPONSES, json={"input": "x", "stream": True}).text
        assert text.count("event: response.failed\n") == 1 and '"code":"server_error"' in text
        response = http.post(CHAT, json={**HELLO, **OFF})
        assert response.status_code == 500 and "ZeroDivisionError" in response.text
        with pytest.raises(anthropic.InternalServerError):
            server.anthropic().messages.create(model="m", **HELLO)
        script.before_token = lambda position: None
        assert http.post(CHAT, json={**HELLO, **OFF}).is_success
    assert server.scheduler.n_lent == 0


def test_a_reader_that_does_not_read_stops_only_itself() -> None:
    script = Script(["word " * 40], ends=False)
    engine = ScriptedEngine(script, context=10_000_000)

    class Impatient(Connection):
        STALLED_S = 0.05

    with Running(engine, connection=Impatient) as server:
        connection = server.connect()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        text = json.dumps({**HELLO, **OFF, "stream": True, "max_tokens": 10_000_000}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
        connection.sendall(head.encode() + text)
        answer = server.openai().chat.completions.create(model="m", max_tokens=3, **HELLO_CREATE)
        assert answer.usage and answer.usage.completion_tokens == 3
        assert script.closed.acquire(timeout=60)  # of the two answers
        assert script.closed.acquire(timeout=60)
        connection.close()
    assert server.scheduler.n_lent == 0


def test_a_head_that_never_comes_ends_the_connection() -> None:
    class Impatient(Connection):
        HEAD_S = 0.05

    with Running(ScriptedEngine(Script(["x"])), connection=Impatient) as server:
        for part in (b"", b"POST /v1/chat/comp", b"GET /health HTTP/1.1\r\nHost: loc"):
            with server.connect() as connection:
                connection.sendall(part)
                with contextlib.suppress(ConnectionResetError):
                    assert connection.recv(100) == b""


def test_more_connections_than_allowed_close_the_oldest_idle_one() -> None:
    class Few(Connection):
        MAX_CONNECTIONS = 20

    gate = Gate()
    with Running(ScriptedEngine(Script(["x"], before_token=gate)), connection=Few) as server:
        busy = server.post(CHAT, {**HELLO, **OFF})
        assert gate.reached.wait(30)
        idle = [server.connect() for _ in range(40)]
        gate.opened.set()
        until(busy, b'"content":"x"')
        assert server.openai().models.list().data
        for connection in [busy, *idle]:
            connection.close()


def test_pipelined_requests_are_answered_in_order() -> None:
    with Running(ScriptedEngine(Script(["x"]))) as server, server.connect() as connection:
        get = b"GET /v1/models/%d HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(b"".join(get % n for n in range(3)))
        data = b""
        while data.count(b"HTTP/1.1 404") < 3 or not data.endswith(b"}"):
            data += connection.recv(10_000)
    assert [data.index(b"'%d'" % n) for n in range(3)] == sorted(
        data.index(b"'%d'" % n) for n in range(3)
    )


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS hello
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: what\r\n\r\n",
    ],
    ids=range(7),
)
def test_garbage_ends_the_connection_and_nothing_else(garbage: bytes) -> None:
    with Running(ScriptedEngine(Script(["x"]))) as server:
        with server.connect() as connection:
            try:
                connection.sendall(garbage)
                if not garbage.endswith(b"\r\n\r\n"):
                    connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(10_000)
                assert not answer or b" 4" in answer[:13] or b" 501" in answer[:13]
            except (ConnectionResetError, BrokenPipeError):
                pass
        assert server.openai().models.list().data


def test_many_streams_at_once_stay_apart() -> None:
    """More clients than slots, each with its own text: order and content are its own."""
    texts = [f"{n} " * (20 + n) for n in range(12)]
    with Running(ScriptedEngine(Script([*texts, "end"])), slots=3) as server:
        client = server.openai()
        answers: list[str] = []

        def ask() -> None:
            stream = client.chat.completions.create(
                model="m", stream=True, messages=HELLO["messages"], extra_body=OFF
            )
            got = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            answers.append(got)

        threads = [threading.Thread(target=ask) for _ in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert sorted(answers) == sorted(texts)


def test_errors_of_the_clients_types() -> None:
    with Running(ScriptedEngine(Script(["x"])), Rules(api_key="k")) as server:
        with pytest.raises(openai.AuthenticationError):
            server.openai().models.list()
        with pytest.raises(anthropic.AuthenticationError):
            server.anthropic().messages.create(model="m", **HELLO)
        with pytest.raises(openai.NotFoundError):
            server.openai(api_key="k").models.retrieve("other")
