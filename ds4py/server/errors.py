"""Errors as clients see them: one exception, and the two shapes in which APIs report it.

The texts about a prompt that is too long are part of the interface: agents recognise them and
shorten their history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds4py.errors import DS4Error

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


@dataclass
class ApiError(DS4Error):
    """A request that cannot be served. Raised before or during an answer."""

    message: str
    status: int = 400
    param: str | None = None
    """The field at fault, as a path: messages.3.content.1."""
    code: str | None = None
    """A word for programs, where the OpenAI API has one."""
    retry_after: int | None = None
    """Seconds after which another try makes sense."""
    details: dict[str, Any] | None = None
    """What the Anthropic API adds for some errors."""
    extra: dict[str, str] | None = None
    """Further headers."""

    def __str__(self) -> str:
        return self.message

    def headers(self) -> dict[str, str]:
        """Headers that belong to this error."""
        out = dict(self.extra or {})
        if self.status == 401:
            out["www-authenticate"] = "Bearer"
        if self.retry_after is not None:
            out["retry-after"] = str(self.retry_after)
        return out

    def openai(self) -> dict[str, Any]:
        """The body in OpenAI's shape, of which all four keys are always there."""
        usual = "invalid_request_error" if self.status < 500 else "server_error"
        kind = OPENAI_TYPES.get(self.status, usual)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """The body in Anthropic's shape."""
        usual = "invalid_request_error" if self.status < 500 else "api_error"
        kind = ANTHROPIC_TYPES.get(self.status, usual)
        message = f"{self.param}: {self.message}" if self.param else self.message
        error: dict[str, Any] = {"type": kind, "message": message}
        if self.details is not None:
            error["details"] = self.details
        return {"type": "error", "error": error, "request_id": request_id}


class Overflow(ApiError):
    """The prompt is longer than the context."""

    def __init__(self, n_tokens: int, context: int) -> None:
        super().__init__(
            f"This model's maximum context length is {context} tokens. However, your messages "
            f"resulted in {n_tokens} tokens. Please reduce the length of the messages.",
            param="messages",
            code="context_length_exceeded",
        )
        self.n_tokens, self.context = n_tokens, context

    def anthropic(self, request_id: str) -> dict[str, Any]:
        message = f"prompt is too long: {self.n_tokens} tokens > {self.context} maximum"
        return ApiError(message).anthropic(request_id)


class Busy(ApiError):
    """The queue is full. Anthropic's clients know 529 for this."""

    def __init__(self, waiting: int) -> None:
        super().__init__(
            f"{waiting} requests are waiting, which is the limit; try again", 429, retry_after=2
        )

    def anthropic(self, request_id: str) -> dict[str, Any]:
        return ApiError(self.message, 529).anthropic(request_id)


class NotReady(ApiError):
    """The model is being loaded, or the server is stopping."""

    def __init__(self, why: str) -> None:
        super().__init__(why, 503, retry_after=2)
