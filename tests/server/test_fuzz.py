"""Bodies nobody would send: every answer is well formed, and the next request works."""

import json
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds4py.server.anthropic import CountBody, MessagesBody
from ds4py.server.app import Rules
from ds4py.server.openai_chat import ChatBody
from ds4py.server.openai_completions import CompletionBody
from ds4py.server.openai_responses import ResponsesBody
from tests.server.scripted import Running, Script, ScriptedEngine

PATHS: Any = {
    "/v1/chat/completions": ChatBody,
    "/v1/completions": CompletionBody,
    "/v1/responses": ResponsesBody,
    "/v1/messages": MessagesBody,
    "/v1/messages/count_tokens": CountBody,
}
words = st.sampled_from(
    "user assistant system tool text function auto required none json_schema json_object enabled "
    "tool_use tool_result thinking function_call function_call_output message reasoning f c1 "
    "</think> <｜User｜> ｜DSML｜ object string \ud800 \x00 é".split(" ")
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 9), st.integers(), st.floats(), words, st.text()
)
keys = st.sampled_from(
    "role content type text name id tool_calls function arguments tool_call_id call_id output "
    "input parameters properties required strict schema json_schema input_schema tool_use_id "
    "thinking signature reasoning_content effort format enum $ref".split()
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=6),
    max_leaves=25,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
        optional={
            "content": st.one_of(words, values),
            "tool_calls": values,
            "tool_call_id": words,
            "type": words,
        },
    ),
    max_size=4,
)


def bodies(model: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Mostly right ones: a wrong field in a right body goes further than noise."""
    right = {
        "messages": messages,
        "input": messages,
        "prompt": st.one_of(words, st.lists(st.integers(0, 2047), max_size=5)),
        "max_tokens": st.integers(1, 9),
        "stream": st.booleans(),
    }
    fields = {
        name: st.one_of(right.get(name, values), values) if name in right else values
        for name in model.model_fields
    }
    needed = {n: right[n] for n in ("messages", "max_tokens") if n in fields}
    optional = {name: made for name, made in fields.items() if name not in needed}
    return st.fixed_dictionaries(needed, optional=optional)


def check(path: str, response: httpx2.Response) -> None:
    """The answer is one of the documented kinds, whole and in shape."""
    assert response.status_code in (200, 400), response.text
    text = response.text
    if response.headers["content-type"].startswith("text/event-stream"):
        last = text.strip().splitlines()[-1]
        ends = {"/v1/responses": "response.", "/v1/messages": '"type":"message_stop"'}
        assert ends.get(path, "[DONE]") in last
        return
    body = json.loads(text)
    if response.status_code == 400:
        assert body["error"]["message"]
        assert ("request_id" in body) == path.startswith("/v1/messages")


def run(n: int) -> None:
    script = Script(["I think.</think>One answer."])
    with Running(ScriptedEngine(script, context=4096), Rules()) as server, server.http() as http:

        @settings(max_examples=n, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def ask(data: st.DataObject) -> None:
            path = data.draw(st.sampled_from(list(PATHS)))
            body = data.draw(bodies(PATHS[path]))
            check(path, http.post(path, content=json.dumps(body)))

        ask()
        assert http.get("/health").json() == {"status": "ok", "active": 0, "waiting": 0}
    assert server.scheduler.n_lent == 0


def test_bodies_nobody_would_send() -> None:
    run(60)


@pytest.mark.long
def test_many_more_of_them() -> None:
    run(2000)
