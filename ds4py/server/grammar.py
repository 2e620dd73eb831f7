"""What an answer must follow, as grammars for llguidance: JSON schemas, and calls in DSML.

Reasoning is free; the grammar begins behind it. A schema that cannot be enforced is an error
before anything is generated: an answer is never silently unconstrained. Strings are written raw in
DSML, so one with a pattern or format is written as JSON instead, which the markup allows.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt

from ds4py.engine.sampling import Constraint
from ds4py.server.conversation import Choice, Conversation, Format, Tool
from ds4py.server.errors import ApiError
from ds4py.text.messages import DSML, END_THINK
from ds4py.text.tokenizer import Tokenizer

Schema = dict[str, Any]

log = logging.getLogger("ds4.server")

SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as the model writes it, and without endless white space."""
MAX_GRAMMAR = 4 << 20
"""Characters of a grammar; compiling takes time and memory in proportion."""
MOST_UNLISTED = 8
"""Most parameters, in a row, that a tool's schema does not ask for."""
_OPEN = ("additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref")
"""Keywords of a tool's schema that let it have parameters besides its properties."""
_PLAIN = {"type", "title", "description", "default", "examples", "$comment", "minLength"}
_PLAIN |= {"maxLength", "deprecated"}
"""Keywords of a string that raw text can follow."""


class Grammars:
    """Compiles grammars for one tokenizer. Used by several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._library: llguidance.LLTokenizer | None = None

    def constraint(
        self, conversation: Conversation, thinking: bool
    ) -> Callable[[], Constraint] | None:
        """Makes what an answer to the conversation must follow; None: it is free.

        Raises ApiError for schemas that cannot be enforced.
        """
        text = _grammar(conversation, self._token(DSML))
        if text is None:
            return None
        made = self._compiled(text, "response_format" if conversation.format else "tools")
        banned = {self._tokenizer.eos_id}
        if (dsml := self._tokenizer.control_id(DSML)) is not None:
            banned.add(dsml)
        end_think = self._tokenizer.control_id(END_THINK) if thinking else None
        return lambda: Follows(
            made.deep_copy(), self._vocab_size, self._tokenizer.eos_id, end_think, banned
        )

    def calls(self, conversation: Conversation) -> Constraint | None:
        """What calls must follow behind the token that begins their markup: there are tools of
        these names, with these parameters. None where that cannot be said."""
        several = conversation.parallel
        rules = _block(conversation.tools, self._token(DSML), several)
        try:
            made = self._compiled("\n".join(["start: calls", *rules]), "tools")
        except ApiError as error:
            log.warning("calls are written freely: %s", error)
            return None
        return Follows(made, self._vocab_size, self._tokenizer.eos_id, None, set())

    def _compiled(self, text: str, where: str) -> Any:
        """A matcher at the start of a grammar. Raises ApiError."""
        if len(text) > MAX_GRAMMAR:
            raise ApiError(f"the schemas make a grammar of {len(text)} characters; shorten them")
        made = llguidance.LLMatcher(self.library, llguidance.LLMatcher.grammar_from_lark(text))
        if made.is_error():
            said = made.get_error().strip().splitlines()[0]
            raise ApiError(f"the schema cannot be enforced: {said[:300]}", param=where)
        return made

    @property
    def library(self) -> llguidance.LLTokenizer:
        """The tokenizer as llguidance has it, made when first needed."""
        with self._lock:
            if self._library is None:
                wrapped = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer))
                self._library = llguidance.LLTokenizer(wrapped)
            return self._library

    def _token(self, text: str) -> str:
        """A control token in a grammar."""
        token = self._tokenizer.control_id(text)
        return _literal(text) if token is None else f"<[{token}]>"


class Follows:
    """A Constraint: free reasoning, unless there is none, then a grammar to its end."""

    def __init__(
        self,
        matcher: Any,
        vocab_size: int,
        eos: int,
        end_think: int | None,
        banned: set[int],
    ) -> None:
        """end_think: the token that ends reasoning; None where the answer begins at once.
        banned: what reasoning may not hold."""
        self._matcher = matcher
        self._eos = eos
        self._end_think = end_think
        self._only_eos = np.zeros(vocab_size, bool)
        self._only_eos[eos] = True
        self._reasoning = np.ones(vocab_size, bool)
        self._reasoning[list(banned)] = False

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        if self._end_think is not None:
            return self._reasoning
        if self._matcher.is_stopped() or self._matcher.is_error():
            return self._only_eos
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, bitorder="little").astype(bool)
        allowed = np.zeros_like(self._only_eos)
        n = min(len(bits), len(allowed))
        allowed[:n] = bits[:n]
        return allowed if allowed.any() else self._only_eos

    def accept(self, token: int) -> None:
        if self._end_think is not None:
            if token == self._end_think:
                self._end_think = None
        elif not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            log.warning("a grammar was left: %s", self._matcher.get_error())


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        everything = range(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [tokenizer.piece(token) for token in everything]
        self.special_token_ids = [token for token in everything if tokenizer.is_control(token)]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text)


def _grammar(conversation: Conversation, dsml: str) -> str | None:
    """The grammar of an answer in llguidance's Lark; None where anything may be said."""
    tools, choice = conversation.tools, conversation.choice
    content = _content(conversation.format) if conversation.format else None
    chosen = _chosen(tools, choice)
    forced = choice.kind in ("required", "named")
    strict = any(tool.strict for tool in chosen)
    if content is None and not forced and not strict and len(chosen) == len(tools):
        return None
    rules = []
    starts = []
    if chosen:
        starts.append("block")
        rules = _block(chosen, dsml, choice.kind == "required" or not forced)
        opening = r'"\n\n<"' if forced or content else r"/(?s:.*)\n\n</"
        rules.insert(0, f"block: {opening} {dsml} calls")
    if not forced:
        starts.append(content or "/(?s:.*)/")
    return "\n".join([f"start: {' | '.join(starts)}", *rules])


