"""What an answer consists of, in the order it arrives. `stream` makes events, front ends read them.

All texts are deltas: those of one kind (and, for arguments, of one index) belong together.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call of the function `name` begins; `index` counts the calls of this answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the call's arguments as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is complete: `arguments` is one JSON object, the sum of its deltas."""

    index: int
    name: str
    arguments: str


Event = Reasoning | Content | ToolCallStart | ToolCallArguments | ToolCallEnd
