"""`ds4 chat` as a process: fed through a pipe, and typed at in a terminal."""

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Makes the terminal on stdin the process's own, as a shell does: Ctrl-C then comes as a signal.
ADOPT = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
ESCAPES = re.compile(
    r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][A-Z0-9]|[=>])"
)
# Line editing asks for marked pastes while it waits for a message, and only then.
BEGINS, READY = "\x1b[?2004h", "<ready>"
ENDS, SENT = "\x1b[?2004l", "<sent>"
CTRL_C, CTRL_D, ENTER, ALT_ENTER = "\x03", "\x04", "\r", "\x1b\r"


def test_a_pipe_is_answered_line_by_line(ds4: Any) -> None:
    messages = "Hello.\n\nWhat is 2 + 3?\n"
    done = ds4("chat", "--no-think", "--temperature", "0", "--max-tokens", "20", stdin=messages)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 and "\x1b" not in done.stdout
    assert done.stderr.splitlines()[0] == "ds4: model tiny (embedded)"


def test_the_second_answer_knows_the_first(ds4: Any) -> None:
    messages = "Hello.\n/stats\nHello again.\n/stats\n"
    done = ds4("chat", "--no-think", "--temperature", "0", "--max-tokens", "10", stdin=messages)
    cached = [int(n) for n in re.findall(r"\((\d+) cached\)", done.stderr)]
    assert cached[0] == 0 and cached[1] > 5


def test_a_conversation_outlives_the_process(ds4: Any) -> None:
    arguments = ("chat", "--no-think", "--temperature", "0", "--max-tokens", "10")
    first = ds4(*arguments, stdin="Hello.\n/save talk\n")
    assert first.returncode == 0
    (saved,) = ds4.home.rglob("talk.json")
    assert saved.stat().st_mode & 0o777 == 0o600
    second = ds4(*arguments, "--resume", "talk", stdin="Hello again.\n/stats\n")
    together = ds4(*arguments, stdin="Hello.\nHello again.\n")
    assert "Resumed talk: 2 messages." in second.stderr
    cached = re.search(r"\((\d+) cached\)", second.stderr)
    assert cached and int(cached[1]) > 5
    assert first.stdout + second.stdout == together.stdout


class Terminal:
    """The other end of a process's terminal."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", ADOPT, sys.executable, *command],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.shown = ""
        self._raw = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60.0) -> str:
        """Wait until new output matches; what came up to the end of the match."""
        while not (match := re.search(pattern, self.shown)):
            assert self._read(seconds), f"{pattern!r} did not appear in {self.shown!r}"
        seen, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return seen

    def end(self) -> tuple[int, str]:
        """Exit code, and what was shown until the end."""
        while self._read(60.0):
            pass
        return self.process.wait(timeout=60), self.shown

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], seconds)
        try:
            data = os.read(self.master, 65536) if ready else b""
        except OSError:  # Linux: the process has closed its end
            data = b""
        self._raw += data
        # Keep a cut escape sequence or character for the next time.
        text = self._raw.decode("utf-8", errors="ignore")
        head, escape, tail = text.rpartition("\x1b")
        if escape and not ESCAPES.match(escape + tail):
            text = head
            self._raw = (escape + tail).encode()
        else:
            self._raw = b""
        self.shown += ESCAPES.sub("", text.replace(BEGINS, READY).replace(ENDS, SENT))
        return bool(data)


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(ds4: Any) -> Iterator[Open]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Terminal:
            opened = Terminal(["-m", "ds4py", "chat", *arguments], ds4.environment())
            stack.callback(os.close, opened.master)
            stack.enter_context(opened.process)
            stack.callback(opened.process.kill)
            return opened

        yield start


def test_a_talk_in_a_terminal(terminal: Open, ds4: Any) -> None:
    screen = terminal("--no-think", "--temperature", "0", "--max-tokens", "20")
    screen.wait_for(r"/help lists the commands")
    screen.wait_for(READY)
    screen.type("What is 2 + 3?" + ENTER)
    screen.wait_for(SENT + r"\s*\w")
    screen.type("/stats" + ENTER)  # while it answers: seen when its turn has come
    assert "/stats" not in screen.wait_for(READY)
    screen.wait_for(r"answer \d+ tokens")
    screen.wait_for(READY)
    screen.type("/frobnicate" + ENTER)
    screen.wait_for("error: there is no command /frobnicate")
    screen.wait_for(READY)
    screen.type(CTRL_D)
    code, rest = screen.end()
    assert code == 0 and "Traceback" not in rest
    (history,) = ds4.home.rglob("history")
    assert "+What is 2 + 3?" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o777 == 0o600


def test_ctrl_c_stops_the_answer_and_keeps_the_talk(terminal: Open) -> None:
    screen = terminal("--no-think", "--temperature", "0")
    screen.wait_for(READY)
    screen.type("Tell me a long story about a fox." + ENTER)
    screen.wait_for(SENT + r"(?s:.*?)\w+ \w+ \w+")
    screen.type(CTRL_C)
    screen.wait_for(r"\(stopped\)")
    screen.wait_for(READY)
    screen.type("/stats" + ENTER)
    screen.wait_for(r"tok/s, stopped")
    screen.wait_for(READY)
    screen.type("What is 2 + 3?" + ENTER)
    screen.wait_for(READY)
    screen.type(CTRL_C)
    screen.wait_for("Ctrl-D or /quit")
    screen.wait_for(READY)
    screen.type(CTRL_C)
    code, rest = screen.end()
    assert code == 130 and "Traceback" not in rest


def test_ctrl_c_while_the_prompt_is_read_leaves_no_trace(terminal: Open, tmp_path: Any) -> None:
    long = tmp_path / "long.txt"
    long.write_text("The fox and the bear went home. " * 1200, encoding="utf-8")
    screen = terminal("--no-think", "--max-tokens", "5")
    screen.wait_for(READY)
    screen.type(f"/read {long}" + ENTER)
    screen.wait_for("Reading the prompt")
    screen.type(CTRL_C)
    screen.wait_for(r"\(stopped\)")
    screen.wait_for(READY)
    screen.type("Hello." + ENTER)
    screen.wait_for(READY)
    screen.type("/stats" + ENTER)
    stats = screen.wait_for(r"prompt (\d+) tokens")
    assert int(stats.split()[-2]) < 100
    screen.type(CTRL_D)


def test_several_lines_make_one_message(terminal: Open, ds4: Any) -> None:
    screen = terminal("--no-think", "--temperature", "0", "--max-tokens", "5")
    screen.wait_for(READY)
    screen.type("one\\" + ENTER + "two" + ALT_ENTER + "three" + ENTER)
    screen.wait_for(r"three(?s:.*)\(cut at --max-tokens 5\)")
    screen.type("/save lines" + ENTER)
    screen.wait_for(r"Saved as lines")
    screen.type("/quit" + ENTER)
    assert screen.end()[0] == 0
    (saved,) = ds4.home.rglob("lines.json")
    assert "one\\ntwo\\nthree" in saved.read_text(encoding="utf-8")


def test_a_terminal_that_goes_away_ends_the_chat(terminal: Open) -> None:
    screen = terminal("--no-think")
    screen.wait_for(READY)
    screen.process.send_signal(signal.SIGHUP)
    assert screen.process.wait(timeout=60) in (-signal.SIGHUP, 0, 130)