def _content(format_: Format) -> str:
    schema = {"type": "object"} if format_.schema is None else format_.schema
    return _json(schema)


def _chosen(tools: Sequence[Tool], choice: Choice) -> list[Tool]:
    """The tools that may be called."""
    if choice.kind == "none":
        return []
    return [tool for tool in tools if choice.names is None or tool.name in choice.names]


def _block(tools: list[Tool], dsml: str, several: bool) -> list[str]:
    """Rules of a block of calls, behind its opening bracket."""
    more = r' ("\n" call)*' if several else ""
    rules = [
        rf'calls: "tool_calls>\n" call{more} "\n</" {dsml} "tool_calls>"',
        "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
    ]
    for i, tool in enumerate(tools):
        head = _literal(f'invoke name="{tool.name}">')
        parameters = _strict(tool, dsml) if tool.strict else _loose(tool, dsml)
        rules.append(rf'call_{i}: "<" {dsml} {head} {parameters} "\n</" {dsml} "invoke>"')
    return rules


def _strict(tool: Tool, dsml: str) -> str:
    """The parameters in the schema's order, optional ones perhaps, each as its schema says."""
    root = _resolved(tool.parameters, tool.parameters)
    properties = root.get("properties", {})
    combined = {"anyOf", "oneOf", "allOf", "not", "if", "patternProperties"} & root.keys()
    if combined or not isinstance(properties, dict) or root.get("type", "object") != "object":
        raise ApiError(
            f"the strict tool {tool.name} needs an object with properties, not "
            f"{', '.join(sorted(combined)) or 'another type'}, at the top of its schema",
            param="tools",
        )
    required = root.get("required", [])
    definitions: Schema = {key: root[key] for key in ("$defs", "definitions") if key in root}
    definitions |= {k: tool.parameters[k] for k in ("$defs", "definitions") if k in tool.parameters}
    out = []
    for name, schema in properties.items():
        values = _values(schema, definitions, tool.parameters)
        one = f"({' | '.join(_parameter(name, value, dsml) for value in values)})"
        out.append(one if name in required else f"{one}?")
    return " ".join(out)


