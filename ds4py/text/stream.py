"""The streaming parser: generated text, in pieces of any size, -> reasoning, content, tool calls.

Text is handed on as soon as it is certain; what may be the start of a tag is held back. The
events do not depend on how the text was cut. It forgives what models really write: a missing
`tool_calls` tag, ASCII bars, a missing `string` attribute, spaces and white space between tags,
closing tags that are missing at the end, several blocks, text after a block. Entities are not
decoded: `&lt;` in an argument is those four characters.

A tool call inside the reasoning is a call, and what follows it is reasoning until </think>:
models that forget to close their reasoning mean the call, and its tags are tokens of their own.
Only a complete `invoke` tag (behind the opening tag, if there is one) counts, so that reasoning
about the format stays reasoning.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ds4py.text import dsml
from ds4py.text.dsml import NO, Header, match, match_header, skip_spaces
from ds4py.text.events import (
    Content,
    Event,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)


def _random_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)  # JSON text, in pieces
    parameters: set[str] = field(default_factory=set)
    stray: str = ""  # text between the tags: some models write the arguments as JSON
    ended: bool = False


class StreamParser:
    """One answer. `push` its text as it comes, then `finish`; `message` is the whole."""

    def __init__(
        self, thinking: bool, tools: bool = True, new_id: Callable[[], str] = _random_id
    ) -> None:
        """thinking: the prompt ended in <think>. tools: look for calls; otherwise all is text."""
        self._tools = tools
        self._new_id = new_id
        self._in_reasoning = thinking
        self._state: Callable[[], bool] = self._text
        self._buffer = ""
        self._final = False
        self._events: list[Event] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[_Call] = []
        self._parameter = Header("", False, False, 0)
        self._repeated = False  # the parameter has a name that this call had before
        self._value: list[str] = []  # of a parameter that is JSON: checked when complete

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning, as far as the text so far says."""
        return self._in_reasoning

    def push(self, text: str) -> list[Event]:
        """The events that `text` makes certain."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """The events of what was held back; an open call ends, a tag cut short is dropped.

        So a call that the token limit cut off ends too, as valid JSON of what came: whoever runs
        calls looks at the finish reason first.
        """
        self._final = True
        return self._run()

    def message(self) -> dict[str, Any]:
        """The answer as an OpenAI-style assistant message, which `chat` writes as it was read."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content)}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        calls = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.arguments)},
            }
            for call in self._calls
            if call.ended
        ]
        return {**message, "tool_calls": calls} if calls else message

    def _run(self) -> list[Event]:
        self._events = []
        while self._state():  # a state says whether it got anywhere
            pass
        return self._events

    def _go(self, state: Callable[[], bool], consumed: int) -> bool:
        self._buffer = self._buffer[consumed:]
        self._state = state
        return True

    # The states. Each reads the buffer from its start.

    def _text(self) -> bool:
        """Reasoning or content, up to a tag that ends it."""
        text = self._buffer
        at = text.find("<")
        while at >= 0:
            closed = match(dsml.CLOSE_REASONING, text, at) if self._in_reasoning else NO
            if closed is not None and closed != NO:
                self._emit_text(text[:at])
                self._in_reasoning = False
                return self._go(self._text, closed)
            call = self._call_at(at)
            if call is not None and call != NO:
                self._emit_text(text[: self._before(at)])
                return self._go(self._between, call)
            if closed is None or call is None:
                if not self._final:
                    return self._hold(at)
                if self._marked(at):
                    self._emit_text(text[: self._before(at)])
                    return self._drop()
            at = text.find("<", at + 1)
        return self._hold(len(text))

    def _between(self) -> bool:
        """After an opening tag, a call or a block: another call, a closing tag, or text."""
        text = self._buffer
        at = skip_spaces(text, 0)
        header = match_header(dsml.OPEN_INVOKE, text, at)
        if isinstance(header, Header):
            self._start_call(header.name)
            return self._go(self._in_call, header.end)
        found = [match(p, text, at) for p in (dsml.CLOSE_CALLS, dsml.CLOSE_INVOKE)]
        found.append(self._call_at(at))
        for end in found:
            if end is not None and end != NO:
                return self._go(self._between, end)
        if None in (header, *found):
            if not self._final:
                return False
            if at == len(text) or self._marked(at):
                return self._drop()
        return self._go(self._text, 0)

    def _in_call(self) -> bool:
        """Between the parameters of a call."""
        text = self._buffer
        at = skip_spaces(text, 0)
        header = match_header(dsml.OPEN_PARAMETER, text, at)
        if isinstance(header, Header):
            self._start_value(header)
            return self._go(self._in_value, header.end)
        closed = match(dsml.CLOSE_INVOKE, text, at)
        if closed is not None and closed != NO:
            self._end_call()
            return self._go(self._between, closed)
        others = [match_header(dsml.OPEN_INVOKE, text, at)]
        others += [match(p, text, at) for p in (dsml.OPEN_CALLS, dsml.CLOSE_CALLS)]
        if any(other not in (None, NO) for other in others):
            self._end_call()
            return self._go(self._between, at)
        if None in (header, closed, *others):
            if not self._final:
                return False
            self._end_call()
            return self._drop()
        next_tag = text.find("<", at + 1)
        taken = next_tag if next_tag >= 0 else len(text)
        self._calls[-1].stray += text[:taken]
        return self._go(self._in_call, taken)

    def _in_value(self) -> bool:
        """The value of a parameter, raw up to its closing tag."""
        text = self._buffer
        ascii_bars = self._parameter.ascii_bars
        closing = dsml.CLOSE_PARAMETER_ASCII if ascii_bars else dsml.CLOSE_PARAMETER
        at = text.find("<")
        while at >= 0:
            closed = match(closing, text, at)
            if closed is not None and closed != NO:
                self._add_value(text[:at])
                self._end_value()
                return self._go(self._in_call, closed)
            if (closed is None or self._ends_here(at)) and (not self._final or self._marked(at)):
                return self._leave_value(at - text.endswith("\n", 0, at))
            at = text.find("<", at + 1)
        return self._leave_value(len(text) - (text.endswith("\n") and not self._final))

    def _leave_value(self, end: int) -> bool:
        """Take the value up to `end`: the rest is held back, or dropped at the end of the text."""
        self._add_value(self._buffer[:end])
        self._buffer = self._buffer[end:]
        if not self._final:
            return False
        self._end_value()
        self._end_call()
        return self._drop()

    # What stands at a position.

    def _call_at(self, at: int) -> int | None:
        """Where the first call of a block that opens at `at` starts (or the end of one without
        calls); NO; None if undecided."""
        if not self._tools:
            return NO
        text = self._buffer
        opened = match(dsml.OPEN_CALLS, text, at)
        if opened is None:
            return None
        start = at if opened == NO else skip_spaces(text, opened)
        header = match_header(dsml.OPEN_INVOKE, text, start)
        if isinstance(header, Header):
            return start
        empty = match(dsml.CLOSE_CALLS, text, start) if opened != NO else NO
        if header is None or empty is None:
            return None
        return NO if empty == NO else start

    def _ends_here(self, at: int) -> bool:
        """Whether nothing but closing tags of the call follows: its last value was not closed."""
        end = at
        for pattern in (dsml.CLOSE_INVOKE, dsml.CLOSE_CALLS):
            found = match(pattern, self._buffer, end)
            if found is None:
                return True
            if found != NO:
                end = skip_spaces(self._buffer, found)
        return end > at and end == len(self._buffer)

    def _marked(self, at: int) -> bool:
        """Whether what starts at `at` is certainly a tag: it has the DSML token."""
        markers = (dsml.OPEN_MARKER, dsml.CLOSE_MARKER)
        return self._tools and any(match(m, self._buffer, at) not in (None, NO) for m in markers)

    def _before(self, at: int) -> int:
        """The end of the text before a tag at `at`: two line feeds belong to the opening tag."""
        start = at
        while self._tools and start > max(0, at - 2) and self._buffer[start - 1] == "\n":
            start -= 1
        return start

    # What the states do.

    def _hold(self, at: int) -> bool:
        """Hand on the text before `at`, hold back the rest (nothing, at the end of the text)."""
        end = at if self._final else self._before(at)
        self._emit_text(self._buffer[:end])
        self._buffer = self._buffer[end:]
        return False

    def _drop(self) -> bool:
        self._buffer = ""
        self._state = self._text
        return False

    def _emit_text(self, text: str) -> None:
        if not text:
            return
        (self._reasoning if self._in_reasoning else self._content).append(text)
        self._events.append(Reasoning(text) if self._in_reasoning else Content(text))

    def _start_call(self, name: str) -> None:
        call = _Call(self._new_id(), name)
        self._calls.append(call)
        self._events.append(ToolCallStart(len(self._calls) - 1, call.id, name))

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._calls[-1].arguments.append(text)
            self._events.append(ToolCallArguments(len(self._calls) - 1, text))

    def _start_value(self, header: Header) -> None:
        parameters = self._calls[-1].parameters
        self._parameter = header
        self._repeated = header.name in parameters  # the first one counts
        self._value = []
        if not self._repeated:
            start = ", " if parameters else "{"
            quote = '"' if header.is_text else ""
            self._emit_arguments(f"{start}{dsml.to_json(header.name)}: {quote}")
        parameters.add(header.name)

    def _add_value(self, text: str) -> None:
        if self._repeated:
            return
        if self._parameter.is_text:
            self._emit_arguments(dsml.to_json(text)[1:-1])
        else:
            self._value.append(text)

    def _end_value(self) -> None:
        if not self._repeated:
            is_text = self._parameter.is_text
            self._emit_arguments('"' if is_text else dsml.value_json("".join(self._value)))

    def _end_call(self) -> None:
        call = self._calls[-1]
        if call.parameters:
            self._emit_arguments("}")
        else:
            self._emit_arguments(dsml.object_json(call.stray))
        call.ended = True
        arguments = "".join(call.arguments)
        self._events.append(ToolCallEnd(len(self._calls) - 1, call.name, arguments))
