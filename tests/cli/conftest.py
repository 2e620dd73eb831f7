"""Fakes at the engine's seam, and a way to run the real command in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Piece(NamedTuple):
    id: int | None
    text: str
    finish_reason: str | None = None


class ByteTokenizer:
    """One token for each byte of text; control tokens get ids from 256 on as they appear."""

    bos_id, eos_id, vocab_size = 0, 1, 512

    def __init__(self) -> None:
        self.control: dict[str, int] = {}

    def encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(prompt.encode())
        ids: list[int] = []
        for text, control, _ in prompt:
            if control:
                ids.append(self.control.setdefault(text, 256 + len(self.control)))
            else:
                ids.extend(text.encode())
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        names = {value: key for key, value in self.control.items()}
        return b"".join(names[i].encode() if i > 255 else bytes([i]) for i in ids).decode()


@dataclass
class ScriptedSession:
    """Answers with the given texts, one after the other, whatever it is asked."""

    answers: list[list[str]] = field(default_factory=list)
    context: int = 10_000
    chunk: int = 64
    tokens: list[int] = field(default_factory=list)
    closed: int = 0

    def sync(self, tokens: Sequence[int], progress: Any = None) -> int:
        from ds4py.errors import PromptError

        if len(tokens) > self.context:
            raise PromptError(f"the prompt has {len(tokens)} tokens, the context {self.context}")
        pairs = zip(self.tokens, tokens, strict=False)
        reused = next((n for n, (a, b) in enumerate(pairs) if a != b), None)
        reused = min(len(self.tokens), len(tokens)) if reused is None else reused
        del self.tokens[reused:]
        for start in range(reused, len(tokens), self.chunk):
            self.tokens.extend(tokens[start : start + self.chunk])
            if progress:
                progress("prefill", len(self.tokens), len(tokens))
        return reused

    def generate(self, options: Any) -> Iterator[Piece]:
        texts = self.answers.pop(0)
        try:
            for number, text in enumerate(texts):
                self.tokens.append(1000 + number)
                yield Piece(1000 + number, text)
            yield Piece(None, "", "stop")
        finally:
            self.closed += 1

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("snapshot", encoding="utf-8")


@dataclass
class Sampling:
    max_tokens: int | None = None


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def scripted() -> type[ScriptedSession]:
    return ScriptedSession


@pytest.fixture
def sampling() -> Sampling:
    return Sampling()


@dataclass
class Command:
    """Runs `python -m ds4py` with a home directory of its own."""

    home: Path

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DS4_", "XDG_", "PYTHON"))}
        paths = {"HOME": str(self.home), "PYTHONPATH": str(ROOT), "TERM": "xterm"}
        return {**kept, **paths, "PROMPT_TOOLKIT_NO_CPR": "1", **(extra or {})}

    def __call__(
        self,
        *arguments: str,
        stdin: bytes | str = b"",
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> "subprocess.CompletedProcess[str]":
        data = stdin.encode() if isinstance(stdin, str) else stdin
        done = subprocess.run(
            [sys.executable, "-m", "ds4py", *arguments],
            input=data,
            capture_output=True,
            env=self.environment(env),
            timeout=120,
            check=False,
            **options,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    def start(
        self, *arguments: str, env: Mapping[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[bytes]":
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | options
        return subprocess.Popen(
            [sys.executable, "-m", "ds4py", *arguments], env=self.environment(env), **pipes
        )


@pytest.fixture
def ds4(tmp_path: Path) -> Command:
    home = tmp_path / "home"
    home.mkdir()
    return Command(home)


@pytest.fixture
def complaint() -> Callable[["subprocess.CompletedProcess[str]"], str]:
    """The one line an error may be: checks its form and returns it."""

    def check(done: "subprocess.CompletedProcess[str]") -> str:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("ds4: model ")]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        assert done.stdout == ""
        return lines[0]

    return check
