"""The application: paths, and what holds for every request whatever its protocol.

Who may ask (key, Host, Origin), how long a body may be and how long it may take to arrive, and in
which shape errors are told. The work itself is in the protocol files and the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ds4py.server import about, anthropic, describe
from ds4py.server import body as bodies
from ds4py.server.anthropic import CountBody, MessagesBody, MessagesExchange
from ds4py.server.errors import ApiError, NotReady
from ds4py.server.generation import Turn
from ds4py.server.kept import Kept
from ds4py.server.openai_chat import ChatBody, ChatExchange
from ds4py.server.openai_completions import CompletionBody, CompletionExchange
from ds4py.server.openai_responses import (
    InputTokensBody,
    ResponsesBody,
    ResponsesExchange,
    conversation,
    history,
    input_items,
    known,
)
from ds4py.server.prompt import PromptWriter
from ds4py.server.replay import Replays
from ds4py.server.respond import Bridge, Exchange, Inbox, Pace, Stream, Whole, reply
from ds4py.server.tokens import DetokenizeBody, TokenizeBody, detokenized, tokenized
from ds4py.server.trace import Trace
from ds4py.server.worker import Job, Worker

log = logging.getLogger("ds4.server")
AnyBody = TypeVar("AnyBody", bound=bodies.Body)
Generating = TypeVar("Generating", bound=bodies.ModelBody)

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
REQUEST_ID = "ds4.request_id"
OPEN_PATHS = ("/health", "/")
"""Paths that need no key: a page without secrets and the question whether anybody is there."""


@dataclass(frozen=True)
class Rules:
    """What the server's owner decides."""

    api_key: str | None = None
    check_host: bool = True
    """Refuse other names than this machine's: a web page cannot reach us by a name of its own."""
    origins: tuple[str, ...] = ()
    """Web pages that may use the server although they are not its own."""
    strict_model: bool = False
    """Refuse names of models that are not ours. Otherwise any name means the one there is."""
    lenient: bool = False
    """Ignore fields of bodies that are unknown instead of refusing them."""
    thinking: bool = True
    """Whether reasoning is on where a request of the OpenAI APIs says nothing."""
    max_body: int = 64 << 20
    body_s: float = 60.0
    """How long a body may take to arrive."""
    pace: Pace = field(default_factory=Pace)
    trace: Path | None = None
    """A file for every prompt and answer; None: they are written nowhere."""
    state: Path | None = None
    """A directory for what outlives the server; None: nothing does."""


class Service:
    """What the endpoints work with."""

    def __init__(self, worker: Worker, rules: Rules) -> None:
        self.worker = worker
        self.rules = rules
        self.created = int(time.time())
        self.kept = Kept(rules.state)
        self.replays = Replays(rules.state)
        self.trace = None if rules.trace is None else Trace(rules.trace)
        self._writer: PromptWriter | None = None
        self._bridge: Bridge | None = None

    @property
    def writer(self) -> PromptWriter:
        """Raises NotReady while the model is being loaded."""
        if self._writer is None:
            engine = self.worker.engine
            if engine is None:
                done, total = self.worker.loading
                share = f" ({100 * done // total} %)" if total else ""
                raise NotReady(f"the model is being loaded{share}; try again")
            assert engine.tokenizer is not None
            self._writer = PromptWriter(
                engine.tokenizer,
                engine.context,
                engine.config.vocab_size,
                engine.name,
                self.replays,
            )
        return self._writer

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for a name that is not ours, where that is wanted."""
        if self.rules.strict_model and name not in ("", self.writer.model):
            raise ApiError(
                f"there is no model {name!r}; there is {self.writer.model}",
                404,
                param="model",
                code="model_not_found",
            )

    async def answer(self, request: HttpRequest, make: Callable[[], Exchange]) -> Response:
        """Run an exchange. It is made on a thread: writing a long prompt takes a while."""
        exchange = await asyncio.to_thread(make)
        if self._bridge is None:
            self._bridge = Bridge()
        inbox = Inbox(self.worker, exchange.requests, self._bridge)
        kind = Stream if exchange.streaming else Whole
        trace, tokenizer = self.trace, self.writer.tokenizer

        def over(jobs: list[Job]) -> None:
            if trace is not None:
                for job in jobs:
                    trace.write(job, request.scope[REQUEST_ID], tokenizer)

        return kind(exchange, inbox, self.rules.pace, self.record, over)

    def record(self, ids: list[str], turn: Turn) -> None:
        """Keep what the model wrote for when its calls come back."""
        self.replays.put(ids, turn, self.writer.tokenizer)

    def close(self) -> None:
        """No request will come any more."""
        self.replays.close()
        self.kept.close()
        if self.trace is not None:
            self.trace.close()


async def read_body(request: HttpRequest, model: type[AnyBody]) -> AnyBody:
    """The request's body, checked. Raises ApiError."""
    rules: Rules = request.app.state.service.rules
    too_long = ApiError(f"the body is longer than {rules.max_body} bytes", 413)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > rules.max_body:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(rules.body_s):
            async for piece in request.stream():
                data += piece
                if len(data) > rules.max_body:
                    raise too_long
    except TimeoutError:
        raise ApiError(f"the body did not arrive within {rules.body_s:g} s", 408) from None
    encoding = request.headers.get("content-encoding", "").lower()

    def check() -> AnyBody:
        value = bodies.decode(bytes(data), encoding, rules.max_body)
        return bodies.checked(model, value, rules.lenient)

    # Small bodies are checked at once: a thread costs more than the check.
    return check() if len(data) < 1 << 16 else await asyncio.to_thread(check)


