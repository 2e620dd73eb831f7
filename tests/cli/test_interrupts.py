"""Ctrl-C at every stage of a real process: exit code 130 and not a word more.

The signal is sent when the process shows that it is there: a module it has just imported (Python
lists them with -X importtime), its first line on stderr, or its first text on stdout.
"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

import pytest

Start = Callable[..., "subprocess.Popen[bytes]"]
LONG = "Tell me a story about a fox, a bear and a bird. " * 60


@pytest.fixture
def start(ds4: Any) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def run(*arguments: str, trace: bool = False) -> "subprocess.Popen[bytes]":
            options = ["-X", "importtime"] if trace else []
            process = subprocess.Popen(
                [sys.executable, *options, "-m", "ds4py", *arguments],
                bufsize=0,  # what `wait_for` has read beyond its line, `communicate` would miss
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ds4.environment(),
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


def wait_for(stream: IO[bytes], text: bytes) -> None:
    """Read lines until one holds the text."""
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"{text!r} did not appear")


def interrupt(process: "subprocess.Popen[bytes]") -> tuple[bytes, list[bytes]]:
    """What was still printed after the signal, without the list of imports."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    return out, [line for line in err.splitlines() if not line.startswith(b"import time:")]


@pytest.mark.parametrize(
    "module",
    [
        b" typer.models",
        b" ds4py.cli.settings",
        b" numpy.exceptions",
        b" mlx.core",
        b" ds4py.engine.session",
        b" ds4py.text.stream",
    ],
)
def test_while_it_starts_and_reads_the_prompt(start: Start, module: bytes) -> None:
    process = start("generate", LONG, trace=True)
    assert process.stderr is not None
    wait_for(process.stderr, module)
    out, err = interrupt(process)
    assert out == b"" and set(err) <= {b"ds4: model tiny (embedded)"}


@pytest.mark.parametrize("command", ["generate", "chat", "verify", "bench"])
def test_while_the_model_is_loaded(start: Start, command: str) -> None:
    arguments = {"generate": [LONG], "bench": ["speed"]}.get(command, [])
    process = start(command, *arguments)
    assert process.stderr is not None
    wait_for(process.stderr, b"ds4: model tiny")
    assert interrupt(process) == (b"", [])


@pytest.mark.parametrize("form", [[], ["--raw"]], ids=["chat", "raw"])
def test_while_it_answers(start: Start, form: list[str]) -> None:
    process = start("generate", "Tell me a long story about a fox.", "--temperature", "0", *form)
    assert process.stdout is not None
    first = process.stdout.read(1)
    assert first != b""
    _, err = interrupt(process)
    assert err in ([], [b"ds4: model tiny (embedded)"])
