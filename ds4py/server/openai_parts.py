"""What OpenAI's three protocols have in common: messages, tools, usage, log-probabilities."""

from __future__ import annotations

import json
import secrets
from typing import Any, Literal

from pydantic import Field

from ds4py.server.body import Part
from ds4py.server.conversation import Choice, Format, Tool
from ds4py.server.errors import ApiError
from ds4py.server.request import Chance, Finished, Usage

MAX_CHOICES = 8
"""Most answers to one request (`n`)."""
SEEDS = 2**63


class ContentPart(Part):
    """A part of a message's content; only text can be read."""

    type: str
    text: str | None = None


class FunctionCall(Part):
    """What was called."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Part):
    """A call an assistant made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class JsonSchema(Part):
    """A schema the content must follow."""

    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(Part):
    """What the content must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Part):
    """What a stream carries besides."""

    include_usage: bool = False


def text_of(content: str | list[ContentPart] | None, param: str) -> str:
    """The text of a content, its parts joined as the chat encoding joins blocks."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        if part.type not in ("text", "input_text", "output_text", "refusal", "summary_text"):
            raise ApiError(
                f"is a part of type {part.type!r}; this model reads text only, no vision or audio",
                param=f"{param}.{index}",
            )
        text = part.text if part.type != "refusal" else (part.model_extra or {}).get("refusal")
        if not isinstance(text, str):
            raise ApiError("has no text", param=f"{param}.{index}.text")
        texts.append(text)
    return "\n\n".join(texts)


def translated(messages: list[Message], param: str = "messages") -> list[dict[str, Any]]:
    """Messages as the chat encoding reads them. Raises ApiError naming the one at fault."""
    out = []
    for index, message in enumerate(messages):
        where = f"{param}.{index}"
        new: dict[str, Any] = {
            "role": message.role,
            "content": text_of(message.content, f"{where}.content"),
        }
        if message.role == "tool":
            if message.tool_call_id is None:
                raise ApiError("is missing", param=f"{where}.tool_call_id")
            new["tool_call_id"] = message.tool_call_id
        if message.role == "assistant":
            new["reasoning_content"] = message.reasoning_content or message.reasoning or ""
            if message.tool_calls:
                new["tool_calls"] = [
                    called(call.id, call.function.name, call.function.arguments)
                    for call in message.tool_calls
                ]
        elif message.tool_calls:
            raise ApiError("only an assistant makes calls", param=f"{where}.tool_calls")
        out.append(new)
    return out


def called(call_id: str, name: str, arguments: str | dict[str, Any]) -> dict[str, Any]:
    """A call as the chat encoding reads it."""
    if isinstance(arguments, str) and not arguments.strip():
        arguments = "{}"
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def tool_of(value: Any, param: str, nested: bool) -> Tool | None:
    """A function tool; None for a tool of another type, which the model cannot be given.

    nested: chat completions put the function into an object of its own, responses do not.
    """
    if not isinstance(value, dict):
        raise ApiError("is no object", param=param)
    if value.get("type", "function") != "function":
        return None
    function = value.get("function") if nested else value
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError("has no function with a name", param=param)
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    description = function.get("description")
    if not isinstance(parameters, dict):
        raise ApiError("is no object", param=f"{param}.parameters")
    if description is not None and not isinstance(description, str):
        raise ApiError("is no string", param=f"{param}.description")
    return Tool(function["name"], description, parameters, function.get("strict") is True)


def tools_of(values: list[Any] | None, nested: bool, param: str = "tools") -> list[Tool]:
    """The function tools among those given."""
    found = [tool_of(value, f"{param}.{i}", nested) for i, value in enumerate(values or ())]
    return [tool for tool in found if tool is not None]


def choice_of(value: Any) -> Choice:
    """A tool_choice: a word, a function, or functions to choose from. Raises ApiError.

    Chat completions put what is chosen into an object of its own, responses do not.
    """
    if value is None:
        return Choice()
    if isinstance(value, str) and value in ("auto", "none", "required"):
        return Choice(value)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "function" and (name := _function_name(value)) is not None:
        return Choice("named", (name,))
    if kind == "allowed_tools":
        given = value.get("allowed_tools", value)
        mode, tools = (
            (given.get("mode"), given.get("tools")) if isinstance(given, dict) else (None, None)
        )
        if mode in ("auto", "required") and isinstance(tools, list):
            names = [_function_name(tool) for tool in tools]
            return Choice(mode, tuple(name for name in names if name is not None))
    raise ApiError(
        "need auto, none, required, the name of a function, or allowed_tools with a mode (auto or "
        "required) and tools",
        param="tool_choice",
    )


def _function_name(value: Any) -> str | None:
    """The name in a reference to a function; None for a tool of another type."""
    if not isinstance(value, dict) or value.get("type", "function") != "function":
        return None
    name = value.get("function", value)
    name = name.get("name") if isinstance(name, dict) else None
    return name if isinstance(name, str) else None


def format_of(kind: str, schema: dict[str, Any] | None, param: str) -> Format | None:
    """A response format. Raises ApiError for a schema that is missing."""
    if kind == "text":
        return None
    if kind == "json_object":
        return Format(None)
    if schema is None:
        raise ApiError("is missing", param=param)
    return Format(schema)


def usage(usages: list[Usage], n: int) -> dict[str, Any]:
    """Chat's and completions' usage: a prompt counts once, however many (`n`) answers it had.

    The cache's hits and misses are there under DeepSeek's names, too.
    """
    prompt = sum(used.prompt for used in usages[::n])
    cached = sum(used.cached for used in usages[::n])
    completion = sum(usage.completion for usage in usages)
    reasoning = sum(usage.reasoning for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": prompt - cached,
    }


def timings(finished: Finished) -> dict[str, Any]:
    """How long it took, under llama.cpp's names."""
    used = finished.usage
    read = used.prompt - used.cached
    return {
        "cache_n": used.cached,
        "prompt_n": read,
        "prompt_ms": round(1000 * finished.prefill_s, 3),
        "prompt_per_second": _rate(read, finished.prefill_s),
        "predicted_n": used.completion,
        "predicted_ms": round(1000 * finished.decode_s, 3),
        "predicted_per_second": _rate(used.completion, finished.decode_s),
    }


def new_call_id() -> str:
    """An id of a call, never given twice."""
    return f"call_{secrets.token_hex(12)}"


def chance(found: Chance) -> dict[str, Any]:
    """A token's log-probability as chat and responses write it."""
    assert found.logprob is not None  # it is a token of an answer
    top = [_token(token, logprob) for token, logprob in found.top]
    return {**_token(found.token, found.logprob), "top_logprobs": top}


def seed_of(seed: int | None, choice: int = 0) -> int | None:
    """The seed of one of several answers, in the engine's range."""
    return None if seed is None else (seed + choice) % SEEDS


def bias_of(values: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """logit_bias: token ids written as strings -> what is added. Raises ApiError."""
    out = []
    for key, value in (values or {}).items():
        if not key.isascii() or not key.isdigit() or int(key[:20]) >= vocab_size:
            raise ApiError(
                f"names the token {key[:40]!r}; need an id below {vocab_size}", param="logit_bias"
            )
        if not -100 <= value <= 100:
            raise ApiError(f"is {value} for {key}; need -100 to 100", param="logit_bias")
        out.append((int(key), float(value)))
    return tuple(out)


def arguments_object(text: str) -> dict[str, Any]:
    """A call's arguments as an object; empty where they are none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    text = token.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(token)}


def _rate(n: int, seconds: float) -> float:
    return round(n / seconds, 2) if seconds > 0 else 0.0
