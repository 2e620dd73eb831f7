"""What happens around a server that runs for months: full disks, other files, clocks, signals.

Each case is a real `ds4 serve` in a process of its own.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from ds4py import assets
from tests.server.process import ROOT, Served, start, wait
from tests.server.test_streams import eventually

pytestmark = pytest.mark.long

CHAT = "/v1/chat/completions"
OFF: Any = {"thinking": {"type": "disabled"}, "temperature": 0}
LIMITED = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux limits files here")


@contextlib.contextmanager
def serving(directory: Path, *options: str, env: Any = None) -> Iterator[tuple[Served, list[str]]]:
    """A server, and the lines it says; it is stopped at the end, if nobody did before."""
    served, said = start(directory, *options, env=env), []
    stderr: Any = served.process.stderr
    reader = threading.Thread(target=lambda: said.extend(stderr))
    reader.start()
    try:
        yield served, said
        if served.process.poll() is None:
            served.process.terminate()
        assert served.process.wait(60) == 0
    finally:
        served.process.kill()
        reader.join()
        stderr.close()
        served.close()


def asked(served: Served, text: str, **more: Any) -> str:
    """The answer to a question."""
    body = {"messages": [{"role": "user", "content": text}], **OFF, **more}
    with served.http() as http:
        response = http.post(CHAT, json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


@LIMITED
def test_a_disk_that_is_full_costs_no_answer_and_is_told_once(tmp_path: Path) -> None:
    kv = tmp_path / "kv"
    with serving(tmp_path, "--kv-dir", str(kv)) as (served, said):
        resource.prlimit(served.process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
        for n in range(2):
            asked(served, f"{n} Tell me a story about a fox. " * 40, max_tokens=2)
        assert asked(served, "What is 17 + 25?") == "17 + 25 = 42."
    assert len(said) == 1 and "not saved" in said[0] and "fox" not in said[0]
    with serving(tmp_path, "--kv-dir", str(kv)) as (served, said):
        asked(served, "Tell me a story about a fox. " * 40, max_tokens=2)
    assert said == []
    assert list((kv / "snapshots").iterdir()) != []


@pytest.mark.parametrize("change", ["removed", "replaced", "cut"])
def test_model_files_that_change_while_they_are_used(tmp_path: Path, change: str) -> None:
    """Files that are open stay what they were; of one that is overwritten, nothing is believed."""
    model = tmp_path / "model"
    shutil.copytree(assets.path("models", "tiny"), model)
    options = ["--model", str(model), "--experts", "streamed", "--kv-dir", "none"]
    with serving(tmp_path, *options) as (served, said):
        assert asked(served, "Hi", max_tokens=1)
        for path in model.glob("experts-*"):
            if change == "removed":
                path.unlink()
            elif change == "replaced":
                other = tmp_path / path.name
                other.write_bytes(b"something else" * 1000)
                other.replace(path)
            else:
                os.truncate(path, 20_000)
        with served.http() as http:
            body = {"messages": [{"role": "user", "content": "Tell me a story."}], **OFF}
            response = http.post(CHAT, json={**body, "max_tokens": 60})
            assert http.get("/health").json() == {"status": "ok", "active": 0, "waiting": 0}
        assert response.status_code == (500 if change == "cut" else 200), response.text
    assert ("WeightsError" in "".join(said)) == (change == "cut")


CLOCK = """
import time
from pathlib import Path
real, offset = time.time, Path(__file__).with_name("offset")
time.time = lambda: real() + float(offset.read_text())
time.time_ns = lambda: int(time.time() * 1e9)
"""
"""A module that Python imports when it starts: the clock that people and time servers set."""


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CLOCK, encoding="utf-8")
    (tmp_path / "offset").write_text("0", encoding="utf-8")
    paths = f"{tmp_path}:{ROOT}"
    kv = str(tmp_path / "kv")
    with serving(tmp_path, "--kv-dir", kv, env={"PYTHONPATH": paths}) as (served, said):
        for years in (0, 10, -10, 0):
            # The server reads the file at any moment, so it is never seen half written.
            (tmp_path / "next").write_text(str(years * 3.15e7), encoding="utf-8")
            (tmp_path / "next").replace(tmp_path / "offset")
            assert asked(served, "What is 17 + 25?") == "17 + 25 = 42."
            with served.http() as http:
                body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True, **OFF}
                text = http.post(CHAT, json={**body, "max_tokens": 2}).text
                assert text.endswith("data: [DONE]\n\n")
                made = json.loads(text.splitlines()[0][6:])["created"]
            assert abs(made - time.time() - years * 3.15e7) < 1e6  # the clock did jump
    assert said == []


@pytest.fixture
def long_prompt() -> dict[str, Any]:
    """A request whose prompt takes a while to read."""
    text = "Tell me a long story about a fox and an owl. " * 900
    return {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 5}


@pytest.mark.parametrize("twice", [False, True])
def test_a_signal_while_a_prompt_is_read(
    tmp_path: Path, long_prompt: dict[str, Any], twice: bool
) -> None:
    """One ends the answer and keeps what was read; a second one ends the process."""
    kv = tmp_path / "kv"
    served = start(tmp_path, "--kv-dir", str(kv), "--grace", "100" if twice else "0")
    with served.http() as http, http.stream("POST", CHAT, json=long_prompt) as response:
        with served.http() as other:
            eventually(lambda: other.get("/status").json()["read_tokens"] > 0)
        served.process.terminate()
        if twice:
            served.process.send_signal(signal.SIGINT)
            with contextlib.suppress(httpx2.HTTPError):
                response.read()
        else:
            lines = response.read().decode().splitlines()
            assert lines[-2] == "data: [DONE]" and "shutting down" in lines[-4]
    assert wait(served) == (130 if twice else 0)
    assert twice or list((kv / "snapshots").iterdir()) != []


def test_a_signal_while_the_model_is_loaded(tmp_path: Path) -> None:
    """Nobody waits for a model that nobody will ask."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_LOAD, encoding="utf-8")
    port = free_port()
    command = [sys.executable, "-m", "ds4py", "serve", "--port", str(port)]
    process = subprocess.Popen(
        command,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        stderr=subprocess.PIPE,
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}") as http:

            def loading() -> bool:
                with contextlib.suppress(httpx2.ConnectError):
                    return bool(http.get("/health").json()["status"] == "loading")
                return False

            eventually(loading)
        process.terminate()
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    assert b"Traceback" not in said


SLOW_LOAD = """
import threading
from ds4py import Engine
open_it = Engine.open
def slow(path, options=None, progress=lambda *made: None):
    for n in range(10_000):
        progress("load", n, 10_000)
        threading.Event().wait(0.05)
    return open_it(path, options, progress)
Engine.open = staticmethod(slow)
"""
"""A model that takes minutes to load, and says how far it is."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_a_thousand_idle_connections_and_more(served: Served) -> None:
    """They are taken up to the limit, beyond it the longest idle one goes; all others work."""
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    before = len(os.listdir(f"/proc/{served.process.pid}/fd")) if os.path.isdir("/proc") else 0
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(1200)]
        assert asked(served, "What is 17 + 25?") == "17 + 25 = 42."
        idle[-1].settimeout(30)
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b" 200 " in idle[-1].recv(100)
        idle[0].settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            assert idle[0].recv(1) == b""
    if before:
        pid = served.process.pid
        eventually(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= before + 2)
