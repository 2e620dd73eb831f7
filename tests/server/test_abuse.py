"""What is done to a server that runs for months: clients that leave anywhere, odd requests."""

import contextlib
import json
import logging
import threading
from typing import Any

import httpx2
import pytest

from ds4py.server import listen
from ds4py.server.app import Rules
from ds4py.server.connection import Connection
from ds4py.server.worker import Worker
from tests.server.scripted import Running, Script, ScriptedEngine, ScriptedScheduler
from tests.server.test_streams import CHAT, HELLO, OFF, Gate, until


def test_a_client_that_leaves_while_its_body_arrives_is_no_failure(
    caplog: pytest.LogCaptureFixture,
) -> None:
    running = Running(ScriptedEngine(Script(["x"])))
    with caplog.at_level(logging.ERROR), running as server, server.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert b" 100 " in connection.recv(100)  # the body is being waited for
        connection.sendall(b"{")
    assert caplog.records == []  # the server has ended, and with it every request


def test_a_target_may_be_a_whole_url() -> None:
    with Running(ScriptedEngine(Script(["x"]))) as server, server.connect() as connection:
        connection.sendall(b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in connection.recv(100)


def test_bytes_behind_the_last_request_do_not_cost_its_answer() -> None:
    gate = Gate()
    body = json.dumps({**HELLO, **OFF}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    running = Running(ScriptedEngine(Script(["An answer."], before_token=gate)))
    with running as server, server.connect() as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert gate.reached.wait(30)
        connection.sendall(b"\r\n")
        with server.http() as http:
            assert http.get("/health").is_success  # so the server has seen the bytes
        gate.opened.set()
        assert b"An answer." in until(connection, b"}}")


def test_a_body_whose_chunks_cannot_be_read_is_told() -> None:
    with Running(ScriptedEngine(Script(["x"]))) as server:
        for path, chunk in ((CHAT, b"zz\r\n"), (CHAT, b"1\r\n{no end"), ("/health", b"zz\r\n")):
            with server.connect() as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
                connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
                if path == CHAT:
                    assert b" 100 " in connection.recv(100)  # the body is being waited for
                connection.sendall(chunk)
                assert b" 4" in connection.recv(100)[:13]
        assert server.openai().models.list().data


@pytest.mark.parametrize("framing", ["Content-Length: {n}", "Transfer-Encoding: chunked"])
def test_a_body_that_is_too_long_is_told_before_it_is_all_there(framing: str) -> None:
    rules = Rules(max_body=100_000)
    with Running(ScriptedEngine(Script(["x"])), rules) as server, server.connect() as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{framing.format(n=10**12)}\r\n\r\n"
        connection.sendall(head.encode())
        if "chunked" in framing:
            for _ in range(3):
                connection.sendall(b"8000\r\n" + b" " * 0x8000 + b"\r\n")
            connection.sendall(b"8000\r\n" + b" " * 10_000)
        assert b" 413 " in connection.recv(1000)


def test_a_body_that_does_not_come_is_waited_for_a_while() -> None:
    with Running(ScriptedEngine(Script(["x"])), Rules(body_s=0.05)) as server:
        with server.connect() as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
            connection.sendall(f"{head}{{".encode())
            data = until(connection, b"}}")
        assert b" 408 " in data and b"0.05 s" in data


def test_heads_have_limits() -> None:
    many = b"".join(b"X-%d: y\r\n" % n for n in range(10_000))
    with Running(ScriptedEngine(Script(["x"]))) as server:
        for header in (b"X: " + b"y" * 100_000 + b"\r\n", many, b"Cookie: " + b"y" * 70_000):
            with server.connect() as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + header)
                with contextlib.suppress(ConnectionResetError):
                    assert b" 431 " in connection.recv(100)
        with server.connect() as connection:
            long = b"X: " + b"y" * 50_000
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + long + b"\r\n\r\n")
            assert b" 200 " in connection.recv(100)


def test_of_idle_connections_the_one_used_last_stays() -> None:
    class Few(Connection):
        MAX_CONNECTIONS = 2

    get = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    running = Running(ScriptedEngine(Script(["x"])), connection=Few)
    with running as server, server.connect() as first, server.connect() as second:
        for connection in (second, first):
            connection.sendall(get)
            until(connection, b"}")
        with server.connect() as third:
            third.sendall(get)
            until(third, b"}")
        first.sendall(get)
        assert b" 200 " in until(first, b"}")
        with contextlib.suppress(ConnectionResetError):
            assert second.recv(1) == b""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_ends_ends_the_server() -> None:
    """Rather than one that refuses everything for ever: whoever started it can start it again."""
    engine: Any = ScriptedEngine(Script(["x"]))

    class Broken(ScriptedScheduler):
        def respell(self, tokens: list[int]) -> list[int]:
            raise ZeroDivisionError("the engine broke")

    scheduler: Any = Broken(engine)
    worker = Worker(lambda progress: (engine, scheduler), 4, 64)
    listener = listen.open_tcp("127.0.0.1", 0)
    address, answers = listener.getsockname(), []

    def ask() -> None:
        with httpx2.Client(base_url=f"http://127.0.0.1:{address[1]}") as http:
            answers.append(http.post(CHAT, json={**HELLO, **OFF}))

    asking = threading.Thread(target=ask)
    with pytest.raises(ZeroDivisionError):
        listen.run(worker, Rules(), [listener], 0.2, lambda stop: asking.start())
    asking.join()
    assert answers[0].status_code == 503
