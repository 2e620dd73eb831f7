"""A real `ds4 serve` in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.server.clients import Clients

ROOT = Path(__file__).resolve().parents[2]


class Served(Clients):
    """A server process and the ways to reach it."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, uds: str) -> None:
        super().__init__()
        self.process, self.url, self.uds = process, url, uds


def start(directory: Path, *options: str, env: dict[str, str] | None = None) -> Served:
    """`ds4 serve` on a free port and a socket in the directory, ready."""
    uds = str(directory / "ds4.sock")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DS4_", "XDG_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "ds4py", "serve", "--port", "0", "--uds", uds, *options],
        env={**kept, "HOME": str(directory), "PYTHONPATH": str(ROOT), **(env or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if "serving" in line:
            url = line.split(" at ")[1].split()[0]
            return Served(process, url, uds)
    raise AssertionError(said)


def stop(served: Served) -> int:
    """SIGTERM; the exit code."""
    served.process.terminate()
    return wait(served)


def wait(served: Served) -> int:
    """The exit code of a server that is stopping."""
    served.close()
    _, _ = served.process.communicate(timeout=60)
    return served.process.returncode
