"""The streaming parser: any cut gives the same events, and what it reads is written back."""

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4py.errors import PromptError
from ds4py.text import chat
from ds4py.text.events import (
    Content,
    Event,
    Reasoning,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from ds4py.text.messages import EOS
from ds4py.text.stream import StreamParser

D = "｜DSML｜"
OPEN, CLOSE = f"\n\n<{D}tool_calls>\n", f"\n</{D}tool_calls>"


def invoke(name: str, *parameters: str) -> str:
    return f'<{D}invoke name="{name}">\n' + "\n".join(parameters) + f"\n</{D}invoke>"


def parameter(name: str, value: str, string: str = "true") -> str:
    return f'<{D}parameter name="{name}" string="{string}">{value}</{D}parameter>'


def parser(thinking: bool = False, tools: bool = True) -> StreamParser:
    ids = itertools.count()
    return StreamParser(thinking, tools, new_id=lambda: f"id{next(ids)}")


def joined(events: Iterable[Event]) -> list[Event]:
    """The events with neighbouring deltas of one kind made one."""
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(event, Reasoning | Content) and type(last) is type(event):
            out[-1] = type(event)(last.text + event.text)
        elif isinstance(event, ToolCallArguments) and isinstance(last, ToolCallArguments):
            out[-1] = ToolCallArguments(event.index, last.text + event.text)
        else:
            out.append(event)
    return out


def parse(pieces: str | Sequence[str], **settings: bool) -> tuple[list[Event], dict[str, Any]]:
    p = parser(**settings)
    events = [event for piece in pieces for event in p.push(piece)]
    return joined(events + p.finish()), p.message()


def summary(text: str, **settings: bool) -> tuple[str, str, list[tuple[str, Any]]]:
    """Reasoning, content and calls of a text."""
    _, message = parse([text], **settings)
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message.get("tool_calls", [])
    ]
    return message.get("reasoning_content", ""), message["content"], calls


def test_the_events_of_a_whole_answer() -> None:
    text = (
        "why</think>Now:" + OPEN + invoke("f", parameter("a", 'x"\n'), parameter("b", "[1]", "no"))
    )
    events, message = parse([text + CLOSE], thinking=True)
    arguments = '{"a": "x\\"\\n", "b": [1]}'
    assert events == [
        Reasoning("why"),
        Content("Now:"),
        ToolCallStart(0, "id0", "f"),
        ToolCallArguments(0, arguments),
        ToolCallEnd(0, "f", arguments),
    ]
    assert message == {
        "role": "assistant",
        "content": "Now:",
        "reasoning_content": "why",
        "tool_calls": [
            {"id": "id0", "type": "function", "function": {"name": "f", "arguments": arguments}}
        ],
    }


def test_ids_differ() -> None:
    p = StreamParser(thinking=False)
    p.push(invoke("f") * 2)
    first, second = p.message()["tool_calls"]
    assert first["id"] != second["id"]


