"""DSML, the markup DeepSeek V4 writes tool calls in: the tools block, and calls as text.

The wording is the model's protocol, from DeepSeek's encoding_dsv4.py (MIT licence, copyright
DeepSeek) byte for byte. Arguments are never escaped: a string value is raw text up to the tag
that closes it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ds4py.errors import PromptError
from ds4py.text.messages import DSML

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
