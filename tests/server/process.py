"""A real `ds4 serve` in a process of its own."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.server.clients import HANGS_S, Clients

ROOT = Path(__file__).resolve().parents[2]


class Served(Clients):
    """A server process, the ways to reach it, and what it says once it serves."""

    def __init__(self, process: "subprocess.Popen[str]", uds: str) -> None:
        """Returns when it is ready."""
        super().__init__()
        self.process, self.uds = process, uds
        self.said: list[str] = []
        """Complete when the process has ended and was waited for."""
        assert process.stderr is not None
        before = []
        for line in process.stderr:
            if "serving" in line:
                self.url = line.split(" at ")[1].split()[0]
                break
            before.append(line)
        else:
            raise AssertionError("".join(before))
        self._reader = threading.Thread(target=self.said.extend, args=(process.stderr,))
        self._reader.start()

    def wait(self) -> int:
        """The exit code, once the server has ended by itself or by a signal."""
        self.close()
        code = self.process.wait(HANGS_S)
        self._reader.join()
        return code


def launch(
    directory: Path, *options: str, env: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """`ds4 serve` on a free port and on the socket `ds4.sock` in the directory."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DS4_", "XDG_"))}
    given = ["--port", "0", "--uds", str(directory / "ds4.sock"), *options]
    return subprocess.Popen(
        [sys.executable, "-m", "ds4py", "serve", *given],
        env={**kept, "HOME": str(directory), "PYTHONPATH": str(ROOT), **(env or {})},
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def serving(directory: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """A server that is ready; it is ended, properly, unless somebody has waited for it before."""
    with launch(directory, *options, env=env) as process:
        served = Served(process, str(directory / "ds4.sock"))
        try:
            yield served
            if process.returncode is None:
                process.terminate()
                assert served.wait() == 0
        finally:
            process.kill()
            served.wait()
