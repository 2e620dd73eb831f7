"""What the server's parts say to each other: one Request, and the events of its answer.

Every protocol becomes a Request and reads the same events; nothing here knows a protocol.
Texts are `ds4py.text.events`; this module adds what a server has to say besides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds4py.engine.options import SamplingOptions
from ds4py.engine.sampling import Constraint
from ds4py.text import events


@dataclass(frozen=True)
class Request:
    """One answer to generate."""

    prompt: list[int]
    """Token ids, at least one, at most as many as the context holds."""
    sampling: SamplingOptions
    """Without stop strings: those apply to visible text, after parsing."""
    stop: tuple[str, ...] = ()
    scored: int | None = None
    """How likely the prompt's own tokens are is wanted, with this many of the likeliest."""
    answered: bool = True
    """An answer is wanted: otherwise only what is known of the prompt."""
    parsed: bool = True
    """The answer is reasoning, content and calls; otherwise all of it is content."""
    thinking: bool = False
    """The prompt ends where reasoning begins."""
    tools: bool = False
    """Calls are looked for."""
    parallel: bool = True
    """More than one call may be made."""
    constraint: Callable[[], Constraint] | None = None
    """Makes what the answer must follow; None: it is free."""
    calls: Callable[[], Constraint | None] | None = None
    """Makes what a call must follow once its markup has begun, in an answer that is free."""
    new_id: Callable[[], str] | None = None
    """Makes ids of calls."""


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer."""

    prompt: int = 0
    cached: int = 0
    """How many of the prompt's tokens did not have to be read again."""
    completion: int = 0
    reasoning: int = 0
    """How many of the completion's tokens were reasoning."""


@dataclass(frozen=True)
class Reading:
    """The prompt is being read: tokens done, of those that have to be read."""

    done: int
    total: int


@dataclass(frozen=True)
class Chance:
    """How likely a token of the content was, and the likeliest ones, as (bytes, logprob)."""

    token: bytes
    logprob: float | None
    """None for a prompt's first token, which nothing stands before."""
    top: tuple[tuple[bytes, float], ...]


@dataclass(frozen=True)
class Scored:
    """The prompt has been read: each of its tokens but the first."""

    chances: tuple[Chance, ...]


@dataclass(frozen=True)
class Finished:
    """The answer is complete."""

    reason: str
    """"stop" (the model ended), "stop_string", "tool_calls" or "length"."""
    usage: Usage
    stop_string: str | None = None
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The answer cannot be completed."""

    error: Exception


Event = events.Event | Reading | Chance | Scored | Finished | Failed
