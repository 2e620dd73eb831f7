"""What a model is asked for, in terms that all protocols share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tool:
    """A function the model may call."""

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool = False
    """Arguments follow `parameters` without fail."""

    def schema(self) -> dict[str, Any]:
        """As the model reads it."""
        described = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **described, "parameters": self.parameters}


@dataclass(frozen=True)
class Choice:
    """Whether tools must be called: kind "auto", "none", "required", or "named": one, once."""

    kind: str = "auto"
    names: tuple[str, ...] | None = None
    """The tools that may be called; None: all there are."""


@dataclass(frozen=True)
class Format:
    """What the content must be: JSON of a schema, or any JSON object."""

    schema: dict[str, Any] | None


@dataclass
class Conversation:
    """What a model is asked for, in OpenAI's terms."""

    messages: list[dict[str, Any]]
    tools: list[Tool] = field(default_factory=list)
    choice: Choice = Choice()
    parallel: bool = True
    format: Format | None = None
    thinking: bool = True
    effort: str | None = None