F = ("f", {"a": "v"})
GOOD = invoke("f", parameter("a", "v"))


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        pytest.param("a < b </b> <｜x", "a < b </b> <｜x", [], id="no tags"),
        pytest.param("end\n\n", "end\n\n", [], id="line feeds at the end"),
        pytest.param("x\n\n\n" + OPEN + GOOD + CLOSE, "x\n\n\n", [F], id="two line feeds are ours"),
        pytest.param("x" + GOOD, "x", [F], id="no opening tag, no closing tag"),
        pytest.param("x\n" + GOOD + CLOSE, "x", [F], id="no opening tag"),
        pytest.param(OPEN + GOOD, "", [F], id="no closing tag"),
        pytest.param(OPEN + GOOD[:-8], "", [F], id="closing tag of the call cut"),
        pytest.param(OPEN + GOOD.split("\n</")[0], "", [F], id="call not closed"),
        pytest.param((OPEN + GOOD + CLOSE).replace("｜", "|"), "", [F], id="ASCII bars"),
        pytest.param(
            OPEN + GOOD.replace(f"</{D}parameter>", "") + CLOSE, "", [F], id="value not closed"
        ),
        pytest.param(
            f'{OPEN}<{D}invoke name="f"><{D}parameter name="a" string="true">v',
            "",
            [F],
            id="cut in a value",
        ),
        pytest.param(
            f'{OPEN}<{D}invoke name="f"><{D}parameter name="a" string="true">v</{D}para',
            "",
            [F],
            id="cut in the tag that closes a value",
        ),
        pytest.param("x" + OPEN + f"<{D}invoke name=", "x", [], id="cut before the name is known"),
        pytest.param("x" + OPEN, "x", [], id="cut after the opening tag"),
        pytest.param("x" + OPEN[:-6], "x", [], id="cut in the opening tag"),
        pytest.param(f"x{OPEN}</{D}tool_calls>y", "xy", [], id="empty block"),
        pytest.param(OPEN + GOOD + GOOD + CLOSE, "", [F, F], id="no white space between calls"),
        pytest.param(OPEN + GOOD + " \n\n " + GOOD + CLOSE, "", [F, F], id="more white space"),
        pytest.param(
            (OPEN + GOOD + CLOSE + "\n\n") * 2 + "bye", "\n\nbye", [F, F], id="two blocks and text"
        ),
        pytest.param(OPEN + GOOD + CLOSE + "\n \n", "", [F], id="white space after the block"),
        pytest.param(OPEN + GOOD + "\nbye", "\nbye", [F], id="text after a call"),
        pytest.param(
            f'<{D}invoke name="f">{parameter("a", "v")}{GOOD}', "", [F, F], id="next call begins"
        ),
        pytest.param(
            f"< {D}invoke> <{D}invoke name=f/x", f"< {D}invoke> ", [], id="not quite a tag"
        ),
        pytest.param(
            f'<{D}invoke name="x{GOOD}', f'<{D}invoke name="x', [F], id="a tag begins inside a tag"
        ),
        pytest.param(f'a <{D}tool_calls>" b', f'a <{D}tool_calls>" b', [], id="named in prose"),
        pytest.param(
            f'<{D} invoke  name = "f" ><{D}parameter name=\'a\' type="x" string="TRUE" >3'
            f"</{D} parameter ></{D}invoke >",
            "",
            [("f", {"a": "3"})],
            id="spaces, quotes, attributes",
        ),
        pytest.param(
            f'<{D}invoke name="f">\n{{"a": "v"}}\n</{D}invoke>', "", [F], id="arguments as JSON"
        ),
        pytest.param(
            f'<{D}invoke name="f">\nv\n</{D}invoke>',
            "",
            [("f", {})],
            id="text instead of arguments",
        ),
        pytest.param(invoke("f"), "", [("f", {})], id="no parameters"),
        pytest.param(
            invoke("f", parameter("a", "v"), parameter("a", "w")), "", [F], id="parameter repeated"
        ),
        pytest.param(
            invoke("f", parameter("q\"u'o>te", "v")),
            "",
            [("f", {"q\"u'o>te": "v"})],
            id="quotes in a name",
        ),
    ],
)
def test_what_models_write(text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    assert summary(text) == ("", content, calls)
    assert parse(text) == parse([text])


def test_a_tag_that_does_not_close_becomes_text() -> None:
    p = parser()
    start = f'<{D}invoke name="'
    assert p.push(start + "x" * 4000) == []
    assert joined(p.push("x" * 200)) == [Content(start + "x" * 4200)]
    assert p.push(start + "x") == []
    assert joined(p.push(f"<{D}inv")) == [Content(start + "x")]
    assert joined(p.push("y> z")) == [Content(f"<{D}invy> z")]


@pytest.mark.parametrize(
    ("value", "string", "read"),
    [
        ("3", "false", 3),
        (" [1,\n2] ", "false", [1, 2]),
        ("null", "false", None),
        ('"q"', "false", "q"),
        ("01", "false", "01"),
        ("", "false", ""),
        (" word ", "false", " word "),
        ("NaN", "false", "NaN"),
        ('"\\ud800"', "false", '"\\ud800"'),
        ("[" * 100_000, "false", "[" * 100_000),
        ("3", "true", "3"),
        ("{}", "true", "{}"),
        ("", "true", ""),
        ("&lt;b&gt; &amp;quot;", "true", "&lt;b&gt; &amp;quot;"),
        (f"</{D}invoke>\n</{D}tool_calls> <{D}parameter", "true", None),
        ("</|DSML|parameter>", "true", "</|DSML|parameter>"),
        ("\n \\n \x00 \u2028 🌍\n", "true", "\n \\n \x00 \u2028 🌍\n"),
    ],
)
def test_values(value: str, string: str, read: Any) -> None:
    expected = value if read is None and string == "true" else read
    text = invoke("f", parameter("a", value, string)) + CLOSE
    assert summary(text) == ("", "", [("f", {"a": expected})])


@pytest.mark.parametrize(("value", "read"), [("3", 3), ("true", True), ("word", "word")])
def test_values_without_the_attribute(value: str, read: Any) -> None:
    text = invoke("f", f'<{D}parameter name="a">{value}</{D}parameter>')
    assert summary(text) == ("", "", [("f", {"a": read})])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("never closed\n\n", ("never closed\n\n", "", [])),
        ("r</thi", ("r</thi", "", [])),
        ("</think>a", ("", "a", [])),
        ("r</think>a</think>b", ("r", "a</think>b", [])),
        ("r\n\n</think>\n\na", ("r\n\n", "\n\na", [])),
        ("r" + OPEN + GOOD + CLOSE, ("r", "", [F])),
        ("r" + OPEN + GOOD + CLOSE + "s</think>a", ("rs", "a", [F])),
        (f"use <{D}tool_calls> as told</think>a", (f"use <{D}tool_calls> as told", "a", [])),
        ("r</think>" + OPEN + GOOD + CLOSE, ("r", "", [F])),
    ],
)
def test_reasoning(text: str, expected: tuple[str, str, list[tuple[str, Any]]]) -> None:
    assert summary(text, thinking=True) == expected
    assert parse(text, thinking=True) == parse([text], thinking=True)


