"""The chat encoding of DeepSeek V4: messages -> prompt, byte for byte.

`segments` marks control tokens exactly where the encoder writes them, so that text which merely
spells one stays text; `render` is the same prompt as one string. What is written, and the texts
of the protocol, follow DeepSeek's encoding_dsv4.py (MIT licence, copyright DeepSeek); where that
program stops with a Python error this one raises PromptError.

Content is text. As in DeepSeek's encoder, a system, assistant, reminder or tool content of
another type is written as Python's str() has it; users and developers must send text. Front ends
turn lists of content parts into text first (`messages.flatten`).

An assistant's message may carry `sampled`, {"tokens", "thinking"}: the ids the model wrote, to its
end token, and whether it was reasoning; they then stand for the message wherever they can.
"""

import re
from collections.abc import Sequence
from typing import Any

from ds4py.errors import PromptError
from ds4py.text import dsml
from ds4py.text.messages import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    TASKS,
    THINK,
    USER,
    Message,
    Segment,
    check,
    drop_old,
    last_user,
    merge,
)

EFFORTS = (None, "high", "max")

MAX_EFFORT = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to "
    "resolve the root cause, rigorously stress-testing your logic against all potential paths, "
    "edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)

RESPONSE_FORMAT = (
    "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
)

_MARKUP_TOKEN = re.compile(f"({DSML}|{THINK}|{END_THINK})")


def render(
    messages: Sequence[Message],
    thinking: bool = True,
    effort: str | None = None,
    drop_thinking: bool = True,
) -> str:
    """The prompt as one string; arguments and errors as `segments`."""
    return "".join(s.text for s in segments(messages, thinking, effort, drop_thinking))


def segments(
    messages: Sequence[Message],
    thinking: bool = True,
    effort: str | None = None,
    drop_thinking: bool = True,
) -> list[Segment]:
    """The prompt for `messages`, with its control tokens marked.

    thinking: the model reasons before it answers. effort: None, "high" (writes the same) or
    "max". drop_thinking: leave out the reasoning of earlier answers; off by itself when a message
    carries tools. After a last user message the prompt ends where the answer begins.
    Raises PromptError. Neighbouring texts are one segment, so that tokenising segment by segment
    equals tokenising the string, unless a text spells a control token.
    """
    if effort not in EFFORTS:
        raise PromptError(f"the effort is {effort!r}; need none, high or max.")
    check(messages)
    turns = merge(messages)
    drop = drop_thinking and not any(turn.get("tools") for turn in turns)
    if thinking and drop:
        turns = drop_old(turns)
    writer = _Writer(turns, thinking, drop)
    writer.control(BOS)
    if turns and thinking and effort == "max":
        writer.text(MAX_EFFORT)
    for index in range(len(turns)):
        writer.turn(index)
    return writer.out


class _Writer:
    """Writes turns as segments into `out`."""

    def __init__(self, turns: list[dict[str, Any]], thinking: bool, drop: bool) -> None:
        self.turns = turns
        self.thinking = thinking
        self.drop = drop
        self.last_user = last_user(turns)
        self.out: list[Segment] = []

    def control(self, token: str) -> None:
        self.out.append(Segment(token, control=True))

    def text(self, text: str) -> None:
        """Plain text, joined to text before it."""
        if not text:
            return
        if self.out and not (self.out[-1].control or self.out[-1].tokens):
            text = self.out.pop().text + text
        self.out.append(Segment(text))

    def markup(self, text: str) -> None:
        """Text of the protocol itself: the tokens it spells are meant."""
        for position, piece in enumerate(_MARKUP_TOKEN.split(text)):
            if position % 2:
                self.control(piece)
            else:
                self.text(piece)

    def turn(self, index: int) -> None:
        """One turn, and what stands between it and an answer."""
        turn = self.turns[index]
        role = turn["role"]
        if role == "system":
            self.text(str(turn.get("content") or ""))
            self.appendix(turn)
        elif role == "developer":
            self.control(USER)
            self.text(_need_text(turn.get("content"), index, role))
            self.appendix(turn)
        elif role == "user":
            self.control(USER)
            self.blocks(turn["blocks"], index)
        elif role == "latest_reminder":
            self.control(REMINDER)
            self.text(str(turn.get("content")))
        else:
            self.assistant(turn, index)
        following = self.turns[index + 1]["role"] if index + 1 < len(self.turns) else None
        if following in (None, "assistant", "latest_reminder"):
            self.transition(turn, index)

    def appendix(self, turn: dict[str, Any]) -> None:
        """Tools and response format, after the content of a system or developer turn."""
        if turn.get("tools"):
            self.text("\n\n")
            self.markup(dsml.TOOLS_BLOCK)
            self.text(dsml.tool_schemas(turn["tools"]))
            self.text(dsml.TOOLS_END)
        if turn.get("response_format"):
            self.text(RESPONSE_FORMAT + dsml.to_json(turn["response_format"]))

    def blocks(self, blocks: list[dict[str, Any]], index: int) -> None:
        parts = []
        for block in blocks:
            if "result" in block:
                parts.append(f"<tool_result>{_result_text(block['result'])}</tool_result>")
            else:
                parts.append(_need_text(block["text"], index, "user"))
        self.text("\n\n".join(parts))

    def assistant(self, turn: dict[str, Any], index: int) -> None:
        after_task = index > 0 and self.turns[index - 1].get("task") is not None
        reasons = self.thinking and not after_task and (not self.drop or index > self.last_user)
        sampled = turn.get("sampled")
        if sampled and sampled["thinking"] == reasons:
            self.out.append(Segment("", tokens=tuple(sampled["tokens"])))
            return
        if reasons:
            self.text(str(turn.get("reasoning_content") or ""))
            self.control(END_THINK)
        self.text(str(turn.get("content") or ""))
        if turn.get("tool_calls"):
            self.text("\n\n")
            for text, written in dsml.call_parts(turn["tool_calls"]):
                (self.markup if written else self.text)(text)
        if not turn.get("wo_eos"):
            self.control(EOS)

    def transition(self, turn: dict[str, Any], index: int) -> None:
        """A task's token, or the start of an answer after a user or developer."""
        task = turn.get("task")
        if task is not None:
            if task == "action":
                self.control(ASSISTANT)
                self.control(THINK if self.thinking else END_THINK)
            self.control(TASKS[task])
        elif turn["role"] in ("user", "developer"):
            self.control(ASSISTANT)
            current = not self.drop or index >= self.last_user
            self.control(THINK if self.thinking and current else END_THINK)


def _need_text(content: Any, index: int, role: str) -> str:
    """The content of a user (may be empty) or developer (may not)."""
    if not isinstance(content, str):
        raise PromptError(
            f"turn {index} ({role}) has a content of type {type(content).__name__}; need text "
            "(join a list of content parts first)."
        )
    if role == "developer" and not content:
        raise PromptError(f"turn {index} ({role}) is empty; a developer message needs text.")
    return content


def _result_text(content: Any) -> str:
    """A tool result as text: the text parts of a list, others named as unsupported."""
    if not isinstance(content, list):
        return str(content)
    texts = []
    for part in content:
        if not isinstance(part, dict):
            raise PromptError(
                f"a tool result has a part of type {type(part).__name__}; need objects with a type."
            )
        if part.get("type") != "text":
            texts.append(f"[Unsupported {part.get('type')}]")
        elif isinstance(part.get("text", ""), str):
            texts.append(part.get("text", ""))
        else:
            raise PromptError("a text part of a tool result holds no text.")
    return "\n\n".join(texts)
