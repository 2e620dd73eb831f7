"""The documents say what the code does: fields, errors, set-up snippets."""

import inspect
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from ds4py.server import app, describe
from ds4py.server.anthropic import CountBody, MessagesBody
from ds4py.server.body import Body
from ds4py.server.openai_chat import ChatBody
from ds4py.server.openai_completions import CompletionBody
from ds4py.server.openai_responses import InputTokensBody, ResponsesBody

README = Path(app.__file__).with_name("README.md").read_text(encoding="utf-8")
MODELS: list[type[Body]] = [ChatBody, CompletionBody, ResponsesBody, InputTokensBody]
MODELS += [MessagesBody, CountBody]
SMALLEST: Any = {
    ChatBody: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    CompletionBody: ("/v1/completions", {"prompt": "hi"}),
    ResponsesBody: ("/v1/responses", {"input": "hi"}),
    InputTokensBody: ("/v1/responses/input_tokens", {"input": "hi"}),
    MessagesBody: ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}]}),
    CountBody: ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
}


OPENAI = openai.OpenAI(api_key="none")
ANTHROPIC = anthropic.Anthropic(api_key="none")
METHODS: dict[type[Body], list[Any]] = {
    ChatBody: [
        OPENAI.chat.completions.create,
        OPENAI.chat.completions.parse,
        OPENAI.chat.completions.stream,
    ],
    CompletionBody: [OPENAI.completions.create],
    ResponsesBody: [OPENAI.responses.create, OPENAI.responses.stream],
    InputTokensBody: [OPENAI.responses.input_tokens.count],
    MessagesBody: [
        ANTHROPIC.messages.create,
        ANTHROPIC.messages.stream,
        ANTHROPIC.beta.messages.create,
        ANTHROPIC.beta.messages.tool_runner,
    ],
    CountBody: [ANTHROPIC.messages.count_tokens, ANTHROPIC.beta.messages.count_tokens],
}
NOT_SENT = {
    *("extra_headers", "extra_query", "extra_body", "timeout"),  # about the request itself
    *("text_format", "response_id", "starting_after"),  # of helpers: written as `text`, or a GET
    *("max_iterations", "run_tools_eagerly"),  # how the client runs its tools
}


def test_the_tables_are_those_of_the_code() -> None:
    assert README.endswith(describe.tables()), "write describe.tables() at the end of README.md"


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_in_one_set(model: type[Body]) -> None:
    sets = [set(model.model_fields), set(model.HARMLESS), set(model.REFUSED)]
    assert sum(map(len, sets)) == len(set.union(*sets))


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_the_clients_is_in_a_set(model: type[Body]) -> None:
    known = {*model.model_fields, *model.HARMLESS, *model.REFUSED}
    for method in METHODS[model]:
        sent = set(inspect.signature(method).parameters) - NOT_SENT
        assert sent <= known, sent - known


@pytest.mark.parametrize("model", MODELS)
def test_the_sets_are_what_happens(served: Any, model: type[Body]) -> None:
    path, body = SMALLEST[model]
    limit = {ResponsesBody: "max_output_tokens", InputTokensBody: None, CountBody: None}
    name = limit.get(model, "max_tokens")
    body = {**body, **({name: 1} if name else {})}
    with served.http() as http:
        ignored = dict.fromkeys(model.HARMLESS, "x")
        response = http.post(path, json={**body, **ignored})
        assert response.status_code == 200, response.text
        for field in model.REFUSED:
            response = http.post(path, json={**body, field: "x"})
            assert response.status_code == 400 and field in response.text
            off = http.post(path, json={**body, field: False})
            assert off.status_code == 200, off.text


def test_the_openapi_document(served: Any) -> None:
    with served.http() as http:
        document = http.get("/openapi.json").json()
        for path, operations in document["paths"].items():
            for method in operations:
                assert method != "put"
                response = http.put(path.replace("{name}", "tiny").replace("{id}", "resp_1"))
                assert response.status_code == 405
    text = json.dumps(document)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert references <= set(document["components"]["schemas"])


def test_what_there_is_not(served: Any) -> None:
    with served.http() as http:
        for start, why in describe.ABSENT.items():
            response = http.post(start.replace("{id}", "resp_1"), json={})
            assert response.status_code == 404 and why in response.text, start
        for path in ("/apis", "/v1/embedding"):
            assert "nothing at this path" in http.post(path, json={}).text


def test_the_snippets_can_be_read() -> None:
    for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL):
        json.loads(block)
    for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL):
        tomllib.loads(block)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    for line in re.findall(r"-d '(.*?)'", README):
        json.loads(line)
