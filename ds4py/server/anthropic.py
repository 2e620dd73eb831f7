"""POST /v1/messages and /v1/messages/count_tokens: bodies -> requests, events -> blocks.

Reasoning is off where a request does not ask for it, as in Anthropic's own API.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ds4py.server.body import ModelBody, Part
from ds4py.server.conversation import Choice, Conversation, Format, Tool
from ds4py.server.errors import ApiError
from ds4py.server.openai_parts import arguments_object
from ds4py.server.prompt import PromptWriter, check_results, check_stops, check_tools, effort_of
from ds4py.server.request import Event, Finished, Reading, Request, Usage
from ds4py.server.respond import Answer, frame
from ds4py.text.events import Content, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart

STOP_REASONS = {
    "stop": "end_turn",
    "stop_string": "stop_sequence",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}
BILLING = "x-anthropic-billing-header:"
"""Begins a system block that changes from request to request and is not for the model."""
THREAD = {"error_code": "thread_unsupported_request", "unsupported": []}
"""What makes the client send its whole history instead."""


class Block(Part):
    """A block of content, of any type."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class Message(Part):
    """A message; a system message may stand among them."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ThinkingSwitch(Part):
    """How to reason. The budget is a hint that this model has no use for."""

    type: Literal["enabled", "adaptive", "disabled"]


class OutputFormat(Part):
    """What the content must be."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    """Effort and format."""

    effort: str | None = None
    format: OutputFormat | None = None


class ToolChoice(Part):
    """Whether tools must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class CountBody(ModelBody):
    """What makes up a prompt."""

    messages: list[Message]
    system: str | list[Block] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingSwitch | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None

    HARMLESS: ClassVar = frozenset(
        "metadata service_tier context_management cache_control betas anthropic_beta "
        "anthropic_version inference_geo speed user_profile_id workspace_id billing_policy "
        "diagnostics fallbacks fallback_credit_token compaction".split()
    )
    REFUSED: ClassVar = {
        "container": "there is no container here",
        "mcp_servers": "connect to them yourself and send their tools",
    }


class MessagesBody(CountBody):
    """What is honoured. Null stands for the default."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: list[str] | None = None
    thread: Any = None

    HARMLESS: ClassVar = CountBody.HARMLESS - {"compaction"}
    REFUSED: ClassVar = CountBody.REFUSED | {
        "compaction": "have the model summarise the conversation and go on from that"
    }


def conversation(body: CountBody) -> Conversation:
    """What the body asks for. Raises ApiError."""
    if not body.messages:
        raise ApiError("is empty; need at least one message", param="messages")
    system = body.system
    if isinstance(system, list):
        kept = [block for block in system if not (block.text or "").startswith(BILLING)]
        system = _text(kept, "system")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    offset = len(messages)
    for index, message in enumerate(body.messages):
        messages += _translated(message, f"messages.{index}")
    check_results(messages[offset:], "messages")
    tools = [t for i, tool in enumerate(body.tools or ()) if (t := _tool(tool, f"tools.{i}"))]
    choice, parallel = _choice(body.tool_choice)
    check_tools(tools, choice, "tools")
    config = body.output_config or OutputConfig()
    form = config.format or body.output_format
    thinks = body.thinking is not None and body.thinking.type != "disabled"
    _, effort = effort_of(config.effort, thinks, "output_config.effort")
    return Conversation(
        messages,
        tools,
        choice,
        parallel,
        Format(form.json_schema) if form else None,
        thinks,
        effort if thinks else None,
    )


class MessagesExchange:
    """One request and its answer."""

    def __init__(self, body: MessagesBody, writer: PromptWriter, request_id: str) -> None:
        """request_id: told in errors, as in the header. Raises ApiError, Overflow."""
        if body.thread is not None:
            raise ApiError("threads are not kept here", param="thread", details=THREAD)
        self.streaming = body.stream
        self._model, self._request_id = body.model or writer.model, request_id
        self._id = f"msg_{secrets.token_hex(12)}"
        stop = check_stops(body.stop_sequences, "stop_sequences")
        sampling = {
            "max_tokens": body.max_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
        }
        self.requests: list[Request] = [
            writer.request(conversation(body), sampling, stop, new_call_id)
        ]
        self._started = False
        self._cached = 0
        self._open: str | None = None  # the type of the block being written
        self._index = -1
        self._thought = ""

    def event(self, index: int, event: Event) -> str:
        if isinstance(event, Reading) and not self._started:
            self._cached = len(self.requests[0].prompt) - event.total
        out = self._start()
        if isinstance(event, Reasoning):
            out += self._block("thinking", {"thinking": "", "signature": ""})
            self._thought += event.text
            out += self._delta({"type": "thinking_delta", "thinking": event.text})
        elif isinstance(event, Content):
            out += self._block("text", {"text": ""})
            out += self._delta({"type": "text_delta", "text": event.text})
        elif isinstance(event, ToolCallStart):
            called = {"id": event.id, "name": event.name, "input": {}}
            out += self._close() + self._block("tool_use", called)
        elif isinstance(event, ToolCallArguments):
            out += self._delta({"type": "input_json_delta", "partial_json": event.text})
        elif isinstance(event, ToolCallEnd):
            out += self._close()
        elif isinstance(event, Finished):
            out += self._close() + self._finish(event)
        return out

    def beat(self) -> str:
        """Clients drop pings but count what belongs to a block: an empty piece of reasoning."""
        out = self._start()
        if not self.requests[0].thinking or self._open not in (None, "thinking"):
            return out + frame({"type": "ping"}, "ping")
        out += self._block("thinking", {"thinking": "", "signature": ""})
        return out + self._delta({"type": "thinking_delta", "thinking": ""})

    def end(self) -> str:
        return frame({"type": "message_stop"}, "message_stop")

    def fail(self, error: ApiError) -> str:
        return frame(self.error(error), "error")

    def error(self, error: ApiError) -> dict[str, Any]:
        return error.anthropic(self._request_id)

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        assert answer.finished is not None
        blocks: list[dict[str, Any]] = []
        if answer.reasoning:
            thought = answer.reasoning
            blocks.append({"type": "thinking", "thinking": thought, "signature": sign(thought)})
        if answer.content:
            blocks.append({"type": "text", "text": answer.content})
        for call in answer.calls:
            made = arguments_object(call["arguments"])
            blocks.append(
                {"type": "tool_use", "id": call["id"], "name": call["name"], "input": made}
            )
        return self._message(
            blocks,
            answer.finished.usage,
            STOP_REASONS[answer.finished.reason],
            answer.finished.stop_string,
        )

    def _message(
        self, blocks: list[Any], used: Usage, reason: str | None, stop: str | None
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage(used),
        }

    def _start(self) -> str:
        if self._started:
            return ""
        self._started = True
        used = Usage(len(self.requests[0].prompt), self._cached)
        message = self._message([], used, None, None)
        return frame({"type": "message_start", "message": message}, "message_start")

    def _block(self, kind: str, empty: dict[str, Any]) -> str:
        """Open a block of this kind, unless one is open."""
        if self._open == kind:
            return ""
        out = self._close()
        self._open, self._index = kind, self._index + 1
        block = {"type": kind, **empty}
        start = {"type": "content_block_start", "index": self._index, "content_block": block}
        return out + frame(start, "content_block_start")

    def _delta(self, delta: dict[str, Any]) -> str:
        value = {"type": "content_block_delta", "index": self._index, "delta": delta}
        return frame(value, "content_block_delta")

    def _close(self) -> str:
        if self._open is None:
            return ""
        out = ""
        if self._open == "thinking":
            out = self._delta({"type": "signature_delta", "signature": sign(self._thought)})
            self._thought = ""
        self._open = None
        stop = {"type": "content_block_stop", "index": self._index}
        return out + frame(stop, "content_block_stop")

    def _finish(self, finished: Finished) -> str:
        delta = {
            "stop_reason": STOP_REASONS[finished.reason],
            "stop_sequence": finished.stop_string,
        }
        value = {"type": "message_delta", "delta": delta, "usage": usage(finished.usage)}
        return frame(value, "message_delta")


def usage(used: Usage) -> dict[str, Any]:
    """Tokens that had to be read, and those that had not."""
    return {
        "input_tokens": used.prompt - used.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached,
        "output_tokens": used.completion,
    }


def sign(thought: str) -> str:
    """What stands where Anthropic's API has a signature: a digest of the reasoning."""
    digest = hashlib.sha256(thought.encode("utf-8", "surrogatepass")).digest()
    return base64.b64encode(digest).decode()


