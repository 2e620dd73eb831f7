"""Requests nobody would send: every answer is whole and in shape, and the next request works.

What makes and checks them is tools/serve_fuzz.py; here a few against a scripted model, and more, of
all kinds, against a real server.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from ds4py.server.app import Rules
from tests.server.scripted import Running, Script, ScriptedEngine
from tools import serve_fuzz

ROOT = Path(__file__).resolve().parents[2]


def run(strategy: Any, ask: Any, n: int) -> None:
    script = Script(["I think.</think>One answer."])
    with Running(ScriptedEngine(script, context=4096), Rules()) as server, server.http() as http:

        @settings(max_examples=n, suppress_health_check=list(HealthCheck), deadline=None)
        @given(strategy)
        def one(made: Any) -> None:
            ask(server, http, made)

        one()
        while http.get("/status").json()["active"]:
            pass  # what was left behind ends within a step
        assert http.get("/health").json() == {"status": "ok", "active": 0, "waiting": 0}
        assert http.get("/status").json()["failed"] == 0
    assert server.scheduler.n_lent == 0


def test_bodies_nobody_would_send() -> None:
    def ask(server: Any, http: Any, request: Any) -> None:
        path, body = request
        answer = http.post(path, content=json.dumps(body))
        serve_fuzz.check(path, answer.status_code, answer.headers, answer.text)

    run(serve_fuzz.requests, ask, 60)


def test_bytes_nobody_would_send() -> None:
    run(
        serve_fuzz.wires(), lambda server, http, wire: serve_fuzz.exchange(server.address, wire), 60
    )


@pytest.mark.long
def test_many_more_of_them_and_those_of_the_document() -> None:
    pytest.importorskip("schemathesis", reason="the extra `fuzz` is missing")
    done = subprocess.run(
        [sys.executable, "-m", "tools.serve_fuzz", "--requests", "240", "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert min(report["asked"].values()) >= 50 and report["statuses"]["200"] > 10
