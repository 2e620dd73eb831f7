"""POST /v1/responses: items -> a conversation, events -> the life of items.

Reasoning is streamed as a summary, the one spelling that every client shows, and stands in the
finished item as text as well.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from ds4py.server import openai_parts as parts
from ds4py.server.body import ModelBody, Part
from ds4py.server.conversation import Conversation
from ds4py.server.errors import ApiError
from ds4py.server.kept import Kept
from ds4py.server.openai_items import toolbox, translated
from ds4py.server.prompt import PromptWriter, check_results, check_tools, effort_of
from ds4py.server.request import Chance, Event, Finished, Request, Usage
from ds4py.server.respond import Answer, frame
from ds4py.text.events import Content, Reasoning, ToolCallArguments, ToolCallEnd, ToolCallStart

Found = TypeVar("Found")
LOGPROBS = "message.output_text.logprobs"


class ReasoningOptions(Part):
    """How to reason; a summary is always the reasoning itself."""

    effort: str | None = None
    summary: str | None = None


class TextFormat(Part):
    """What the content must be."""

    type: str = "text"
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Part):
    """The content's format."""

    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({}))


class InputTokensBody(ModelBody):
    """What makes up a prompt."""

    input: str | list[Any] = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    reasoning: ReasoningOptions | None = None
    text: TextOptions = TextOptions()

    HARMLESS: ClassVar = frozenset("personality truncation".split())
    REFUSED: ClassVar = {"conversation": "send the full input, or previous_response_id"}


class ResponsesBody(InputTokensBody):
    """What is honoured. Null stands for the default."""

    store: bool = True
    stream: bool = False
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] = Field(default_factory=list)
    """Only LOGPROBS adds something; reasoning is there anyway."""
    metadata: dict[str, Any] | None = None

    HARMLESS: ClassVar = frozenset(
        "user service_tier prompt_cache_key prompt_cache_retention prompt_cache_options "
        "safety_identifier client_metadata truncation max_tool_calls stream_options "
        "context_management access_programs background_options image".split()
    )
    REFUSED: ClassVar = InputTokensBody.REFUSED | {
        "background": "answers are given while the client waits",
        "moderation": "there is no moderation model here",
        "prompt": "templates are not kept here; send the full input",
    }


