"""POST /v1/chat/completions: bodies -> requests, events -> chunks."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ds4py.server import openai_parts as parts
from ds4py.server.body import Part
from ds4py.server.conversation import Conversation
from ds4py.server.errors import ApiError
from ds4py.server.openai_choices import ChoicesExchange, SampledBody
from ds4py.server.prompt import PromptWriter, check_results, check_stops, check_tools, effort_of
from ds4py.server.request import Chance, Event, Finished, Reading, Request
from ds4py.server.respond import Answer
from ds4py.text.events import Content, Reasoning, ToolCallArguments, ToolCallStart


class Thinking(Part):
    """DeepSeek's switch."""

    type: str


class ReasoningOptions(Part):
    """The same, where OpenRouter's clients have it."""

    effort: str | None = None
    enabled: bool | None = None


class TemplateArguments(Part):
    """The same switch, where other servers have it."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class ChatBody(SampledBody):
    """What is honoured. Null stands for the default."""

    messages: list[parts.Message]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: parts.ResponseFormat | None = None
    reasoning_effort: str | None = None
    thinking: Thinking | None = None
    enable_thinking: bool | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: TemplateArguments | None = None

    HARMLESS: ClassVar = SampledBody.HARMLESS | set(
        "prompt_cache_retention prompt_cache_options safety_identifier verbosity prediction "
        "modalities client_metadata return_progress timings_per_token provider transforms route "
        "include_reasoning reasoning_format separate_reasoning add_generation_prompt usage "
        "session_id trace models plugins tool_stream stream_reasoning cache_control "
        "keep_alive".split()
    )
    REFUSED: ClassVar = SampledBody.REFUSED | {
        "functions": "this is the old form; send tools",
        "function_call": "this is the old form; send tool_choice",
        "audio": "this model reads and writes text only",
        "moderation": "there is no moderation model here",
        "web_search_options": "there is no web search here; offer one as a tool",
        "guided_json": "send response_format",
        "structured_outputs": "send response_format",
        "grammar": "send response_format with a JSON schema",
    }


def conversation(body: ChatBody, thinks: bool) -> Conversation:
    """What the body asks for. thinks: whether reasoning is on where the body says nothing."""
    if not body.messages:
        raise ApiError("is empty; need at least one message", param="messages")
    messages = parts.translated(body.messages)
    check_results(messages, "messages")
    tools, choice = parts.tools_of(body.tools, nested=True), parts.choice_of(body.tool_choice)
    check_tools(tools, choice, "tools")
    extra = body.chat_template_kwargs or TemplateArguments()
    options = body.reasoning or ReasoningOptions()
    for switch in (extra.enable_thinking, extra.thinking, body.enable_thinking, options.enabled):
        thinks = thinks if switch is None else switch
    effort_name = body.reasoning_effort or options.effort
    thinks, effort = effort_of(effort_name, thinks, "reasoning_effort")
    if body.thinking is not None:
        if body.thinking.type not in ("enabled", "disabled", "adaptive"):
            raise ApiError("need enabled or disabled", param="thinking.type")
        thinks = body.thinking.type != "disabled"
    form = body.response_format
    schema = form.json_schema.json_schema if form and form.json_schema else None
    where = "response_format.json_schema.schema"
    return Conversation(
        messages,
        tools,
        choice,
        body.parallel_tool_calls,
        parts.format_of(form.type, schema, where) if form else None,
        thinks,
        effort,
    )


class ChatExchange(ChoicesExchange):
    """One request and its answers."""

    def __init__(self, body: ChatBody, writer: PromptWriter, thinks: bool) -> None:
        """Raises ApiError, Overflow."""
        super().__init__(body, writer, "chatcmpl", "chat.completion", "chat.completion.chunk")
        self._chances_wanted = body.logprobs
        self._chances: dict[int, list[dict[str, Any]]] = {}
        asked = conversation(body, thinks)
        stop = check_stops(body.stop, "stop")
        first = writer.request(
            asked, _sampling(body, 0, writer.vocab_size), stop, parts.new_call_id
        )
        self.requests: list[Request] = [
            writer.again(first, _sampling(body, choice, writer.vocab_size))
            for choice in range(body.n)
        ]

    def event(self, index: int, event: Event) -> str:
        out = ""
        if isinstance(event, Reading):
            return out
        if index not in self._begun:
            self._begun.add(index)
            out = self._chunk(index, {"role": "assistant", "content": ""})
        if isinstance(event, Chance):
            self._chances.setdefault(index, []).append(parts.chance(event))
        elif isinstance(event, Reasoning):
            out += self._chunk(index, {"reasoning_content": event.text})
        elif isinstance(event, Content):
            out += self._chunk(index, {"content": event.text})
        elif isinstance(event, ToolCallStart):
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": event.id, "type": "function"}
            out += self._chunk(index, {"tool_calls": [{**call, "function": function}]})
        elif isinstance(event, ToolCallArguments):
            call = {"index": event.index, "function": {"arguments": event.text}}
            out += self._chunk(index, {"tool_calls": [call]})
        elif isinstance(event, Finished):
            self._finished[index] = event
            out += self._chunk(index, {}, self.FINISH_REASONS[event.reason])
        return out

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        return self._whole_of([self._choice(i, answer) for i, answer in enumerate(answers)])

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        chances = self._chances.pop(index, None)
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": {"content": chances, "refusal": None} if chances else None,
            "finish_reason": reason,
        }
        return self._chunk_of([choice])

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        assert answer.finished is not None
        self._finished[index] = answer.finished
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.content or (None if answer.calls else ""),
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [
                parts.called(call["id"], call["name"], call["arguments"]) for call in answer.calls
            ]
        chances = {"content": [parts.chance(found) for found in answer.chances], "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": chances if self._chances_wanted else None,
            "finish_reason": self.FINISH_REASONS[answer.finished.reason],
        }


def _sampling(body: ChatBody, choice: int, vocab_size: int) -> dict[str, Any]:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError("needs logprobs: true", param="top_logprobs")
    return {
        **body.sampling(choice, vocab_size),
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "top_logprobs": (body.top_logprobs or 0) if body.logprobs else None,
    }
