"""One answer while it is made: tokens in, events out.

A generation does not run by itself: the worker takes one slice of its prompt, or hands it one
token, at a time. Knows sessions and the parser, not threads or protocols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

from ds4py.engine.session import Session, Token
from ds4py.engine.stopping import StopStrings
from ds4py.server.request import Chance, Event, Finished, Request, Scored, Usage
from ds4py.text.events import Content, ToolCallEnd, ToolCallStart
from ds4py.text.messages import DSML, EOS, Segment
from ds4py.text.stream import StreamParser
from ds4py.text.tokenizer import Tokenizer

SCORED_SLICE = 128
"""Tokens read at a time where all their logits are kept: 66 MB for 129,280 of them."""


class Parser(Protocol):
    """What is used of a StreamParser."""

    @property
    def in_reasoning(self) -> bool: ...
    def push(self, text: str) -> list[Any]: ...
    def finish(self) -> list[Any]: ...
    def message(self) -> dict[str, Any]: ...


class PlainParser:
    """Takes everything for content."""

    in_reasoning = False

    def __init__(self) -> None:
        self._text: list[str] = []

    def push(self, text: str) -> list[Any]:
        self._text.append(text)
        return [Content(text)] if text else []

    def finish(self) -> list[Any]:
        return []

    def message(self) -> dict[str, Any]:
        return {"role": "assistant", "content": "".join(self._text)}


@dataclass(frozen=True)
class Turn:
    """An answer as the model wrote it: what replays it exactly."""

    tokens: tuple[int, ...]
    thinking: bool
    message: dict[str, Any]


class Generation:
    """The state of one answer. `usage`, `turn` and `finished` are complete at its end."""

    def __init__(self, request: Request, prompt: list[int], tokenizer: Tokenizer) -> None:
        """prompt: the request's, perhaps in other ids for the same text."""
        self.request = request
        self.prompt = prompt
        self.tokens: list[int] = []
        self.cached = 0
        self.finished: Finished | None = None
        self.prefill_s = 0.0
        self._tokenizer = tokenizer
        self._dsml = tokenizer.control_id(DSML)
        self._parser = _parser(request)
        self._stops = StopStrings(request.stop)
        self._n_reasoning = 0
        self._calls_started = 0
        self._calls_ended = 0
        self._decoding_since: float | None = None

    def read(self, session: Session, size: Callable[[], int]) -> Iterator[tuple[int, int]]:
        """Bring the session to the prompt, yielding (done, total) after each slice; `size` says
        before each how long it may be."""
        start = perf_counter()
        scored = self.request.scored
        most = size if scored is None else lambda: min(size(), SCORED_SLICE)
        slices = session.sync_slices(self.prompt, most, scored)
        self.cached = session.reused
        for progress in slices:
            self.prefill_s += perf_counter() - start
            yield progress
            start = perf_counter()

    def stream(self, session: Session) -> Iterator[Token]:
        """The tokens of the answer, each for `take`."""
        self._decoding_since = perf_counter()
        make = self.request.constraint
        tokens = session.generate(self.request.sampling, make() if make else None)
        return tokens if self.request.calls is None else self._guided(session, tokens)

    def _guided(self, session: Session, tokens: Iterator[Token]) -> Iterator[Token]:
        """Free until a call begins; then, from the same state, what can be called."""
        try:
            for token in tokens:
                yield token
                if self._begins_call(token):
                    break
            else:
                return
        finally:
            tokens.close()  # type: ignore[attr-defined]
        calls = self.request.calls() if self.request.calls is not None else None
        limit = self.request.sampling.max_tokens
        left = None if limit is None else limit - len(self.tokens)
        if token.finish_reason is None:
            options = replace(self.request.sampling, max_tokens=left, seed=session.seed)
            yield from session.generate(options, calls)

    def _begins_call(self, token: Token) -> bool:
        """Whether the answer now ends in "<" and the token that no other text has."""
        if token.id != self._dsml or self._parser.in_reasoning:
            return False
        return self._tokenizer.decode(self.tokens[-2:]).endswith("<" + DSML)

    def begin(self, session: Session, context: int) -> list[Event]:
        """What is known once the prompt has been read; `finished` where no token follows."""
        out: list[Event] = []
        if self.request.scored is not None:
            following = zip(self.prompt[1:], session.chances, strict=True)
            out.append(Scored(tuple(self._chance(token, *found) for token, found in following)))
        if session.position >= context or not self.request.answered:
            out.append(self._finish("length"))
        return out

    def take(self, token: Token) -> list[Event]:
        """The events that this token makes certain; `finished` is set by the last one."""
        self.tokens.append(token.id)
        was_reasoning = self._parser.in_reasoning
        self._n_reasoning += was_reasoning
        out: list[Event] = []
        ends = token.finish_reason == "stop"
        if token.logprobs is not None and not (was_reasoning or self._calls_started or ends):
            out.append(self._chance(token.id, *token.logprobs))
        parsed = self._parser.push(token.text)
        if token.finish_reason is not None:
            parsed += self._parser.finish()
        for event in parsed:
            out += self._visible(event)
            if self.finished is not None:
                return [*out, self.finished]
        if token.finish_reason is not None:
            out += self._rest()
            called = ends and self._calls_ended > 0
            out.append(self._finish("tool_calls" if called else token.finish_reason))
        return out

    @property
    def turn(self) -> Turn | None:
        """The answer for exact replay; None where it was cut."""
        if self.finished is None or not self.request.parsed:
            return None
        tokens = list(self.tokens)
        if tokens[-1:] != [self._tokenizer.eos_id]:
            if self.finished.reason != "tool_calls" or not self._ends_in_call():
                return None
            tokens += self._tokenizer.encode(_CLOSING)
        return Turn(tuple(tokens), self.request.thinking, self._parser.message())

    def _visible(self, event: Any) -> list[Event]:
        """What is shown of a parsed event, stop strings and the limit of calls applied."""
        if isinstance(event, Content):
            text, stopped = self._stops.push(event.text)
            if stopped:
                self._finish("stop_string")
            return [Content(text)] if text else []
        out = self._rest()
        if isinstance(event, ToolCallStart):
            self._calls_started += 1
        if isinstance(event, ToolCallEnd):
            self._calls_ended += 1
            if not self.request.parallel:
                self._finish("tool_calls")
        return [*out, event]

    def _rest(self) -> list[Event]:
        text = self._stops.flush()
        return [Content(text)] if text else []

    def _finish(self, reason: str) -> Finished:
        usage = Usage(len(self.prompt), self.cached, len(self.tokens), self._n_reasoning)
        since = self._decoding_since
        decode_s = perf_counter() - since if since is not None else 0.0
        self.finished = Finished(reason, usage, self._stops.found, self.prefill_s, decode_s)
        return self.finished

    def _chance(self, token: int, logprob: float, top: tuple[tuple[int, float], ...]) -> Chance:
        piece = self._tokenizer.piece
        return Chance(piece(token), logprob, tuple((piece(i), p) for i, p in top))

    def _ends_in_call(self) -> bool:
        return self._tokenizer.decode(self.tokens[-8:]).endswith("invoke>")


_CLOSING = [
    Segment("\n</"),
    Segment(DSML, control=True),
    Segment("tool_calls>"),
    Segment(EOS, control=True),
]
"""What the model would have written after its last call."""


def _parser(request: Request) -> Parser:
    if not request.parsed:
        return PlainParser()
    made = {} if request.new_id is None else {"new_id": request.new_id}
    return StreamParser(thinking=request.thinking, tools=request.tools, **made)