class ResponsesExchange:
    """One request and its answer."""

    def __init__(self, body: ResponsesBody, writer: PromptWriter, kept: Kept, thinks: bool) -> None:
        """Raises ApiError, Overflow."""
        self.streaming = body.stream
        self._body, self._kept = body, kept
        self._model = body.model or writer.model
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._items = history(body, kept)
        asked = conversation(body, self._items, thinks, kept)
        self._thinks, self._effort = asked.thinking, asked.effort
        self.requests: list[Request] = [
            writer.request(asked, _sampling(body), (), parts.new_call_id)
        ]
        _, names = toolbox(body.tools)
        self._given_names = {read: given for given, read in names.items()}
        self._n_frames = 0
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item being written
        self._chances: list[dict[str, Any]] = []
        self._usage: Usage | None = None

    def event(self, index: int, event: Event) -> str:
        out = self._start()
        if isinstance(event, Chance):
            self._chances.append(parts.chance(event))
        elif isinstance(event, Reasoning):
            out += self._reasoning(event.text)
        elif isinstance(event, Content):
            out += self._text(event.text)
        elif isinstance(event, ToolCallStart):
            out += self._close() + self._add(self._call(event.id, event.name))
        elif isinstance(event, ToolCallArguments):
            assert self._open is not None
            self._open["arguments"] += event.text
            out += self._frame("response.function_call_arguments.delta", delta=event.text)
        elif isinstance(event, ToolCallEnd):
            out += self._close()
        elif isinstance(event, Finished):
            if self._open is None and not self._output:
                out += self._text("")
            out += self._close("completed" if event.reason != "length" else "incomplete")
            self._usage = event.usage
            out += self._finish(event)
        return out

    def beat(self) -> str:
        out = self._start()
        return out + self._frame("response.in_progress", response=self._response("in_progress"))

    def end(self) -> str:
        return ""

    def fail(self, error: ApiError) -> str:
        code = error.code or ("rate_limit_exceeded" if error.status == 429 else "server_error")
        failed = self._response("failed", error={"code": code, "message": error.message})
        return self._start() + self._frame("response.failed", response=failed)

    def error(self, error: ApiError) -> dict[str, Any]:
        return error.openai()

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        (answer,) = answers
        finished = answer.finished
        assert finished is not None
        complete = finished.reason != "length"
        status = "completed" if complete else "incomplete"
        if answer.reasoning:
            self._output.append(_thought(answer.reasoning))
        if answer.content or not (answer.reasoning or answer.calls):
            chances = [parts.chance(found) for found in answer.chances]
            self._output.append(_message(answer.content, status, chances))
        for call in answer.calls:
            item = self._call(call["id"], call["name"])
            self._output.append({**item, "arguments": call["arguments"], "status": "completed"})
        self._usage = finished.usage
        return self._ended(complete)

    def _ended(self, complete: bool) -> dict[str, Any]:
        """The response at its end; kept for requests that refer to it."""
        if complete:
            ended = self._response("completed")
        else:
            cut = {"reason": "max_output_tokens"}
            ended = self._response("incomplete", incomplete_details=cut)
        if self._body.store:
            self._kept.put(ended, self._items)
        return ended

    def _finish(self, finished: Finished) -> str:
        complete = finished.reason != "length"
        name = "response.completed" if complete else "response.incomplete"
        return self._frame(name, response=self._ended(complete))

    def _start(self) -> str:
        if self._n_frames:
            return ""
        started = self._response("in_progress")
        return self._frame("response.created", response=started) + self._frame(
            "response.in_progress", response=started
        )

    def _frame(self, kind: str, **values: Any) -> str:
        """An event; what concerns an open item says which."""
        if self._open is not None and not kind.startswith(("response.in_", "response.fail")):
            place = {"item_id": self._open["id"], "output_index": len(self._output)}
            if kind.startswith("response.output_item"):
                del place["item_id"]
            values = {**place, **values}
        value = {"type": kind, "sequence_number": self._n_frames, **values}
        self._n_frames += 1
        return frame(value, kind)

    def _add(self, item: dict[str, Any]) -> str:
        self._open = item
        return self._frame("response.output_item.added", item=item)

    def _reasoning(self, text: str) -> str:
        out = ""
        if self._open is None or self._open["type"] != "reasoning":
            item = {**_thought(""), "summary": [], "content": [], "status": "in_progress"}
            out = self._close() + self._add(item)
            part = {"type": "summary_text", "text": ""}
            out += self._frame("response.reasoning_summary_part.added", summary_index=0, part=part)
            self._open = {**item, "text": ""}
        assert self._open is not None
        self._open["text"] += text
        return out + self._frame(
            "response.reasoning_summary_text.delta", summary_index=0, delta=text
        )

    def _text(self, text: str) -> str:
        out = ""
        if self._open is None or self._open["type"] != "message":
            out = self._close() + self._add(_message(None, "in_progress", []))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            out += self._frame("response.content_part.added", content_index=0, part=part)
            assert self._open is not None
            self._open = {**self._open, "text": "", "chances": []}
        assert self._open is not None
        self._open["text"] += text
        chances, self._chances = self._chances, []
        self._open["chances"] += chances
        return out + self._frame(
            "response.output_text.delta", content_index=0, delta=text, logprobs=chances
        )

    def _call(self, call_id: str, read_name: str) -> dict[str, Any]:
        """An item for a call, without its arguments; the name as the model wrote it."""
        namespace, name = self._given_names.get(read_name, (None, read_name))
        return {
            "id": f"fc_{secrets.token_hex(16)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": call_id,
            "name": name,
            **({} if namespace is None else {"namespace": namespace}),
            "arguments": "",
        }

    def _close(self, status: str = "completed") -> str:
        """Complete the open item."""
        item = self._open
        if item is None:
            return ""
        if item["type"] == "reasoning":
            text = item["text"]
            whole = {**_thought(text), "id": item["id"]}
            part = {"type": "summary_text", "text": text}
            out = self._frame("response.reasoning_summary_text.done", summary_index=0, text=text)
            out += self._frame("response.reasoning_summary_part.done", summary_index=0, part=part)
        elif item["type"] == "message":
            text, chances = item["text"], item["chances"] + self._chances
            self._chances = []
            whole = {**_message(text, status, chances), "id": item["id"]}
            out = self._frame(
                "response.output_text.done", content_index=0, text=text, logprobs=chances
            )
            part = whole["content"][0]
            out += self._frame("response.content_part.done", content_index=0, part=part)
        else:
            whole = {**item, "status": status}
            named = {"name": item["name"], "arguments": item["arguments"]}
            out = self._frame("response.function_call_arguments.done", **named)
        out += self._frame("response.output_item.done", item=whole)
        self._output.append(whole)
        self._open = None
        return out

    def _response(self, status: str, **more: Any) -> dict[str, Any]:
        """The response object; clients want every key of it."""
        body = self._body
        ended = int(time.time()) if status == "completed" else None
        form = body.text.format.model_dump(by_alias=True, exclude_none=True)
        effort = (self._effort or "medium") if self._thinks else "none"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": ended,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": None,
            "reasoning": {"effort": effort, "summary": "detailed" if self._thinks else None},
            "safety_identifier": None,
            "service_tier": "default",
            "store": body.store,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": form},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": [_told(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None if self._usage is None else usage(self._usage),
            "user": None,
            **more,
        }


def known(found: Found | None, response_id: str) -> Found:
    """What was found of a response. Raises ApiError 404 where there is nothing."""
    if found is None:
        raise ApiError(f"the response {response_id!r} is not known here", 404, param="response_id")
    return found


def input_items(response_id: str, items: list[Any], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the items that led to a response, the last one first. Raises ApiError."""
    named = [
        {"id": f"item_{response_id.removeprefix('resp_')}_{place}", "type": "message", **item}
        for place, item in enumerate(items)
    ]
    for item in named:
        if isinstance(item.get("content"), str):
            item["content"] = [{"type": "input_text", "text": item["content"]}]
    order, limit = query.get("order", "desc"), query.get("limit", "20")
    if order not in ("asc", "desc"):
        raise ApiError(f"is {order[:40]!r}; need asc or desc", param="order")
    if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= 100:
        raise ApiError(f"is {limit[:40]!r}; need 1 to 100", param="limit")
    if order == "desc":
        named.reverse()
    ids = [item["id"] for item in named]
    after = query.get("after")
    if after is not None and after not in ids:
        raise ApiError(f"the item {after[:80]!r} is not one of them", param="after")
    start = 0 if after is None else ids.index(after) + 1
    page = named[start : start + int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + len(page) < len(named),
    }


def usage(used: Usage) -> dict[str, Any]:
    """Tokens, with every key that the API requires."""
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "output_tokens": used.completion,
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
        "total_tokens": used.prompt + used.completion,
    }


def history(body: InputTokensBody, kept: Kept) -> list[Any]:
    """The items of the whole conversation. Raises ApiError for one that is not known."""
    given: list[Any] = (
        [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    )
    if body.previous_response_id is None:
        return given
    before = kept.history(body.previous_response_id)
    if before is None:
        raise ApiError(
            f"the response {body.previous_response_id!r} is not known here; send the full input",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return before + given


def conversation(body: InputTokensBody, items: list[Any], thinks: bool, kept: Kept) -> Conversation:
    """What the items ask for. Raises ApiError."""
    tools, names = toolbox(body.tools)
    messages = translated(items, kept, names)
    check_results(messages, "input")
    if not messages:
        raise ApiError("is empty; need at least one message", param="input")
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    choice = parts.choice_of(body.tool_choice)
    check_tools(tools, choice, "tools")
    options = body.reasoning or ReasoningOptions()
    thinks, effort = effort_of(options.effort, thinks, "reasoning.effort")
    form = body.text.format
    if form.type not in ("text", "json_object", "json_schema"):
        raise ApiError("need text, json_object or json_schema", param="text.format.type")
    format_ = parts.format_of(form.type, form.json_schema, "text.format.schema")
    return Conversation(messages, tools, choice, body.parallel_tool_calls, format_, thinks, effort)


def _sampling(body: ResponsesBody) -> dict[str, Any]:
    wanted = body.top_logprobs or LOGPROBS in body.include
    return {
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "top_logprobs": (body.top_logprobs or 0) if wanted else None,
    }


def _thought(text: str) -> dict[str, Any]:
    return {
        "id": f"rs_{secrets.token_hex(16)}",
        "type": "reasoning",
        "status": "completed",
        "summary": [{"type": "summary_text", "text": text}],
        "content": [{"type": "reasoning_text", "text": text}],
    }


def _message(text: str | None, status: str, chances: list[Any]) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": chances}
    return {
        "id": f"msg_{secrets.token_hex(16)}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": [] if text is None else [part],
    }


def _told(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as the response repeats it."""
    if tool.get("type") != "function":
        return tool
    return {"description": None, "parameters": None, **tool, "strict": tool.get("strict") is True}
