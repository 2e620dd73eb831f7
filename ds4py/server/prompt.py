"""From a conversation, in whatever protocol it came, to a Request: the last step all share.

Protocols translate their messages into OpenAI-style ones and fill in a Conversation; this module
orders them as the chat encoding wants, writes the prompt and decides what the answer must follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ds4py import __version__
from ds4py.engine.options import SamplingOptions
from ds4py.errors import InputError
from ds4py.server.conversation import Choice, Conversation, Tool
from ds4py.server.errors import ApiError, Overflow
from ds4py.server.grammar import Grammars
from ds4py.server.replay import Replays
from ds4py.server.request import Request
from ds4py.text import chat
from ds4py.text.tokenizer import Tokenizer

_TOOL_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
MAX_TOOLS = 512
MAX_STOPS, MAX_STOP_LENGTH = 16, 500

EFFORTS = {
    "none": (False, None),
    "minimal": (True, None),
    "low": (True, None),
    "medium": (True, "high"),
    "high": (True, "high"),
    "xhigh": (True, "high"),
    "max": (True, "max"),
    "ultra": (True, "max"),
}
"""Names of efforts -> (thinking, effort of the chat encoding)."""


def effort_of(name: str | None, thinking: bool, param: str) -> tuple[bool, str | None]:
    """(thinking, effort) from the name of an effort; `thinking` is what holds without one."""
    if name is None:
        return thinking, None
    if name not in EFFORTS:
        raise ApiError(f"is {name!r}; need one of {', '.join(EFFORTS)}", param=param)
    return EFFORTS[name]


def check_tools(tools: list[Tool], choice: Choice, param: str) -> None:
    """Names that can be written, each once, and a choice that can be met. Raises ApiError."""
    if len(tools) > MAX_TOOLS:
        raise ApiError(f"{len(tools)} tools; at most {MAX_TOOLS}", param=param)
    names = [tool.name for tool in tools]
    for index, name in enumerate(names):
        if not _TOOL_NAME.fullmatch(name):
            raise ApiError(
                f"a tool is named {name[:140]!r}; need 1 to 128 letters, digits or _ - . : /",
                param=f"{param}.{index}.name",
            )
        if name in names[:index]:
            raise ApiError(f"two tools are named {name}", param=f"{param}.{index}.name")
    for name in choice.names or ():
        if name not in names:
            raise ApiError(f"there is no tool named {name!r}", param="tool_choice")
    if choice.kind in ("required", "named") and not (
        names if choice.names is None else choice.names
    ):
        raise ApiError("a tool must be called but there are no tools", param="tool_choice")


def check_stops(stops: str | list[str] | None, param: str) -> tuple[str, ...]:
    """Stop strings, checked. Raises ApiError."""
    texts = [stops] if isinstance(stops, str) else list(stops or ())
    if len(texts) > MAX_STOPS:
        raise ApiError(f"{len(texts)} stop strings; at most {MAX_STOPS}", param=param)
    for text in texts:
        if not text or len(text) > MAX_STOP_LENGTH:
            raise ApiError(
                f"a stop string has {len(text)} characters; need 1 to {MAX_STOP_LENGTH}",
                param=param,
            )
    return tuple(texts)


def check_results(messages: list[dict[str, Any]], param: str) -> None:
    """Every tool result answers a call before it; calls at the end wait for theirs.

    Raises ApiError naming the id.
    """
    issued: set[str] = set()
    for index, message in enumerate(messages):
        where = f"{param}.{index}"
        calls = [call["id"] for call in message.get("tool_calls", ())]
        if len(set(calls)) < len(calls):
            raise ApiError("two calls have the same id", param=f"{where}.tool_calls")
        issued.update(calls)
        if message["role"] == "tool" and message["tool_call_id"] not in issued:
            raise ApiError(
                f"a result for the call {message['tool_call_id']!r}, which no message before it "
                "made",
                param=where,
            )
    if messages and messages[-1].get("tool_calls"):
        raise ApiError(
            f"the call {messages[-1]['tool_calls'][0]['id']!r} has no result",
            param=f"{param}.{len(messages) - 1}",
        )


def arranged(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as the chat encoding wants them.

    System and developer messages at the start become one system message. A later one stays where
    it is, as a reminder to the user's side: moved to the front it would change the prefix of every
    prompt after it. An answer at the end is left open, to be gone on with.
    """
    n_system = next(
        (i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")),
        len(messages),
    )
    system = "\n\n".join(text for m in messages[:n_system] if (text := m["content"]))
    out: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in messages[n_system:]:
        if message["role"] in ("system", "developer"):
            text = f"<system-reminder>\n{message['content']}\n</system-reminder>"
            message = {"role": "user", "content": text}
        out.append(message)
    if out and out[-1]["role"] == "assistant":
        out[-1] = {**out[-1], "wo_eos": True}
    return out


class PromptWriter:
    """Conversations -> requests, with the model's tokenizer and context."""

    def __init__(
        self, tokenizer: Tokenizer, context: int, vocab_size: int, model: str, replays: Replays
    ) -> None:
        self.tokenizer = tokenizer
        self.replays = replays
        self.context = context
        self.vocab_size = vocab_size
        self.model = model
        self.fingerprint = f"ds4-{__version__}"
        self._grammars = Grammars(tokenizer, vocab_size)

    def tokens(self, conversation: Conversation) -> list[int]:
        """The prompt's token ids. Raises ApiError."""
        replayed = [self.replays.apply(m, self.tokenizer) for m in conversation.messages]
        messages = arranged(replayed)
        if not any(m["role"] != "system" for m in messages):
            raise ApiError("need at least one message of a user", param="messages")
        thinking = self.thinks(conversation)
        extra: dict[str, Any] = {}
        if conversation.tools:
            extra["tools"] = [{"function": tool.schema()} for tool in conversation.tools]
        if conversation.format is not None and conversation.format.schema is not None:
            extra["response_format"] = conversation.format.schema
        if extra:
            if messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": ""})
            messages[0] = {**messages[0], **extra}
        try:
            written = chat.segments(messages, thinking=thinking, effort=conversation.effort)
            return self.tokenizer.encode(written)
        except InputError as error:
            raise ApiError(str(error), param="messages") from error

    def thinks(self, conversation: Conversation) -> bool:
        """Whether the answer begins with reasoning: not when it goes on with one begun."""
        return conversation.thinking and conversation.messages[-1]["role"] != "assistant"

    def request(
        self,
        conversation: Conversation,
        sampling: Mapping[str, Any],
        stop: tuple[str, ...],
        new_id: Callable[[], str],
    ) -> Request:
        """The request for one answer. Raises ApiError, Overflow."""
        prompt = self.tokens(conversation)
        self.check_length(prompt)
        thinking = self.thinks(conversation)
        constraint = self._grammars.constraint(conversation, thinking)
        callable_ = bool(conversation.tools) and conversation.choice.kind != "none"
        guided = callable_ and constraint is None
        return Request(
            prompt=prompt,
            sampling=options(sampling),
            stop=stop,
            thinking=thinking,
            tools=callable_,
            parallel=conversation.parallel and conversation.choice.kind != "named",
            constraint=constraint,
            calls=(lambda: self._grammars.calls(conversation)) if guided else None,
            new_id=new_id,
        )

    def again(self, request: Request, sampling: Mapping[str, Any]) -> Request:
        """The same request with other choices of sampling."""
        return replace(request, sampling=options(sampling))

    def check_length(self, prompt: list[int]) -> None:
        """Raise Overflow for a prompt longer than the context."""
        if len(prompt) > self.context:
            raise Overflow(len(prompt), self.context)


def options(sampling: Mapping[str, Any]) -> SamplingOptions:
    """SamplingOptions of what was given; None stands for the default. Raises ApiError."""
    given = {key: value for key, value in sampling.items() if value is not None}
    try:
        return SamplingOptions(**given)
    except InputError as error:
        name, _, rest = str(error).partition(" is ")
        raise ApiError(f"is {rest}", param=name) from error