Endpoint = Callable[[HttpRequest], Awaitable[Response]]


def answering(
    model: type[Generating], make: Callable[[Generating, Service, str], Exchange]
) -> Endpoint:
    """An endpoint that generates: its body, and what makes an exchange of it and a request's id."""

    async def endpoint(request: HttpRequest) -> Response:
        service: Service = request.app.state.service
        body = await read_body(request, model)
        service.check_model(body.model)
        request_id: str = request.scope[REQUEST_ID]
        return await service.answer(request, lambda: make(body, service, request_id))

    return endpoint


async def stored(request: HttpRequest) -> Response:
    """Tells or deletes a response."""
    kept: Kept = request.app.state.service.kept
    name = request.path_params["id"]
    if request.method == "DELETE":
        if not await asyncio.to_thread(kept.delete, name):
            known(None, name)
        return reply({"id": name, "object": "response", "deleted": True})
    if request.query_params.get("stream", "false").lower() == "true":
        raise ApiError("is true; a response that is stored is told whole", param="stream")
    return reply(known(await asyncio.to_thread(kept.response, name), name))


async def stored_items(request: HttpRequest) -> Response:
    kept: Kept = request.app.state.service.kept
    name = request.path_params["id"]
    items = known(await asyncio.to_thread(kept.inputs, name), name)
    return reply(input_items(name, items, request.query_params))


async def input_tokens(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request, InputTokensBody)
    writer, kept = service.writer, service.kept
    service.check_model(body.model)

    def count() -> int:
        asked = conversation(body, history(body, kept), service.rules.thinking, kept)
        return len(writer.tokens(asked))

    n_tokens = await asyncio.to_thread(count)
    return reply({"object": "response.input_tokens", "input_tokens": n_tokens})


