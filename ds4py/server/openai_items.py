"""Input items of the Responses API -> messages.

Items of one answer stand side by side there: reasoning, a message, calls. Here they are one
assistant message.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ds4py.server.conversation import Tool
from ds4py.server.errors import ApiError
from ds4py.server.kept import Kept
from ds4py.server.openai_parts import ContentPart, called, text_of, tool_of, tools_of

ROLES = ("user", "assistant", "system", "developer")
_CONTENT: TypeAdapter[str | list[ContentPart] | None] = TypeAdapter(str | list[ContentPart] | None)


Names = dict[tuple[str | None, str], str]
"""(namespace, name) of a function -> its name as the model reads it."""


def toolbox(values: list[Any] | None) -> tuple[list[Tool], Names]:
    """The functions among the tools, also those in namespaces, as Codex has those of MCP servers.

    A namespace becomes part of the name only where two functions have the same: a tool_choice
    cannot name it, and models tend to leave it out.
    """
    found: list[tuple[str | None, Tool]] = []
    for index, value in enumerate(values or ()):
        where = f"tools.{index}"
        if isinstance(value, dict) and value.get("type") == "namespace":
            namespace, inside = value.get("name"), value.get("tools")
            if not isinstance(namespace, str) or not isinstance(inside, list):
                raise ApiError("is no namespace with a name and tools", param=where)
            tools = tools_of(inside, nested=False, param=f"{where}.tools")
            found += [(namespace, tool) for tool in tools]
        elif (tool := tool_of(value, where, nested=False)) is not None:
            found.append((None, tool))
    n_named = Counter(tool.name for _, tool in found)
    names = {
        (namespace, tool.name): tool.name
        if namespace is None or n_named[tool.name] == 1
        else f"{namespace}.{tool.name}"
        for namespace, tool in found
    }
    return [replace(tool, name=names[namespace, tool.name]) for namespace, tool in found], names


def translated(items: list[Any], kept: Kept, names: Names) -> list[dict[str, Any]]:
    """Messages of the items. Raises ApiError naming the item at fault."""
    builder = _Builder(names)
    for index, item in enumerate(items):
        where = f"input.{index}"
        if not isinstance(item, dict):
            raise ApiError("is no object", param=where)
        if item.get("type") == "item_reference":
            item = _referred(item.get("id"), kept, where)
        builder.add(item, where)
    return builder.messages


class _Builder:
    """Collects messages; the last assistant message stays open for more of its items."""

    def __init__(self, names: Names) -> None:
        self.messages: list[dict[str, Any]] = []
        self._names = names

    def add(self, item: dict[str, Any], where: str) -> None:
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            self._message(item, where)
        elif kind == "reasoning":
            self._answer(new=True)["reasoning_content"] += _reasoning(item)
        elif kind == "function_call":
            self._call(item, where)
        elif kind == "function_call_output":
            call_id = _text_field(item, "call_id", where)
            output = _content(item.get("output"), f"{where}.output")
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
        else:
            raise ApiError(f"is an item of type {kind!r}, which is not supported", param=where)

    def _message(self, item: dict[str, Any], where: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise ApiError(f"need one of {', '.join(ROLES)}", param=f"{where}.role")
        content = _content(item.get("content"), f"{where}.content")
        if role != "assistant":
            self.messages.append({"role": role, "content": content})
            return
        answer = self._answer(new=False)
        answer["content"] = "\n\n".join(text for text in (answer["content"], content) if text)

    def _call(self, item: dict[str, Any], where: str) -> None:
        call_id, name = (_text_field(item, key, where) for key in ("call_id", "name"))
        namespace = item.get("namespace")
        if not isinstance(namespace, str | None):
            raise ApiError("is no string", param=f"{where}.namespace")
        arguments = item.get("arguments") or "{}"
        if not isinstance(arguments, str | dict):
            raise ApiError("is no string", param=f"{where}.arguments")
        self._answer(new=False).setdefault("tool_calls", []).append(
            called(call_id, self._names.get((namespace, name), name), arguments)
        )

    def _answer(self, new: bool) -> dict[str, Any]:
        """The open assistant message. new: reasoning begins one where the last has its answer."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or (new and _is_answered(last)):
            last = {"role": "assistant", "content": "", "reasoning_content": ""}
            self.messages.append(last)
        return last


def _is_answered(message: dict[str, Any]) -> bool:
    return bool(message["content"] or message.get("tool_calls"))


def _reasoning(item: dict[str, Any]) -> str:
    """An item's reasoning: its text, else its summary. What is encrypted elsewhere is lost."""
    for key in ("content", "summary"):
        texts = item.get(key)
        if isinstance(texts, list) and texts:
            found = [part.get("text") for part in texts if isinstance(part, dict)]
            return "\n\n".join(text for text in found if isinstance(text, str))
    return ""


def _content(content: Any, where: str) -> str:
    try:
        return text_of(_CONTENT.validate_python(content), where)
    except ValidationError:
        raise ApiError("need a text or a list of parts", param=where) from None


def _text_field(item: dict[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str) or not value:
        raise ApiError("is missing or no string", param=f"{where}.{key}")
    return value


def _referred(item_id: Any, kept: Kept, where: str) -> dict[str, Any]:
    found = kept.item(item_id) if isinstance(item_id, str) else None
    if found is None:
        raise ApiError(
            f"the item {item_id!r} is not known here; send the item itself", param=f"{where}.id"
        )
    return dict(found)
