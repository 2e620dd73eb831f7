"""The API as a document: OpenAPI for programs, tables for people. Both come from the models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema

from ds4py import __version__
from ds4py.server.anthropic import CountBody, MessagesBody
from ds4py.server.body import Body
from ds4py.server.openai_chat import ChatBody
from ds4py.server.openai_completions import CompletionBody
from ds4py.server.openai_responses import InputTokensBody, ResponsesBody
from ds4py.server.tokens import DetokenizeBody, TokenizeBody

_OPENAI_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "request_id": {"type": "string"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
ERRORS = {
    "400": "A field is missing, unknown or out of range; `param` names it.",
    "401": "The API key is missing or wrong.",
    "403": "The Host or Origin is not this server's.",
    "404": "There is nothing at this path, or no such model.",
    "405": "This path has another method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too long.",
    "415": "The content encoding is not supported.",
    "429": "The queue is full; Retry-After says when to come back.",
    "431": "The request's head is too long.",
    "500": "The engine failed; the log says how.",
    "503": "The model is being loaded, or the server is stopping.",
}


@dataclass(frozen=True)
class Endpoint:
    """One path with one method."""

    method: str
    path: str
    summary: str
    body: type[Body] | None = None
    streams: bool = False
    media: str = "application/json"
    query: tuple[str, ...] = ()


ENDPOINTS = (
    Endpoint("post", "/v1/chat/completions", "OpenAI's chat completions.", ChatBody, True),
    Endpoint("post", "/v1/completions", "OpenAI's completions.", CompletionBody, True),
    Endpoint("post", "/v1/responses", "OpenAI's responses.", ResponsesBody, True),
    Endpoint("post", "/v1/responses/input_tokens", "Tokens of a prompt.", InputTokensBody),
    Endpoint("get", "/v1/responses/{id}", "A response that was stored."),
    Endpoint("delete", "/v1/responses/{id}", "Forgets it."),
    Endpoint(
        "get",
        "/v1/responses/{id}/input_items",
        "The items that led to it.",
        query=("after", "limit", "order"),
    ),
    Endpoint("post", "/v1/messages", "Anthropic's messages.", MessagesBody, True),
    Endpoint("post", "/v1/messages/count_tokens", "Tokens of a prompt.", CountBody),
    Endpoint("get", "/v1/models", "The model, with its context."),
    Endpoint("get", "/v1/models/{name}", "The model by its name."),
    Endpoint("post", "/tokenize", "Text to token ids.", TokenizeBody),
    Endpoint("post", "/detokenize", "Token ids to text.", DetokenizeBody),
    Endpoint("get", "/health", "200 when the model is loaded, 503 before."),
    Endpoint("get", "/status", "What runs and waits, and counters, as JSON."),
    Endpoint("get", "/metrics", "The same for Prometheus.", media="text/plain"),
    Endpoint("get", "/props", "The context, where llama.cpp has it."),
    Endpoint("get", "/openapi.json", "This document."),
    Endpoint("get", "/", "A chat page.", media="text/html"),
)


ABSENT = {
    "/v1/responses/compact": "conversations are not compacted here; have the model summarise",
    "/v1/responses/{id}/cancel": "answers end when their client closes the connection",
    "/v1/chat/completions/{id}": "chat completions are not stored here; /v1/responses are",
    "/v1/conversations": "conversations are not kept here; send previous_response_id",
    "/v1/messages/batches": "there are no batches here; send the messages one by one",
    "/v1/batches": "there are no batches here; send the requests one by one",
    "/v1/files": "files are not kept here; send their text",
    "/v1/embeddings": "this model makes no embeddings",
    "/v1/moderations": "there is no moderation model here",
    "/v1/images": "this model reads and writes text only",
    "/v1/audio": "this model reads and writes text only",
    "/v1/assistants": "send the conversation to /v1/responses or /v1/chat/completions",
    "/v1/v1": "the client adds /v1 by itself; leave it out of its base URL",
    "/api": "this is not Ollama; choose an OpenAI-compatible API, with a base URL ending in /v1",
    "/chat": "end the client's base URL in /v1",
    "/completions": "end the client's base URL in /v1",
    "/responses": "end the client's base URL in /v1",
    "/messages": "the path is /v1/messages",
    "/models": "end the client's base URL in /v1",
}
"""Where clients ask for what there is not -> what to do."""


def absent(path: str) -> str | None:
    """What to say of a path that leads nowhere; None: nothing is known of it."""
    for start, why in ABSENT.items():
        if re.match(re.sub(r"{\w+}", "[^/]+", start) + r"(/|$)", path):
            return why
    return None


def openapi() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    models = [endpoint.body for endpoint in ENDPOINTS if endpoint.body is not None]
    _, defined = models_json_schema(
        [(model, "validation") for model in models], ref_template="#/components/schemas/{model}"
    )
    schemas = defined["$defs"]
    for model in models:
        schema = schemas[model.__name__]
        schema["properties"] |= {
            name: {"description": "Taken and ignored."} for name in sorted(model.HARMLESS)
        }
        schema["additionalProperties"] = False
    schemas |= {"Error": _OPENAI_ERROR, "AnthropicError": _ANTHROPIC_ERROR}
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {"title": "ds4", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {endpoint.media: {"schema": {}}}
    if endpoint.streams:
        content["text/event-stream"] = {"schema": {}}
    anthropic = endpoint.path.startswith("/v1/messages")
    shape = "AnthropicError" if anthropic else "Error"
    told = {"application/json": {"schema": {"$ref": f"#/components/schemas/{shape}"}}}
    errors = {**ERRORS, **({"529": "The queue is full."} if anthropic else {})}
    if endpoint.path == "/health":
        told = {"application/json": {"schema": {}}}
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "responses": {
            "200": {"description": "Done.", "content": content},
            **{code: {"description": text, "content": told} for code, text in errors.items()},
        },
    }
    if endpoint.body is not None:
        schema = {"$ref": f"#/components/schemas/{endpoint.body.__name__}"}
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation["requestBody"] = body
    text = {"schema": {"type": "string"}}
    parameters = [
        {"name": name, "in": "path", "required": True, **text}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    parameters += [{"name": name, "in": "query", **text} for name in endpoint.query]
    if parameters:
        operation["parameters"] = parameters
    return operation


def tables() -> str:
    """Endpoints and fields in Markdown."""
    lines = ["| | path | |", "|---|---|---|"]
    lines += [f"| {e.method.upper()} | `{e.path}` | {e.summary} |" for e in ENDPOINTS]
    lines += ["", "What there is not is refused with 404, and:", "", "| path | |", "|---|---|"]
    lines += [f"| `{start}` | {why} |" for start, why in ABSENT.items()]
    for endpoint in ENDPOINTS:
        if endpoint.body is not None:
            lines += ["", *_fields(endpoint, endpoint.body)]
    return "\n".join(lines) + "\n"


def _fields(endpoint: Endpoint, model: type[Body]) -> list[str]:
    schema = model.model_json_schema()
    honoured = [f"`{name}`{_range(schema['properties'][name])}" for name in model.model_fields]
    out = [f"**`{endpoint.path}`**", "", f"- honoured: {', '.join(honoured)}"]
    if model.HARMLESS:
        ignored = ", ".join(f"`{name}`" for name in sorted(model.HARMLESS))
        out.append(f"- taken and ignored, as they change nothing about the answer: {ignored}")
    if model.REFUSED:
        refused = "; ".join(f"`{name}` ({why})" for name, why in sorted(model.REFUSED.items()))
        out.append(f"- refused: {refused}")
    return out


def _range(schema: dict[str, Any]) -> str:
    """What numbers a field takes."""
    for variant in (schema, *schema.get("anyOf", ())):
        low = variant.get("minimum", variant.get("exclusiveMinimum"))
        if low is None:
            continue
        high = variant.get("maximum")
        above = "above " if "exclusiveMinimum" in variant else ""
        return f" ({above}{low:g}{' or more' if high is None else f' to {high:g}'})"
    return ""
