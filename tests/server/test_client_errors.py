"""Every refusal arrives as the exception that the official clients have for it."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest

from ds4py.server.app import Rules
from tests.server.scripted import Running, Script, ScriptedEngine

HI: Any = [{"role": "user", "content": "hi"}]


class Broken(Exception):
    """What a script raises in the middle of an answer."""


def breaks(position: int) -> None:
    if position:
        raise Broken


@contextlib.contextmanager
def full() -> Iterator[Running]:
    """A server whose only slot and only place in the queue are taken."""
    opened, reached = threading.Event(), threading.Event()

    def held(position: int) -> None:
        reached.set()
        assert opened.wait(60)

    script = Script(["x"], before_token=held)
    with Running(ScriptedEngine(script), slots=1, queue=1) as server:
        body = {"messages": HI, "thinking": {"type": "disabled"}, "stream": True}
        taken = [server.post("/v1/chat/completions", body)]
        assert reached.wait(60)
        taken.append(server.post("/v1/chat/completions", body))
        while not server.worker.n_waiting:
            reached.wait(0.01)
        try:
            yield server
        finally:
            opened.set()
            for connection in taken:
                connection.close()


def plain(rules: Rules | None = None, **script: Any) -> Running:
    return Running(ScriptedEngine(Script(["one two three"], **script)), rules)


ORIGIN = {"origin": "http://elsewhere.example"}
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], int, Any, Any]] = {
    "a wrong key": (
        lambda: plain(Rules(api_key="k")),
        {},
        401,
        openai.AuthenticationError,
        anthropic.AuthenticationError,
    ),
    "a field": (
        plain,
        {"extra_body": {"temperature": 9}},
        400,
        openai.BadRequestError,
        anthropic.BadRequestError,
    ),
    "an unknown field": (
        plain,
        {"extra_body": {"temprature": 1}},
        400,
        openai.BadRequestError,
        anthropic.BadRequestError,
    ),
    "a foreign page": (
        plain,
        {"extra_headers": ORIGIN},
        403,
        openai.PermissionDeniedError,
        anthropic.PermissionDeniedError,
    ),
    "a model": (
        lambda: plain(Rules(strict_model=True)),
        {},
        404,
        openai.NotFoundError,
        anthropic.NotFoundError,
    ),
    "a long body": (
        lambda: plain(Rules(max_body=20)),
        {},
        413,
        openai.APIStatusError,
        anthropic.RequestTooLargeError,
    ),
    "a failure": (
        lambda: plain(before_token=breaks),
        {},
        500,
        openai.InternalServerError,
        anthropic.InternalServerError,
    ),
    "a full queue": (full, {}, 429, openai.RateLimitError, anthropic.OverloadedError),
}


@pytest.mark.parametrize("name", CASES)
def test_the_clients_own_exceptions(name: str) -> None:
    make, given, status, of_openai, of_anthropic = CASES[name]
    with make() as server:
        client, other = server.openai(), server.anthropic()
        asked: list[Callable[[], Any]] = [
            lambda: client.chat.completions.create(model="m", messages=HI, **given),
            lambda: client.responses.create(model="m", input="hi", **given),
            lambda: client.completions.create(model="m", prompt="hi", **given),
        ]
        for ask in asked:
            with pytest.raises(of_openai) as caught:
                ask()
            error = caught.value
            assert error.status_code == status and error.request_id.startswith("req_")
            assert error.type and error.message and str(error.body["message"])
            assert set(error.body) == {"message", "type", "param", "code"}
        with pytest.raises(of_anthropic) as refused:
            other.messages.create(model="m", max_tokens=9, messages=HI, **given)
        told = refused.value
        assert told.status_code == (529 if status == 429 else status)
        assert told.body["type"] == "error" and told.body["error"]["message"]
        assert told.request_id == told.body["request_id"]
        if status == 429:
            for response in (error.response, told.response):
                assert int(response.headers["retry-after"]) > 0
        if "field" in name:
            assert error.param in ("temperature", "temprature") and error.param in told.message


def test_failures_in_the_middle_of_streams() -> None:
    with plain(before_token=breaks) as server:
        ask: Any = {"model": "m", "stream": True}
        off: Any = {"reasoning_effort": "none"}
        client = server.openai()
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.chat.completions.create(messages=HI, **off, **ask))
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.completions.create(prompt="hi", **ask))
        events = list(client.responses.create(input="hi", reasoning={"effort": "none"}, **ask))
        assert events[-1].type == "response.failed"
        assert "the engine failed" in events[-1].response.error.message
        with pytest.raises(anthropic.APIStatusError, match="the engine failed"):
            list(server.anthropic().messages.create(messages=HI, max_tokens=9, **ask))


def test_what_is_too_long_has_the_words_that_agents_know() -> None:
    long: Any = [{"role": "user", "content": "7" * 200}]
    with Running(ScriptedEngine(Script(["x"]), context=40)) as server:
        client = server.openai()
        for ask in (
            lambda: client.chat.completions.create(model="m", messages=long),
            lambda: client.responses.create(model="m", input=long),
        ):
            with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
                ask()
            assert caught.value.code == "context_length_exceeded"
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 40"):
            server.anthropic().messages.create(model="m", max_tokens=9, messages=long)