def _loose(tool: Tool, dsml: str) -> str:
    """Parameters of the names there are, with values of any kind: the required ones in the
    schema's order, others between them. Of any name where the schema does not list them all."""
    properties = tool.parameters.get("properties")
    required = tool.parameters.get("required")
    others: list[str] = []
    must: list[str] = []
    if not isinstance(properties, dict) or any(tool.parameters.get(key) for key in _OPEN):
        others.append(_any_value(None, {}, dsml))
    for name, schema in properties.items() if isinstance(properties, dict) else ():
        is_required = isinstance(required, list) and name in required
        (must if is_required else others).append(_any_value(name, schema, dsml))
    # A grammar cannot tell that one came before; their number is bounded, so that a call ends.
    between = f"({' | '.join(others)}){{0,{max(len(others), MOST_UNLISTED)}}}" if others else ""
    return f" {between} ".join(["", *must, ""]) if must else between


def _any_value(name: str | None, schema: Any, dsml: str) -> str:
    """A parameter with a value that is text where that is what its schema says, or JSON, or
    either."""
    text, anything = (True, r"/(?s:.*)<\//"), (False, f'{_json({})} "</"')
    kind = schema.get("type") if isinstance(schema, dict) else None
    values = [text] if kind == "string" else [anything] if kind else [text, anything]
    return f"({' | '.join(_parameter(name, value, dsml) for value in values)})"


def _parameter(name: str | None, value: tuple[bool, str], dsml: str) -> str:
    """A parameter, None: of any name; its value carries the bracket of the closing tag."""
    is_text, rule = value
    start, end = 'parameter name="', f'" string="{"true" if is_text else "false"}">'
    if name is None:
        head = rf"{_literal(start)} /[^\"<>\n]{{1,64}}/ {_literal(end)}"
    else:
        head = _literal(f"{start}{name}{end}")
    return rf'"\n<" {dsml} {head} {rule} {dsml} "parameter>"'


def _values(
    schema: Any, definitions: dict[str, Any], root: dict[str, Any]
) -> list[tuple[bool, str]]:
    """The ways to write a value of the schema: (whether as raw text, rule)."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ApiError(f"a property's schema is {json.dumps(schema)[:60]}", param="tools")
    schema = _resolved(schema, root)
    as_json = (False, f'{_json({**schema, **definitions})} "</"')
    fixed = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(fixed, list):
        texts = [text for text in fixed if isinstance(text, str)]
        others = [value for value in fixed if not isinstance(value, str)]
        out = [(True, f"({' | '.join(_literal(f'{text}</') for text in texts)})")] if texts else []
        return out + ([(False, f'{_json({"enum": others})} "</"')] if others else [])
    if schema.get("type") == "string":
        return [(True, _text(schema))] if schema.keys() <= _PLAIN else [as_json]
    variants = [schema.get(key) for key in ("anyOf", "oneOf")]
    kinds = schema.get("type")
    plain = isinstance(kinds, list) and "string" in kinds and schema.keys() <= _PLAIN
    for variant in (v for variants_ in variants if isinstance(variants_, list) for v in variants_):
        plain |= (
            isinstance(variant, dict)
            and variant.get("type") == "string"
            and (variant.keys() <= _PLAIN - {"minLength", "maxLength"})
        )
    return [(True, _text({})), as_json] if plain or not schema else [as_json]


def _text(schema: dict[str, Any]) -> str:
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if not low and high is None:
        return r"/(?s:.*)<\//"
    if not isinstance(low, int) or not (high is None or isinstance(high, int)):
        raise ApiError("minLength and maxLength must be integers", param="tools")
    return rf"/(?s:.{{{low},{'' if high is None else high}}})<\//"


def _resolved(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, Any]:
    """The schema that a local reference at its top stands for."""
    for _ in range(20):
        reference = schema.get("$ref")
        if reference is None:
            return schema
        found: Any = root
        for step in str(reference).removeprefix("#").strip("/").split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            break
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    raise ApiError(f"the reference {schema.get('$ref')!r} leads nowhere", param="tools")


def _json(schema: dict[str, Any]) -> str:
    """JSON of a schema, as a part of a grammar."""
    return f"%json {json.dumps({**schema, 'x-guidance': SPELLING})}"


def _literal(text: str) -> str:
    """A text as it is, in a grammar."""
    return json.dumps(text, ensure_ascii=False)
