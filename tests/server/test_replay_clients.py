"""What real clients sent (data/, recorded on loopback, texts cut) gets well-formed answers.

Claude Code 2.1.197, Codex 0.169 (also with an MCP server), Qwen Code, Continue, Cline, the
`openai` and `anthropic` packages for Python and Node, the Vercel AI SDK, litellm, llm, and the open
Responses conformance tests. What is refused is listed.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic.types
import httpx2
import openai.types
import openai.types.chat
import openai.types.responses
import pytest
from pydantic import BaseModel, TypeAdapter

from tests.server.scripted import Running, Script, ScriptedEngine

DATA = Path(__file__).parent / "data"
REQUESTS = {
    f"{path.stem}-{number}": recorded
    for path in sorted(DATA.glob("*.json"))
    for number, recorded in enumerate(json.loads(path.read_text(encoding="utf-8")))
}
REFUSED = {
    "py-openai-8": (404, "no embeddings"),
    "openresponses-3": (404, "not compacted here"),
    "openresponses-8": (404, "not compacted here"),
    "openresponses-9": (404, "not compacted here"),
    "openresponses-6": (400, "no vision"),
    "node-aisdk-11": (400, "is not known here"),  # an item of another server
    "node-aisdk-13": (400, "is not known here"),
    "py-anthropic-4": (400, "threads are not kept"),
    "py-anthropic-5": (400, "threads are not kept"),
}
WHOLE: dict[str, Any] = {
    "/v1/chat/completions": openai.types.chat.ChatCompletion,
    "/v1/completions": openai.types.Completion,
    "/v1/responses": openai.types.responses.Response,
    "/v1/messages": anthropic.types.Message,
    "/v1/messages/count_tokens": anthropic.types.MessageTokensCount,
}
CHUNK: dict[str, Any] = {
    "/v1/chat/completions": openai.types.chat.ChatCompletionChunk,
    "/v1/completions": openai.types.Completion,
    "/v1/responses": openai.types.responses.ResponseStreamEvent,
    "/v1/messages": anthropic.types.RawMessageStreamEvent,
}


@pytest.fixture(scope="module")
def scripted() -> Iterator[Running]:
    answer = "I think.</think>An answer."
    with Running(ScriptedEngine(Script([answer]), context=200_000)) as server:
        yield server


def frames(text: str) -> list[dict[str, Any]]:
    """The data of a stream's events."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


adapter = functools.cache(TypeAdapter)


def valid(model: Any, value: Any) -> Any:
    """The value as the client's own type: nothing may be missing."""
    return adapter(model).validate_python(value)


@pytest.mark.parametrize("name", REQUESTS)
def test_a_recorded_request(scripted: Running, name: str) -> None:
    recorded = REQUESTS[name]
    method, path = recorded["request"].split()
    with httpx2.Client(base_url=scripted.url) as http:
        response = http.request(
            method, path, headers=recorded["headers"], content=json.dumps(recorded["body"])
        )
    path = path.partition("?")[0]
    if name in REFUSED:
        status, said = REFUSED[name]
        assert response.status_code == status and said in response.text
        return
    assert response.status_code == 200, response.text
    if not recorded["body"].get("stream"):
        valid(WHOLE[path], response.json())
        return
    assert response.headers["content-type"].startswith("text/event-stream")
    events = frames(response.text)
    for event in events:
        for choice in event["choices"] if path == "/v1/completions" else ():
            choice["finish_reason"] = choice["finish_reason"] or "stop"  # null until the last
        valid(CHUNK[path], event)
    if path == "/v1/chat/completions":
        assert [c["finish_reason"] for e in events for c in e["choices"]][-1] == "stop"
        assert response.text.endswith("data: [DONE]\n\n")
    elif path == "/v1/responses":
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["type"] == "response.completed"
        valid(openai.types.responses.Response, events[-1]["response"])
    elif path == "/v1/messages":
        assert events[-1] == {"type": "message_stop"}


def test_a_refusal_of_threads_makes_the_client_send_its_history(scripted: Running) -> None:
    recorded = REQUESTS["py-anthropic-4"]
    response = httpx2.post(f"{scripted.url}/v1/messages", json=recorded["body"])
    details = response.json()["error"]["details"]
    assert details == {"error_code": "thread_unsupported_request", "unsupported": []}


def test_the_volatile_header_is_not_in_the_prompt(scripted: Running) -> None:
    script = scripted.engine.script
    recorded = REQUESTS["claude-code-0"]["body"]
    prompts = []
    for header in ("x-anthropic-billing-header: cch=1;", "x-anthropic-billing-header: cch=2;"):
        body = {**recorded, "system": [{"type": "text", "text": header}, *recorded["system"][1:]]}
        httpx2.post(f"{scripted.url}/v1/messages?beta=true", json=body).raise_for_status()
        prompts.append(script.prompts[-1])
    assert prompts[0] == prompts[1]


def test_a_second_turn_begins_as_the_first(scripted: Running) -> None:
    """The agents' second requests go on from the first: nothing has moved."""
    for name in ("claude-code", "codex", "codex-mcp", "qwen-code", "continue", "cline"):
        shared = []
        for number in (0, 1):
            recorded = REQUESTS[f"{name}-{number}"]
            path = recorded["request"].split()[1]
            httpx2.post(f"{scripted.url}{path}", json=recorded["body"]).raise_for_status()
            shared.append(scripted.engine.script.prompts[-1])
        first, second = shared
        assert second[: len(first)] == first


def test_models_are_the_clients_types(scripted: Running) -> None:
    assert issubclass(openai.types.chat.ChatCompletion, BaseModel)
    for headers in ({}, {"anthropic-version": "2023-06-01"}):
        data = httpx2.get(f"{scripted.url}/v1/models", headers=headers).json()["data"]
        valid(openai.types.Model, data[0])
    valid(anthropic.types.ModelInfo, data[0])
