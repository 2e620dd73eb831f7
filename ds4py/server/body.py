"""Bodies of requests: bytes -> JSON -> a checked model, or an ApiError that names the field.

Every protocol has three sets: the fields of its model, which are honoured; HARMLESS ones, which
change nothing about the answer; and REFUSED ones, with the reason. A field in none of them is
refused as unknown. `null` always means "not given".
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ds4py.server.errors import ApiError

MAX_DEPTH = 200
"""Levels of nesting; schemas of real tools have about ten."""


class Part(BaseModel):
    """Something inside a body. What is not named here is ignored: clients add their own."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class Body(Part):
    """A body. What is not named here must be in one of the sets."""

    HARMLESS: ClassVar[frozenset[str]] = frozenset()
    REFUSED: ClassVar[Mapping[str, str]] = {}
    """Field -> why, as the end of a sentence. Switched off (false, 0, empty) it is taken."""


class ModelBody(Body):
    """A body that names the model it is for."""

    model: str = ""


AnyBody = TypeVar("AnyBody", bound=Body)


def decode(data: bytes, encoding: str, limit: int) -> dict[str, Any]:
    """A JSON object from a request's bytes. Raises ApiError."""
    data = _unpacked(data, encoding, limit)
    if not data.strip():
        raise ApiError("the body is empty; send a JSON object")
    try:
        value = json.loads(data, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(f"the body is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ApiError(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise ApiError(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ApiError(f"the body is a JSON {_kind(value)}; send an object")
    _check_depth(value)
    return value


def checked(model: type[AnyBody], body: Mapping[str, Any], lenient: bool = False) -> AnyBody:
    """The body as its protocol's model. Raises ApiError naming the first field at fault.

    lenient: unknown fields are ignored.
    """
    given = {key: value for key, value in body.items() if value is not None}
    known = model.model_fields.keys() | model.HARMLESS | model.REFUSED.keys()
    for key in given:
        if key in model.REFUSED and given[key]:
            raise ApiError(f"{key} is not supported: {model.REFUSED[key]}", param=key)
        if key not in known and not lenient:
            raise ApiError(
                f"the field {key[:80]} is unknown; leave it out, or start the server --lenient",
                param=key,
            )
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        raise ApiError(_sentence(first), param=_path(first["loc"])) from None


def _unpacked(data: bytes, encoding: str, limit: int) -> bytes:
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "deflate"):
        raise ApiError(f"the content encoding {encoding} is not supported; use gzip or none", 415)
    try:
        unpacker = zlib.decompressobj(47 if encoding == "gzip" else 15)
        unpacked = unpacker.decompress(data, limit)
    except zlib.error as error:
        raise ApiError(f"the body is not valid {encoding}: {error}") from error
    if unpacker.unconsumed_tail:
        raise ApiError(f"the body is longer than {limit} bytes", 413)
    return unpacked


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ApiError(f"the key {twice!r} stands twice in one object", param=twice)
    return value


def _no_constant(name: str) -> None:
    raise ApiError(f"{name} is not JSON; send a number")


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ApiError(f"the body is nested more than {MAX_DEPTH} levels deep")
        inside: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inside += item.values()
            elif isinstance(item, list):
                inside += item
        level = [item for item in inside if isinstance(item, dict | list)]


def _sentence(error: Any) -> str:
    """pydantic's finding, with what was seen where that is short."""
    if error["type"] == "missing":
        return "is missing"
    text = str(error["msg"]).removeprefix("Value error, ")
    seen = error["input"]
    if isinstance(seen, str | int | float | bool) and len(str(seen)) <= 60:
        return f"{text}, not {json.dumps(seen)}"
    return f"{text}, not {_kind(seen)}"


def _path(location: tuple[int | str, ...]) -> str:
    """Field names and indices; pydantic puts names of alternatives (`str`, `list[...]`) between."""
    kept = [
        str(step)
        for step in location
        if isinstance(step, int) or (step.replace("_", "").isalnum() and step not in _TYPE_NAMES)
    ]
    return ".".join(kept)


_TYPE_NAMES = {"str", "int", "float", "bool", "dict", "list"}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "object", list: "array", str: "string", bool: "boolean"}
    return names.get(type(value), "number")
