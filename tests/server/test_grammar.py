"""Whatever the logits say, a constrained answer follows its schema, and can be read back."""

import json
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4py import SamplingOptions, assets
from ds4py.engine.sampling import Sampler
from ds4py.server.conversation import Choice, Conversation, Format, Tool
from ds4py.server.errors import ApiError
from ds4py.server.grammar import Grammars
from ds4py.text import tokenizer as tokenizers
from ds4py.text.events import Content, Reasoning, ToolCallEnd
from ds4py.text.stream import StreamParser
from tests.server.scripted import segments

TOKENIZER = tokenizers.load(assets.path("models", "tiny"))
VOCAB = TOKENIZER.vocab_size + 32  # a model's table may be longer than its tokenizer's
GRAMMARS = Grammars(TOKENIZER, VOCAB)
USER = [{"role": "user", "content": "x"}]

scalars = st.sampled_from(
    [
        {"type": "string", "maxLength": 6},
        {"type": "string", "minLength": 1, "maxLength": 3},
        {"type": "string", "enum": ["a", 'say "hi"', "ü</x>"]},
        {"type": "string", "pattern": "^[a-c]{2,4}$"},
        {"type": "string", "format": "date"},
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "boolean"},
        {"type": "null"},
        {"const": 7},
        {"enum": ["x", 1, None]},
        {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        {"$ref": "#/$defs/level"},
    ]
)
values = st.one_of(
    scalars,
    st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, scalars),
    st.builds(lambda item: {**OBJECT, "properties": {"in": item}, "required": ["in"]}, scalars),
)
OBJECT: Any = {"type": "object", "additionalProperties": False}
schemas = st.builds(
    lambda properties, n: {
        **OBJECT,
        "properties": properties,
        "required": sorted(properties)[:n],
        "$defs": {"level": {"type": "string", "enum": ["low", "high"]}},
    },
    st.dictionaries(st.sampled_from(["city", "n", "é", "a b"]), values, min_size=1, max_size=3),
    st.integers(0, 3),
)


def write(conversation: Conversation, seed: int, thinking: bool = False, n: int = 400) -> str:
    """An answer drawn from noise under the constraint; fails when it does not end."""
    make = GRAMMARS.constraint(conversation, thinking)
    assert make is not None
    noise = np.random.default_rng(seed)
    sampler = Sampler(SamplingOptions(seed=seed, min_p=0), [], VOCAB, make())
    out = []
    for position in range(n):
        logits = noise.normal(size=VOCAB).astype(np.float32) * 4
        if thinking and position == 5:
            logits[TOKENIZER.control_id("</think>")] += 100
        token = int(sampler(mx.array(logits), position))
        if token == TOKENIZER.eos_id:
            return TOKENIZER.decode(out)
        out.append(token)
    raise AssertionError(TOKENIZER.decode(out))


def calls_of(text: str, thinking: bool = False) -> tuple[list[tuple[str, Any]], str]:
    """The calls of an answer, and its content."""
    parser = StreamParser(thinking=thinking)
    events = parser.push(text) + parser.finish()
    calls = [(e.name, json.loads(e.arguments)) for e in events if isinstance(e, ToolCallEnd)]
    return calls, "".join(e.text for e in events if isinstance(e, Content))


@settings(max_examples=40)
@given(schemas, st.integers(0, 10**6))
def test_content_follows_a_schema(schema: Any, seed: int) -> None:
    text = write(Conversation(USER, format=Format(schema)), seed)
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=40)
@given(schemas, st.integers(0, 10**6), st.booleans())
def test_arguments_of_strict_tools_follow_theirs(schema: Any, seed: int, thinking: bool) -> None:
    tools = [Tool("look", None, schema, strict=True), Tool("other", None, schema, strict=True)]
    asked = Conversation(USER, tools, Choice("named", ("look",)))
    calls, content = calls_of(write(asked, seed, thinking), thinking)
    assert [name for name, _ in calls] == ["look"] and content == ""
    jsonschema.validate(calls[0][1], schema)


