"""Starts `fork_runner.py` and talks to it: runs of `ds4` that cost a fork each."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Done:
    """How a run ended."""

    code: int
    out: str
    err: str

    def complaint(self) -> str:
        """The one sentence an error may be, after lines of progress."""
        lines = [line for line in self.err.splitlines() if not line.startswith("ds4: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert self.code == 2 and self.out == ""
        return lines[0]


@dataclass
class Runner:
    """Runs of `ds4` in children of one prepared process."""

    process: "subprocess.Popen[str]"
    folder: Path
    pid: int = 0
    started: threading.Event = field(default_factory=threading.Event)

    def __call__(self, *arguments: str, terminal: str | None = None, **order: Any) -> Done:
        """`terminal`: the device that is stderr; what is drawn there is the caller's to read."""
        out, err = self.folder / "out", self.folder / "err"
        err.write_text("", encoding="utf-8")
        order |= {"arguments": arguments, "out": str(out), "err": terminal or str(err)}
        assert self.process.stdin and self.process.stdout
        self.started.clear()
        print(json.dumps(order), file=self.process.stdin, flush=True)
        self.pid = json.loads(self.process.stdout.readline())["pid"]
        self.started.set()
        code = json.loads(self.process.stdout.readline())["status"]
        return Done(code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))

    def signal(self, number: int) -> None:
        """To the run that is going on; for the server's threads."""
        assert self.started.wait(60)
        os.kill(self.pid, number)


@contextmanager
def start(folder: Path, endpoint: str) -> Iterator[Runner]:
    """A runner with a home directory of its own, whose hub is `endpoint`."""
    dropped = ("DS4_", "HF_", "XDG_", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    own = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "secret"}
    own |= {"HOME": str(folder / "home"), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    own |= {"SSL_CERT_DIR": str(folder)}  # plain HTTP: every run would read 140 certificates
    with subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "cli" / "fork_runner.py")],
        env={**kept, **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Runner(process, folder)
        assert process.stdin
        process.stdin.close()
