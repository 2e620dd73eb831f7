"""DSML, the markup DeepSeek V4 writes tool calls in: how calls are written, how tags are read.

The wording is the model's protocol, from DeepSeek's encoding_dsv4.py (MIT licence, copyright
DeepSeek) byte for byte. Arguments are never escaped: a string value is raw text up to the tag
that closes it. The reader's half answers one question, "does this tag stand here?", for text of
which the end may still be missing; `stream` asks it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ds4py.errors import PromptError
from ds4py.text.messages import DSML, END_THINK

TOOLS_BLOCK = """## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), \
pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning \
inside <think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
"""What comes before the schemas. Its tags are control tokens: the encoder wrote them."""

TOOLS_END = (
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke "
    "tool calls.\n"
)


def to_json(value: Any) -> str:
    """JSON in the model's spelling: spaces after `,` and `:`, characters unescaped."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise PromptError(f"a value cannot be written as JSON: {exc}.") from exc


def tool_schemas(tools: Any) -> str:
    """One line of JSON per tool, from OpenAI tool objects. Raises PromptError."""
    if not isinstance(tools, (list, tuple)):
        raise PromptError(f"tools is a {type(tools).__name__}; need a list of tool objects.")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or "function" not in tool:
            raise PromptError(f"tools[{index}] has no function; need an object with one.")
    return "\n".join(to_json(tool["function"]) for tool in tools)


def call_parts(calls: Any) -> Iterable[tuple[str, bool]]:
    """The calls of an assistant as (text, written by the encoder) pairs; joined, the markup.

    Every `｜DSML｜` in a pair marked True is a control token; names and values are plain text even
    where they spell one. Raises PromptError for a call without a name or arguments.
    """
    yield f"<{DSML}tool_calls>\n", True
    for index, call in enumerate(_functions(calls)):
        yield ("\n" if index else "") + f"<{DSML}invoke", True
        yield f' name="{call["name"]}">\n', False
        for number, (key, value) in enumerate(_parameters(call["arguments"], index)):
            is_text = isinstance(value, str)
            yield ("\n" if number else "") + f"<{DSML}parameter", True
            yield f' name="{key}" string="{"true" if is_text else "false"}">', False
            yield value if is_text else to_json(value), False
            yield f"</{DSML}parameter>", True
        yield f"\n</{DSML}invoke>", True
    yield f"\n</{DSML}tool_calls>", True


def _functions(calls: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise PromptError(f"tool_calls is a {type(calls).__name__}; need a list of calls.")
    functions = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PromptError(f"tool_calls[{index}] names no function; need function.name.")
        if "arguments" not in function:
            raise PromptError(
                f"tool_calls[{index}] has no arguments; need function.arguments as JSON text."
            )
        functions.append(function)
    return functions


def _parameters(arguments: Any, index: int) -> Iterable[tuple[str, Any]]:
    """Name and value of each argument, in order.

    Text that is not JSON stands as one parameter named "arguments", as DeepSeek's encoder has it.
    An object that was never made text is taken as the arguments themselves.
    """
    if isinstance(arguments, Mapping):
        return list(arguments.items())
    try:
        values = json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        return [("arguments", arguments)]
    if not isinstance(values, dict):
        raise PromptError(
            f"tool_calls[{index}] has arguments that are JSON but no object; need {{...}}."
        )
    return list(values.items())


NO: Final = -1
"""The tag does not stand here. (None: the text ends before that is decided.)"""

_MAX_HEADER = 4096
"""Characters after which a tag that never closes is taken for text."""

_SPACES = " \t\r\n"

Pattern = tuple[tuple[str, bool], ...]
"""What a tag is made of: (allowed characters, any number of them) for each place."""


def _literal(text: str) -> Pattern:
    return tuple((character, False) for character in text)


def _tag(start: str, name: str, end: str = "", bars: str = "｜|") -> Pattern:
    """A tag; models write the ASCII bar, too, and white space inside tags."""
    marker = (*_literal(start), (bars, False), *_literal("DSML"), (bars, False))
    named = (*marker, (_SPACES, True), *_literal(name)) if name else marker
    return (*named, (_SPACES, True), *_literal(end)) if end else named


OPEN_MARKER: Final = _tag("<", "")
CLOSE_MARKER: Final = _tag("</", "")
OPEN_CALLS: Final = _tag("<", "tool_calls", ">")
CLOSE_CALLS: Final = _tag("</", "tool_calls", ">")
OPEN_INVOKE: Final = _tag("<", "invoke")
CLOSE_INVOKE: Final = _tag("</", "invoke", ">")
OPEN_PARAMETER: Final = _tag("<", "parameter")
CLOSE_PARAMETER: Final = _tag("</", "parameter", ">", bars="｜")
CLOSE_PARAMETER_ASCII: Final = _tag("</", "parameter", ">")
"""For a value that began with ASCII bars only: elsewhere that spelling is part of the value."""
CLOSE_REASONING: Final = _literal(END_THINK)


def match(pattern: Pattern, text: str, at: int) -> int | None:
    """Where the tag that starts at `at` ends; NO; or None when the text ends inside it."""
    for characters, repeated in pattern:
        if repeated:
            at = skip_spaces(text, at)
            continue
        if at == len(text):
            return None
        if text[at] not in characters:
            return NO
        at += 1
    return at


def skip_spaces(text: str, at: int) -> int:
    """The first position from `at` on that holds no white space."""
    while at < len(text) and text[at] in _SPACES:
        at += 1
    return at


class Header(NamedTuple):
    """The attributes of an invoke or parameter tag, and where the tag ends."""

    name: str
    is_text: bool  # the attribute `string` is "true"
    ascii_bars: bool
    end: int


_ATTRIBUTE = r"""\s+([\w-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"'<>=]+)"""
_ATTRIBUTES = re.compile(f"(?:{_ATTRIBUTE})+\\s*")
_EACH_ATTRIBUTE = re.compile(_ATTRIBUTE)
_NEXT_TAG = re.compile(r"</|<[｜|]")
_WRITTEN = re.compile(r'\s+name="(.*)" string="(true|false)"\s*', re.DOTALL)
_NAME_ONLY = re.compile(r'\s+name="(.*)"\s*', re.DOTALL)


def match_header(pattern: Pattern, text: str, at: int) -> Header | int | None:
    """The tag with attributes that starts at `at`; NO; or None when the text ends inside it.

    Names are not escaped either, so a `>` ends the tag only where what precedes it is complete.
    """
    start = match(pattern, text, at)
    if start is None or start == NO:
        return start
    limit = start + _MAX_HEADER
    next_tag = _NEXT_TAG.search(text, start, limit)
    stop = next_tag.start() if next_tag else limit
    end = text.find(">", start, stop)
    while end >= 0:
        found = _attributes(text[start:end])
        if found is not None:
            return Header(*found, text[at + 1] == "|", end + 1)
        end = text.find(">", end + 1, stop)
    return NO if next_tag or len(text) >= limit else None


def _attributes(header: str) -> tuple[str, bool] | None:
    """(name, string) of a tag's inside: as the encoder writes it, else as models vary it."""
    written = _WRITTEN.fullmatch(header)
    if written:
        return written[1], written[2] == "true"
    if not _ATTRIBUTES.fullmatch(header):
        name_only = _NAME_ONLY.fullmatch(header)
        return (name_only[1], False) if name_only else None
    values = dict(_EACH_ATTRIBUTE.findall(header))
    if "name" not in values:
        return None
    return _unquoted(values["name"]), _unquoted(values.get("string", "false")).lower() == "true"


def _unquoted(value: str) -> str:
    return value[1:-1] if value[0] in "\"'" else value


def value_json(value: str) -> str:
    """The raw value of a parameter that is not marked as text: itself where it is JSON, or quoted.

    What no prompt could hold again (half a surrogate pair) and constants that are not JSON (NaN,
    Infinity) do not count as JSON.
    """
    return to_json(value) if _parsed(value) is _NOT_JSON else value.strip()


def object_json(text: str) -> str:
    """`text` where it is a JSON object, else the empty object."""
    return text.strip() if isinstance(_parsed(text), dict) else "{}"


_NOT_JSON = object()


def _parsed(text: str) -> Any:
    try:
        parsed = json.loads(text, parse_constant=_refuse_constant)
        to_json(parsed).encode()
    except (ValueError, RecursionError, PromptError):
        return _NOT_JSON
    return parsed


def _refuse_constant(name: str) -> None:
    raise ValueError(name)
