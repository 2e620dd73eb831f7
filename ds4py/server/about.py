"""What the server says about itself and its model: to agents, monitors and people."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response

from ds4py.server import describe, metrics
from ds4py.server.errors import ApiError
from ds4py.server.respond import reply

if TYPE_CHECKING:
    from ds4py.server.app import Service
    from ds4py.server.worker import Worker

PAGE = Path(__file__).with_name("page.html")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page is one file and asks nobody but this server."""


async def told_openapi(request: HttpRequest) -> Response:
    return reply(describe.openapi())


def _model_object(service: Service, for_anthropic: bool) -> dict[str, Any]:
    """The model under the names by which clients look for its context."""
    writer, engine = service.writer, service.worker.engine
    assert engine is not None
    trained = engine.config.max_position_embeddings
    described = {
        "id": writer.model,
        "object": "model",
        "created": service.created,
        "owned_by": "ds4",
        "context_length": writer.context,
        "max_model_len": writer.context,
        "meta": {"n_ctx": writer.context, "n_ctx_train": trained},
    }
    if for_anthropic:
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(service.created))
        described |= {
            "type": "model",
            "display_name": writer.model,
            "created_at": made,
            "lifecycle": "active",
            "max_input_tokens": writer.context,
            "max_tokens": writer.context,
            **dict.fromkeys(("capabilities", "line", "deprecated_at", "retires_at")),
        }
    return described


async def models(request: HttpRequest) -> Response:
    for_anthropic = "anthropic-version" in request.headers
    found = _model_object(request.app.state.service, for_anthropic)
    ends = {"has_more": False, "first_id": found["id"], "last_id": found["id"]}
    return reply({"object": "list", "data": [found], **(ends if for_anthropic else {})})


async def one_model(request: HttpRequest) -> Response:
    service: Service = request.app.state.service
    found = _model_object(service, "anthropic-version" in request.headers)
    name = request.path_params["name"]
    if name != found["id"]:
        raise ApiError(
            f"there is no model {name!r}; there is {found['id']}",
            404,
            param="model",
            code="model_not_found",
        )
    return reply(found)


async def health(request: HttpRequest) -> Response:
    """200 once the model is loaded, 503 before."""
    worker: Worker = request.app.state.service.worker
    if worker.engine is None:
        done, total = worker.loading
        return reply({"status": "loading", "done": done, "total": total}, 503)
    return reply({"status": "ok", "active": worker.n_active, "waiting": worker.n_waiting})


async def told_status(request: HttpRequest) -> Response:
    return reply(metrics.status(request.app.state.service.worker))


async def told_metrics(request: HttpRequest) -> Response:
    text = metrics.prometheus(request.app.state.service.worker)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def props(request: HttpRequest) -> Response:
    """The context, where llama.cpp's clients look for it."""
    service: Service = request.app.state.service
    settings = {"n_ctx": service.writer.context}
    return reply({"default_generation_settings": settings, "total_slots": service.worker.n_slots})


async def page(request: HttpRequest) -> Response:
    headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
    return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)
