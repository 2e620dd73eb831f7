"""A short run of the load tool: many clients, some of which leave, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "serve_load.py"


@pytest.mark.long
def test_clients_that_come_and_go() -> None:
    command = [sys.executable, str(TOOL), "soak", "--seconds", "25", "--clients", "16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["answered"] > 10 and report["left"] > 0 and report["wrong"] == 0
    assert report["cancelled"] > 0 and report["active_at_end"] == 0