@pytest.mark.parametrize("thinking", [False, True])
def test_without_tools_calls_are_text(thinking: bool) -> None:
    text = "x" + OPEN + GOOD + CLOSE + f"\n\n<{D}tool"
    expected = (text, "", []) if thinking else ("", text, [])
    assert summary(text, thinking=thinking, tools=False) == expected


@pytest.mark.parametrize(
    ("pieces", "handed_on"),
    [
        (["abc"], [Content("abc")]),
        (["a", "\n"], [Content("a")]),
        (["a\n\n\n"], [Content("a\n")]),
        (["a<"], [Content("a")]),
        (["a\n\n<｜DS"], [Content("a")]),
        (["a<", "b"], [Content("a"), Content("<b")]),
        (["a\n\n<｜", "DSX"], [Content("a"), Content("\n\n<｜DSX")]),
        ([f'<{D}invoke name="f"'], []),
        ([f'<{D}invoke name="f">'], [ToolCallStart(0, "id0", "f")]),
        (
            [f'<{D}invoke name="f"><{D}parameter name="a" string="true">', "v", "w\n"],
            [ToolCallStart(0, "id0", "f"), ToolCallArguments(0, '{"a": "vw')],
        ),
        (
            [GOOD],
            [
                ToolCallStart(0, "id0", "f"),
                ToolCallArguments(0, '{"a": "v"}'),
                ToolCallEnd(0, "f", '{"a": "v"}'),
            ],
        ),
    ],
)
def test_held_back_no_longer_than_needed(pieces: list[str], handed_on: list[Event]) -> None:
    p = parser()
    events = [event for piece in pieces for event in p.push(piece)]
    if isinstance(handed_on[0] if handed_on else None, ToolCallStart):
        events = joined(events)
    assert events == handed_on


def test_reasoning_is_held_back_no_longer_than_needed() -> None:
    p = StreamParser(thinking=True, tools=False)
    assert p.push("a\n\n") == [Reasoning("a\n\n")]
    assert p.push("b</thi") == [Reasoning("b")]
    assert p.push("s") == [Reasoning("</this")]
    assert p.push("</think>c") == [Content("c")]


