"""What is done to a server that runs for months: clients that leave anywhere, odd requests."""

import logging

import pytest

from tests.server.scripted import Running, Script, ScriptedEngine
from tests.server.test_streams import CHAT


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
