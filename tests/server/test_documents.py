"""The documents say what the code does: fields, errors, set-up snippets."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from ds4py.server import app, describe
from ds4py.server.anthropic import CountBody, MessagesBody
from ds4py.server.body import Body
from ds4py.server.openai_chat import ChatBody
from ds4py.server.openai_completions import CompletionBody
from ds4py.server.openai_responses import ResponsesBody

README = Path(app.__file__).with_name("README.md").read_text(encoding="utf-8")
MODELS: list[type[Body]] = [ChatBody, CompletionBody, ResponsesBody, MessagesBody, CountBody]
SMALLEST: Any = {
    ChatBody: ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    CompletionBody: ("/v1/completions", {"prompt": "hi"}),
    ResponsesBody: ("/v1/responses", {"input": "hi"}),
    MessagesBody: ("/v1/messages", {"messages": [{"role": "user", "content": "hi"}]}),
    CountBody: ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
}


def test_the_tables_are_those_of_the_code() -> None:
    assert README.endswith(describe.tables()), "write describe.tables() at the end of README.md"


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_in_one_set(model: type[Body]) -> None:
    sets = [set(model.model_fields), set(model.HARMLESS), set(model.REFUSED)]
    assert sum(map(len, sets)) == len(set.union(*sets))


@pytest.mark.parametrize("model", MODELS)
def test_the_sets_are_what_happens(served: Any, model: type[Body]) -> None:
    path, body = SMALLEST[model]
    limit = {MessagesBody: "max_tokens", ResponsesBody: "max_output_tokens", CountBody: None}
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
                wrong = "PUT" if method == "post" else "DELETE"
                response = http.request(wrong, path.replace("{name}", "tiny"))
                assert response.status_code == 405
    text = json.dumps(document)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert references <= set(document["components"]["schemas"])


def test_the_snippets_can_be_read() -> None:
    for block in re.findall(r"```json\n(.*?)```", README, re.DOTALL):
        json.loads(block)
    for block in re.findall(r"```toml\n(.*?)```", README, re.DOTALL):
        tomllib.loads(block)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    for line in re.findall(r"-d '(.*?)'", README):
        json.loads(line)
