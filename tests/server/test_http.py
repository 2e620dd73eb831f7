"""What holds for every request: keys, hosts, methods, bodies, errors in shape, start and end."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ds4py.errors import InputError
from ds4py.server import listen
from ds4py.server.app import Rules
from tests.server.process import start, wait
from tests.server.scripted import Running, Script, ScriptedEngine

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def error_of(response: httpx2.Response) -> dict[str, Any]:
    """The error in OpenAI's shape; checks that all its keys are there."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"].startswith("req_")
    return error


BAD_BODIES = {
    "empty": (b"", "empty"),
    "not JSON": (b"{messages", "not JSON"),
    "truncated": (b'{"messages": [', "not JSON"),
    "a list": (b"[]", "array"),
    "a number": (b"3", "number"),
    "a key twice": (b'{"n": 1, "n": 2}', "twice"),
    "NaN": (b'{"temperature": NaN}', "NaN"),
    "Infinity": (b'{"temperature": -Infinity}', "Infinity"),
    "deep": (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nested"),
    "deep, closed early": (b"[" * 100_000, "nested"),
    "digits": (b'{"seed": ' + b"9" * 10_000 + b"}", "not JSON"),
    "not UTF-8": (b'{"model": "\xff"}', "UTF-8"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bodies_that_are_none(served: Any, name: str) -> None:
    body, expected = BAD_BODIES[name]
    with served.http() as http:
        response = http.post(CHAT, content=body)
    assert response.status_code == 400
    assert expected in error_of(response)["message"]


FIELDS = [
    ({"messages": []}, "messages"),
    ({}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 99}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 1e400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"n": 99}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 1000}, "stop"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.name"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}] * 2}, "tools.1.name"),
    ({"tools": [{"type": "function"}]}, "tools.0"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"no_such_field": 1}, "no_such_field"),
]


@pytest.mark.parametrize(("given", "param"), FIELDS, ids=lambda v: str(v)[:60])
def test_fields_at_fault_are_named(served: Any, given: dict[str, Any], param: str) -> None:
    body = {**({} if "messages" in given or not given else HELLO), **given}
    with served.http() as http:
        response = http.post(CHAT, content=json.dumps(body).replace("Infinity", "1e400"))
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param and error["type"] == "invalid_request_error"


def test_what_is_tolerated(served: Any) -> None:
    """Null for nothing, -0, other seeds, form content type, gzip, a query, a trailing slash."""
    body = {**HELLO, "unknown": None, "temperature": -0.0, "seed": -(2**70), "user": "me", "n": 1}
    import gzip

    form = {"content-type": "application/x-www-form-urlencoded"}
    with served.http() as http:
        packed = gzip.compress(json.dumps(body).encode())
        for response in (
            http.post(CHAT + "/?beta=true", content=json.dumps(body), headers=form),
            http.post(CHAT, content=packed, headers={"content-encoding": "gzip"}),
            http.post(CHAT, content=(bytes([b]) for b in json.dumps(body).encode())),
        ):
            assert response.status_code == 200, response.text


def test_paths_and_methods(served: Any) -> None:
    with served.http() as http:
        response = http.get("/v1/nothing")
        assert response.status_code == 404 and error_of(response)["type"] == "not_found_error"
        response = http.get(CHAT)
        assert response.status_code == 405 and response.headers["allow"] == "POST"
        assert http.get("/v1/../etc/passwd").status_code == 404
        assert http.get("/..%2f..%2fetc/passwd").status_code == 404
        assert http.head("/").status_code == 200
        assert http.get("/v1/models/tiny").json()["context_length"] == 16384
        assert error_of(http.get("/v1/models/gpt"))["code"] == "model_not_found"
        assert http.get("/health").json()["status"] == "ok"


def test_tokenize_and_back(served: Any) -> None:
    text = "Tom's number is <think> 472.\n"
    with served.http() as http:
        counted = http.post("/tokenize", json={"content": text}).json()
        assert counted["count"] == len(counted["tokens"])
        back = http.post("/detokenize", json={"tokens": counted["tokens"]}).json()
        assert back == {"content": text}
        assert error_of(http.post("/detokenize", json={"tokens": [-1]}))["param"] == "tokens"


def test_other_hosts_and_origins_are_refused(served: Any) -> None:
    with served.http() as http:
        assert http.get("/health", headers={"host": "evil.example:80"}).status_code == 403
        assert http.get("/health", headers={"host": "localhost:1"}).status_code == 200
        response = http.post(CHAT, json=HELLO, headers={"origin": "https://evil.example"})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
        preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        response = http.options(CHAT, headers=preflight)
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers


def test_origins_that_are_allowed() -> None:
    rules = Rules(origins=("https://mine.example",), api_key="k")
    running = Running(ScriptedEngine(Script(["x"])), rules)
    with running as server, httpx2.Client(base_url=server.url) as http:
        origin = {"origin": "https://mine.example"}
        preflight = {**origin, "access-control-request-method": "POST"}
        response = http.options(CHAT, headers=preflight)
        assert response.headers["access-control-allow-origin"] == "https://mine.example"
        response = http.post(CHAT, json=HELLO, headers={**origin, "x-api-key": "k"})
        assert response.is_success
        assert response.headers["access-control-allow-origin"] == "https://mine.example"
        response = http.post(CHAT, json=HELLO, headers={"origin": "https://other.example"})
        assert response.status_code == 403