def new_call_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"


def _translated(message: Message, where: str) -> list[dict[str, Any]]:
    """One message as OpenAI has it: results of tools are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    if message.role == "assistant":
        return [_assistant(message.content, where)]
    if message.role == "system":
        return [{"role": "system", "content": _text(message.content, f"{where}.content")}]
    out: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        at = f"{where}.content.{index}"
        if block.type == "tool_result":
            if block.tool_use_id is None:
                raise ApiError("is missing", param=f"{at}.tool_use_id")
            result = _result(block.content)
            out.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": result})
        else:
            out.append({"role": "user", "content": _text([block], at, index)})
    return out or [{"role": "user", "content": ""}]


def _assistant(blocks: list[Block], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        at = f"{where}.content.{index}"
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            if not block.id or not block.name:
                raise ApiError("needs an id and a name", param=at)
            function = {"name": block.name, "arguments": block.input or {}}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type != "redacted_thinking":
            raise ApiError(f"is a block of type {block.type!r}, which is not supported", param=at)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": "\n\n".join(texts),
        "reasoning_content": "\n\n".join(thoughts),
    }
    return {**message, "tool_calls": calls} if calls else message


def _text(blocks: list[Block], where: str, index: int | None = None) -> str:
    """The text of blocks that must be text."""
    texts = []
    for number, block in enumerate(blocks):
        if block.type != "text" or block.text is None:
            at = where if index is not None else f"{where}.{number}"
            raise ApiError(
                f"is a block of type {block.type!r}; this model reads text only, no vision",
                param=at,
            )
        texts.append(block.text)
    return "\n\n".join(texts)


def _result(content: str | list[Block] | None) -> str:
    """A tool's result. What is no text is named: refusing it would end the conversation."""
    if not isinstance(content, list):
        return content or ""
    return "\n\n".join(
        block.text or "" if block.type == "text" else f"[Unsupported {block.type}]"
        for block in content
    )


def _tool(value: Any, param: str) -> Tool | None:
    """A client's tool; None for one that Anthropic's servers would run."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ApiError("is no tool with a name", param=param)
    schema = value.get("input_schema")
    if schema is None and value.get("type", "custom") != "custom":
        return None
    if not isinstance(schema, dict):
        raise ApiError("is missing or no object", param=f"{param}.input_schema")
    description = value.get("description")
    if description is not None and not isinstance(description, str):
        raise ApiError("is no string", param=f"{param}.description")
    return Tool(value["name"], description, schema, value.get("strict") is True)


def _choice(choice: ToolChoice | None) -> tuple[Choice, bool]:
    if choice is None:
        return Choice(), True
    kind = {"any": "required", "tool": "named"}.get(choice.type, choice.type)
    names = None if kind != "named" else (choice.name or "",)
    return Choice(kind, names), not choice.disable_parallel_tool_use