async def count_tokens(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    body = await read_body(request, CountBody)
    service.check_model(body.model)
    made = anthropic.conversation(body)
    tokens = await asyncio.to_thread(service.writer.tokens, made)
    return reply({"input_tokens": len(tokens)})


async def tokenize(request: HttpRequest) -> Response:
    body = await read_body(request, TokenizeBody)
    writer = request.app.state.service.writer
    return reply(await asyncio.to_thread(tokenized, body, writer))


async def detokenize(request: HttpRequest) -> Response:
    body = await read_body(request, DetokenizeBody)
    writer = request.app.state.service.writer
    return reply(await asyncio.to_thread(detokenized, body, writer))


def error_reply(scope: Scope, error: ApiError) -> Response:
    """An error in the shape of the API that the path belongs to."""
    if scope["path"].startswith("/v1/messages"):
        value = error.anthropic(scope[REQUEST_ID])
        overloaded = value["error"]["type"] == "overloaded_error"
        return reply(value, 529 if overloaded else error.status, error.headers())
    return reply(error.openai(), error.status, error.headers())


async def told(request: HttpRequest, failure: Exception) -> Response:
    """What a client is told about any exception."""
    error = as_api_error(failure)
    if error.status in (404, 405) and (why := describe.absent(request.url.path)) is not None:
        error = ApiError(why, 404)
    return error_reply(request.scope, error)


class Guard:
    """Everything that is decided before an endpoint sees the request."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request_id = scope[REQUEST_ID] = f"req_{secrets.token_hex(12)}"
        scope["path"] = _of_absolute(scope["path"]).rstrip("/") or "/"

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers["request-id"] = request_id
            await send(message)

        try:
            self.check(scope)
        except ApiError as error:
            await error_reply(scope, error)(scope, receive, send_marked)
            return
        with contextlib.suppress(Exception):  # starlette raises what it has had told and logged
            await self.app(scope, receive, send_marked)

    def check(self, scope: Scope) -> None:
        """Raise ApiError for a caller who may not ask."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        by_tcp = (scope.get("server") or (None, None))[1] is not None
        if by_tcp and self.rules.check_host and not _is_local(host):
            raise ApiError(f"the Host {host[:80]!r} is not this server", 403)
        origin = headers.get("origin")
        own = origin is not None and origin.partition("://")[2] == host
        if origin is not None and not own and origin not in self.rules.origins:
            raise ApiError(f"pages of {origin[:80]!r} may not use this server", 403)
        if self.rules.api_key is None or scope["path"] in OPEN_PATHS:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else scheme
        key = (headers.get("x-api-key") or bearer).encode("latin-1")  # the bytes that were sent
        if not hmac.compare_digest(key, self.rules.api_key.encode()):
            raise ApiError("the API key is missing or wrong", 401, code="invalid_api_key")


def _of_absolute(target: str) -> str:
    """The path of a target that is a whole URL, as a proxy's clients send it."""
    scheme, found, rest = target.partition("://")
    return "/" + rest.partition("/")[2] if found and scheme in ("http", "https") else target


def _is_local(host: str) -> bool:
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name.lower() in LOCAL_HOSTS


def as_api_error(failure: Exception) -> ApiError:
    """Any exception as an ApiError."""
    if isinstance(failure, ApiError):
        return failure
    if isinstance(failure, HTTPException):
        said = {404: "there is nothing at this path", 405: "this path has another method"}
        text = said.get(failure.status_code, failure.detail)
        return ApiError(text, failure.status_code, extra=dict(failure.headers or {}))
    if isinstance(failure, ClientDisconnect):
        return ApiError("the client left before its body was there")
    log.error("a request failed", exc_info=failure)
    return ApiError("the server failed; see its log", 500)


ANSWERS: dict[str, Endpoint] = {
    "/v1/chat/completions": answering(
        ChatBody,
        lambda body, service, _: ChatExchange(body, service.writer, service.rules.thinking),
    ),
    "/v1/completions": answering(
        CompletionBody, lambda body, service, _: CompletionExchange(body, service.writer)
    ),
    "/v1/responses": answering(
        ResponsesBody,
        lambda body, service, _: ResponsesExchange(
            body, service.writer, service.kept, service.rules.thinking
        ),
    ),
    "/v1/messages": answering(
        MessagesBody,
        lambda body, service, request_id: MessagesExchange(body, service.writer, request_id),
    ),
    "/v1/responses/input_tokens": input_tokens,
    "/v1/responses/{id}": stored,
    "/v1/responses/{id}/input_items": stored_items,
    "/v1/messages/count_tokens": count_tokens,
    "/v1/models": about.models,
    "/v1/models/{name}": about.one_model,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/health": about.health,
    "/status": about.told_status,
    "/metrics": about.told_metrics,
    "/props": about.props,
    "/openapi.json": about.told_openapi,
    "/": about.page,
}
"""What answers at each of the endpoints that `describe` lists."""


def make_app(service: Service) -> ASGIApp:
    """The application. The worker may still be loading its model."""

    app = Starlette(
        routes=[
            Route(
                endpoint.path.replace("{name}", "{name:path}"),
                ANSWERS[endpoint.path],
                methods=[endpoint.method.upper()],
            )
            for endpoint in describe.ENDPOINTS
        ],
        exception_handlers=dict.fromkeys(
            (HTTPException, ApiError, ClientDisconnect, Exception), told
        ),
    )
    app.state.service = service
    guard = Guard(app, service.rules)
    if not service.rules.origins:
        return guard
    return CORSMiddleware(
        guard, allow_origins=service.rules.origins, allow_methods=["*"], allow_headers=["*"]
    )