def test_required_calls_come_in_any_number() -> None:
    schema = {**OBJECT, "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}}
    tools = [Tool("a", None, schema, strict=True), Tool("b", None, schema)]
    numbers = set()
    for seed in range(12):
        asked = Conversation(USER, tools, Choice("required"))
        try:
            calls, _ = calls_of(write(asked, seed))
        except AssertionError:
            continue  # JSON of any kind, drawn from noise, need not end
        assert calls and {name for name, _ in calls} <= {"a", "b"}
        numbers.add(len(calls))
    assert numbers


def called(name: str, **texts: str) -> str:
    """What follows the token that begins a block of one call."""
    parameters = [
        f'\n<｜DSML｜parameter name="{key}" string="true">{text}</｜DSML｜parameter>'
        for key, text in texts.items()
    ]
    invoke = f'<｜DSML｜invoke name="{name}">{"".join(parameters)}\n</｜DSML｜invoke>'
    return f"tool_calls>\n{invoke}\n</｜DSML｜tool_calls>"


def is_allowed(tools: list[Tool], text: str) -> bool:
    """Whether a call that has begun may go on, and end, so."""
    constraint = GRAMMARS.calls(Conversation(USER, tools))
    assert constraint is not None
    for token in [*TOKENIZER.encode(segments(text)), TOKENIZER.eos_id]:
        allowed = constraint.allowed()
        if allowed is None or not allowed[token]:
            return False
        constraint.accept(token)
    return True


def test_a_call_that_begins_is_of_a_tool_and_complete() -> None:
    properties = {"a": {"type": "string"}, "b": {"type": "string"}, "c": {}}
    closed = {**OBJECT, "properties": properties, "required": ["b"]}
    tools = [Tool("f.g", None, closed), Tool("open", None, {"type": "object"})]
    for text in (
        called("f.g", b="&lt;<b>"),
        called("f.g", c="2", b="1", a=""),
        called("open"),
        called("open", other="x"),
    ):
        assert is_allowed(tools, text)
    for text in (
        called("g", b="1"),
        called("f.g", a="1"),
        called("f.g", b="1", other="2"),
        called("open", **{"a<b": "x"}),
        "tool_calls>\n</｜DSML｜tool_calls>",
        called("f.g", b="1") + "\nMore.",
    ):
        assert not is_allowed(tools, text)


def test_without_tools_to_call_no_markup_is_written() -> None:
    for choice in (Choice("none"), Choice("auto", ())):
        asked = Conversation(USER, [Tool("f", None, {})], choice)
        make = GRAMMARS.constraint(asked, thinking=False)
        assert make is not None
        allowed = make().allowed()
        assert allowed is not None
        controls = {t for t in np.flatnonzero(allowed).tolist() if TOKENIZER.is_control(t)}
        assert controls == {TOKENIZER.eos_id}
    assert GRAMMARS.constraint(Conversation(USER, [Tool("f", None, {})]), thinking=False) is None


def test_reasoning_is_free_and_must_end() -> None:
    text = write(Conversation(USER, format=Format(None)), 3, thinking=True, n=3000)
    parser = StreamParser(thinking=True)
    events = parser.push(text) + parser.finish()
    assert any(isinstance(event, Reasoning) for event in events)
    assert isinstance(json.loads(calls_of(text, thinking=True)[1]), dict)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "nothing"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}},
        {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
        {"type": "string", "pattern": "("},
        {"anyOf": "x"},
    ],
)
def test_what_cannot_be_enforced_is_refused(schema: Any) -> None:
    with pytest.raises(ApiError) as caught:
        GRAMMARS.constraint(Conversation(USER, format=Format(schema)), thinking=False)
    assert caught.value.status == 400 and caught.value.param == "response_format"
    tool = Tool("f", None, {"type": "object", "properties": {"p": schema}}, strict=True)
    with pytest.raises(ApiError):
        GRAMMARS.constraint(Conversation(USER, [tool]), thinking=False)


def test_a_recursive_schema_is_followed() -> None:
    node: Any = {
        **OBJECT,
        "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["next"],
    }
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    jsonschema.validate(json.loads(write(Conversation(USER, format=Format(schema)), 1)), schema)
