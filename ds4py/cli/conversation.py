"""From messages to an answer: the one straight line that `generate` and `chat` share.

messages -> text.chat -> token ids -> session -> text pieces -> stream parser -> events. Holds the
messages of a conversation and what the last answer cost. Does not draw, read or write anything.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from ds4py.errors import PromptError
from ds4py.text import chat
from ds4py.text.events import Content, Event

if TYPE_CHECKING:
    from ds4py import SamplingOptions
    from ds4py.text.tokenizer import Tokenizer

Message = dict[str, Any]
Progress = Callable[[str, int, int], None]


class Piece(Protocol):
    """What a session yields: one token's id (None when it has none) and text."""

    @property
    def id(self) -> int | None: ...
    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str | None: ...


class Timeline(Protocol):
    """What is used of a `ds4py` Session."""

    def sync(self, tokens: Sequence[int], progress: Progress | None = None) -> int: ...
    def generate(self, options: "SamplingOptions") -> Iterator[Any]: ...
    def save(self, path: Path) -> None: ...


class Parser(Protocol):
    """What is used of a `StreamParser`."""

    def push(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...
    def message(self) -> Message: ...


class RawParser:
    """For a prompt without chat encoding: every character is content."""

    def __init__(self) -> None:
        self._text: list[str] = []

    def push(self, text: str) -> list[Event]:
        self._text.append(text)
        return [Content(text)] if text else []

    def finish(self) -> list[Event]:
        return []

    def message(self) -> Message:
        return {"role": "assistant", "content": "".join(self._text)}


class Stopped(Exception):
    """The user wanted no more while the prompt was still being read."""


@dataclass
class Turn:
    """One answer and what it cost. Times in seconds."""

    prompt_tokens: int
    cached_tokens: int = 0
    """How many of them the session already held."""
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """None while it runs, and for ever when it was stopped by the user."""
    prefill_s: float = 0.0
    decode_s: float = 0.0
    message: Message = field(default_factory=dict)

    @property
    def prefill_tps(self) -> float:
        """Tokens read per second, of those that had to be read."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prefill_s)

    @property
    def decode_tps(self) -> float:
        return _rate(len(self.tokens), self.decode_s)


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def never() -> bool:
    """The `stopped` of an answer that nobody can stop between tokens."""
    return False


def answer(
    session: Timeline,
    prompt: Sequence[int],
    sampling: "SamplingOptions",
    parser: Parser,
    turn: Turn,
    progress: Progress | None = None,
    stopped: Callable[[], bool] = never,
) -> Generator[Event, None, None]:
    """Yield the events of one answer and fill in `turn`, whose message is complete at the end.

    `stopped` is asked after every chunk of the prompt (raises Stopped) and after every token
    (ends the answer). Raises PromptError when the prompt is longer than the context.
    """

    def watched(stage: str, done: int, total: int) -> None:
        if progress:
            progress(stage, done, total)
        if stopped():
            raise Stopped

    start = perf_counter()
    turn.cached_tokens = session.sync(prompt, watched)
    turn.prefill_s = perf_counter() - start
    start = perf_counter()
    stream = session.generate(sampling)
    finished = False
    try:
        for token in stream:
            if token.id is not None:
                turn.tokens.append(token.id)
            turn.finish_reason = token.finish_reason
            yield from parser.push(token.text)
            if turn.finish_reason is None and stopped():
                break
        finished = True
        yield from parser.finish()
    finally:
        if hasattr(stream, "close"):
            stream.close()
        if not finished:
            parser.finish()
        turn.decode_s = perf_counter() - start
        turn.message = parser.message()


class Conversation:
    """The messages so far, the mode they are answered in, and the session that holds them."""

    def __init__(
        self, session: Timeline, tokenizer: "Tokenizer", sampling: "SamplingOptions"
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.messages: list[Message] = []
        self.thinking = False
        self.effort: str | None = None
        self.last: Turn | None = None

    @property
    def system(self) -> str:
        """The system message, empty when there is none."""
        first = self.messages[0] if self.messages else {}
        return str(first["content"]) if first.get("role") == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        rest = self.messages[1:] if self.system else self.messages
        self.messages = [{"role": "system", "content": text}, *rest] if text else list(rest)

    def reset(self) -> None:
        """Forget everything that was said, but not the system message."""
        self.messages = self.messages[:1] if self.system else []
        self.last = None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of messages in the chat encoding, ready to be answered."""
        return self.tokenizer.encode(
            chat.segments(list(messages), thinking=self.thinking, effort=self.effort)
        )

    def ask(
        self,
        text: str,
        progress: Progress | None = None,
        stopped: Callable[[], bool] = never,
    ) -> Generator[Event, None, None]:
        """Say something and yield the events of the answer, which joins the history.

        A stopped answer joins it as far as it came. When nothing came (Stopped while the prompt
        was read, PromptError), the history is as before.
        """
        if not text.strip():
            raise PromptError("the message is empty; write something")
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.encode(asked)
        self.last = turn = Turn(prompt_tokens=len(prompt))
        parser = self._parser()
        try:
            yield from answer(self.session, prompt, self.sampling, parser, turn, progress, stopped)
        finally:
            if turn.tokens or turn.finish_reason:
                self.messages = [*asked, turn.message]

    def _parser(self) -> Parser:
        from ds4py.text.stream import StreamParser

        # No tool was offered, so what looks like a call is text like any other.
        return StreamParser(thinking=self.thinking, tools=False)