def test_keys() -> None:
    rules = Rules(api_key="secret")
    with Running(ScriptedEngine(Script(["hello"])), rules) as server:
        with httpx2.Client(base_url=server.url) as http:
            for headers in (
                {},
                {"x-api-key": "secre"},
                {"authorization": "Bearer " + "k" * 50_000},
            ):
                response = http.post(CHAT, json=HELLO, headers=headers)
                assert response.status_code == 401 and response.headers["www-authenticate"]
                assert error_of(response)["type"] == "authentication_error"
            response = http.post(CHAT, json=HELLO, headers=[(b"x-api-key", b"\xff\xfe")])
            assert response.status_code == 401
            assert http.get("/health").status_code == 200
            assert http.post(CHAT, json=HELLO, headers={"x-api-key": "secret"}).is_success
            response = http.post(CHAT, json=HELLO, headers={"authorization": "bearer  secret"})
            assert response.is_success
        client = server.openai(api_key="secret")
        assert client.models.list().data[0].id == "scripted"


def test_a_key_is_the_bytes_that_were_given() -> None:
    running = Running(ScriptedEngine(Script(["hello"])), Rules(api_key="schlüssel"))
    with running as server, server.http() as http:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            headers = [(b"x-api-key", key.encode())]
            assert http.get("/v1/models", headers=headers).status_code == status


def test_long_bodies_are_not_read_to_their_end() -> None:
    with Running(ScriptedEngine(Script(["x"])), Rules(max_body=1000)) as server:
        with httpx2.Client(base_url=server.url) as http:
            assert http.post(CHAT, content=b" " * 1001).status_code == 413
            assert http.post(CHAT, content=(b" " * 600 for _ in range(2))).status_code == 413
            import gzip

            bomb = gzip.compress(b" " * 1_000_000)
            packed = {"content-encoding": "gzip"}
            assert http.post(CHAT, content=bomb[:900], headers=packed).status_code in (400, 413)
        with server.connect() as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 200000000\r\n\r\n"
            connection.sendall(head.encode())
            assert b" 413 " in connection.recv(1000)


def test_strict_model_names() -> None:
    running = Running(ScriptedEngine(Script(["x"])), Rules(strict_model=True))
    with running as server, httpx2.Client(base_url=server.url) as http:
        response = http.post(CHAT, json={**HELLO, "model": "gpt-9"})
        assert response.status_code == 404 and "scripted" in error_of(response)["message"]
        assert http.post(CHAT, json={**HELLO, "model": "scripted"}).is_success


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with listen.open_unix(path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with pytest.raises(InputError, match="another server"), listen.open_unix(path):
            pass
        assert path.exists()
    assert not path.exists()
    path.write_text("mine")
    with pytest.raises(InputError, match="no socket"), listen.open_unix(path):
        pass
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="too long"), listen.open_unix(tmp_path / ("x" * 120)):
        pass


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        pytest.param(["--api-key", ""], "--api-key is empty", marks=pytest.mark.long),
        (["--model", "nothing-here"], "no model"),
        (["--port", "{busy}"], "cannot listen"),
        pytest.param(["--uds", "/no/dir/s"], "cannot make the socket", marks=pytest.mark.long),
    ],
)
def test_what_cannot_be_served_is_told_in_one_line(options: list[str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        given = [o.replace("{busy}", str(busy.getsockname()[1])) for o in options]
        port = [] if "--port" in given else ["--port", "0"]
        done = subprocess.run(
            [sys.executable, "-m", "ds4py", "serve", *port, *given],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("ds4: model")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_a_signal_ends_streams_properly(tmp_path: Path, number: signal.Signals) -> None:
    served = start(tmp_path, "--grace", "0.2")
    body = {
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "stream": True,
        "ignore_eos": True,
    }
    with served.http() as http, http.stream("POST", CHAT, json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        served.process.send_signal(number)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]"
    last = json.loads([line for line in rest if line.startswith("data: {")][-1][6:])
    assert "shutting down" in last["error"]["message"]
    assert wait(served) == 0
    assert not Path(served.uds).exists()


def test_texts_are_written_to_the_trace_and_nowhere_else(tmp_path: Path) -> None:
    secret, trace, place = "Tom hid 472 shells.", tmp_path / "trace", tmp_path / "place"
    place.mkdir()
    served = start(place, "--kv-dir", "none", "--trace", str(trace))
    body = {**HELLO, "messages": [{"role": "user", "content": secret}]}
    with served.http() as http:
        assert http.post(CHAT, json=body).is_success
        assert http.post(CHAT, json={**body, "nonsense": secret}).status_code == 400
    served.process.terminate()
    _, said = served.process.communicate(timeout=60)
    assert secret not in said and list(place.iterdir()) == []
    (line,) = trace.read_text(encoding="utf-8").splitlines()
    found = json.loads(line)
    assert secret in found["prompt"] and found["completion_tokens"] == 2
    assert stat.S_IMODE(trace.stat().st_mode) == 0o600