SOUP = [
    *("<", ">", "</", "\n", " ", "a", '"', "v1", "é🌍", "think>", "</think>", "{", "}", "[1]"),
    *("｜", "|", "DSML", D, "tool_calls", "invoke", "parameter", ' name="f"', ' string="true"'),
    *(OPEN, CLOSE, f"<{D}tool_calls>", f'<{D}invoke name="g">', f"</{D}invoke>"),
    *(f'<{D}parameter name="k" string="true">', f'<{D}parameter name="j" string="false">'),
    *(f'<{D}parameter name="m">', f"</{D}parameter>", GOOD, GOOD.replace("｜", "|")),
]
soup = st.lists(st.sampled_from(SOUP), max_size=14).map("".join)


def cut(text: str, places: Iterable[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(edges)]


@given(soup, st.lists(st.integers(0, 999), max_size=4), st.booleans(), st.booleans())
def test_events_do_not_depend_on_the_cut(
    text: str, places: list[int], thinking: bool, tools: bool
) -> None:
    whole = parse([text], thinking=thinking, tools=tools)
    assert parse(cut(text, places), thinking=thinking, tools=tools) == whole
    assert parse(text, thinking=thinking, tools=tools) == whole


@given(soup, st.booleans())
def test_calls_are_whole_and_valid(text: str, thinking: bool) -> None:
    events, message = parse([text], thinking=thinking)
    starts = [e for e in events if isinstance(e, ToolCallStart)]
    ends = [e for e in events if isinstance(e, ToolCallEnd)]
    assert [e.index for e in starts] == [e.index for e in ends] == list(range(len(starts)))
    for end in ends:
        deltas = [
            e.text for e in events if isinstance(e, ToolCallArguments) and e.index == end.index
        ]
        assert "".join(deltas) == end.arguments
        assert isinstance(json.loads(end.arguments), dict)
    calls = message.get("tool_calls", [])
    assert [c["function"]["arguments"] for c in calls] == [e.arguments for e in ends]


plain = st.text(max_size=20) | st.lists(
    st.sampled_from(["<", "</", ">", "\n", "｜", "<｜", "DSML", "tool_calls", "é", "{", "&amp;"]),
    max_size=8,
).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner | plain, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=5,
)
names = st.text(st.characters(blacklist_characters='<>"', blacklist_categories=["Cs"]), max_size=9)
raw = st.lists(
    st.sampled_from(["a", "\n", f"</{D}invoke>", "<", f"<{D}parameter", '"', "\\", "</|DSML|"]),
    max_size=6,
).map("".join)
arguments = st.dictionaries(names, values | plain | raw, max_size=3).map(json.dumps)
answers = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": plain, "reasoning_content": plain},
    optional={
        "tool_calls": st.lists(
            st.fixed_dictionaries({"name": names, "arguments": arguments | plain}).map(
                lambda function: {"function": function}
            ),
            min_size=1,
            max_size=3,
        )
    },
)


@given(answers, st.booleans(), st.lists(st.integers(0, 999), max_size=4))
def test_what_is_read_is_written_back(
    answer: dict[str, Any], thinking: bool, places: list[int]
) -> None:
    """Well-formed answers, as DeepSeek's own parser has it: no control token in their text."""
    before = [
        {"role": "system", "content": "s", "tools": [{"function": {"name": "f"}}]},
        {"role": "user", "content": "u"},
    ]
    if not thinking:
        answer = {k: v for k, v in answer.items() if k != "reasoning_content"}
    prompt = chat.render(before, thinking=thinking)
    try:
        whole = chat.render([*before, answer], thinking=thinking)
    except PromptError:  # arguments that are JSON but no object
        return
    written = whole.removeprefix(prompt).removesuffix(EOS)
    p = parser(thinking)
    for piece in cut(written, places):
        p.push(piece)
    p.finish()
    assert chat.render([*before, p.message()], thinking=thinking) == whole
    assert p.message()["content"] == answer["content"]
