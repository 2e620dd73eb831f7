"""The chat encoding against DeepSeek's own: vectors, worked examples, generated conversations."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4py.errors import PromptError
from ds4py.text import chat
from ds4py.text.messages import CONTROL_TOKENS, flatten, spelled

DATA = Path(__file__).parent / "data" / "encoding"
CASES = json.loads((DATA / "conversations.json").read_text(encoding="utf-8"))["cases"]

B, E = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


def vector(number: int) -> tuple[list[dict[str, Any]], str]:
    """DeepSeek's vector; where tools stand beside the messages they belong to the first one."""
    given = json.loads((DATA / f"test_input_{number}.json").read_text(encoding="utf-8"))
    prompt = (DATA / f"test_output_{number}.txt").read_text(encoding="utf-8")
    if isinstance(given, list):
        return given, prompt
    first, *others = given["messages"]
    return [{**first, "tools": given["tools"]}, *others], prompt


@pytest.mark.parametrize(("number", "thinking"), [(1, True), (2, True), (3, True), (4, False)])
def test_deepseek_vectors(number: int, thinking: bool) -> None:
    messages, prompt = vector(number)
    assert chat.render(messages, thinking=thinking) == prompt


@pytest.mark.parametrize("index", range(len(CASES)))
def test_generated_conversations(index: int) -> None:
    case = CASES[index]
    settings = {key: case[key] for key in ("thinking", "effort", "drop_thinking")}
    before = copy.deepcopy(case["messages"])
    if case["prompt"] is None:
        with pytest.raises(PromptError):
            chat.render(case["messages"], **settings)
    else:
        assert chat.render(case["messages"], **settings) == case["prompt"]
    assert case["messages"] == before


MAX_PREFIX = (
    "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be very thorough in "
    "your thinking and comprehensively decompose the problem to resolve the root cause, rigorously "
    "stress-testing your logic against all potential paths, edge cases, and adversarial scenarios."
    "\nExplicitly write out your entire deliberation process, documenting every intermediate step, "
    "considered alternative, and rejected hypothesis to ensure absolutely no assumption is left "
    "unchecked.\n\n"
)
ANSWERED = [
    SYSTEM,
    USER,
    {"role": "assistant", "content": "Hello", "reasoning_content": "greet"},
    {"role": "user", "content": "2+2?"},
]


@pytest.mark.parametrize(
    ("messages", "settings", "prompt"),
    [
        ([USER], {"thinking": False}, f"{B}<｜User｜>Hi<｜Assistant｜></think>"),
        ([SYSTEM, USER], {}, f"{B}Be brief.<｜User｜>Hi<｜Assistant｜><think>"),
        ([USER], {"effort": "max"}, f"{B}{MAX_PREFIX}<｜User｜>Hi<｜Assistant｜><think>"),
        ([USER], {"effort": "high"}, f"{B}<｜User｜>Hi<｜Assistant｜><think>"),
        ([USER], {"effort": "max", "thinking": False}, f"{B}<｜User｜>Hi<｜Assistant｜></think>"),
        (
            ANSWERED,
            {},
            f"{B}Be brief.<｜User｜>Hi<｜Assistant｜></think>Hello{E}"
            "<｜User｜>2+2?<｜Assistant｜><think>",
        ),
        (
            ANSWERED,
            {"drop_thinking": False},
            f"{B}Be brief.<｜User｜>Hi<｜Assistant｜><think>greet</think>Hello{E}"
            "<｜User｜>2+2?<｜Assistant｜><think>",
        ),
        (
            [{**SYSTEM, "response_format": {"a": 1}}, USER],
            {"thinking": False},
            f"{B}Be brief.\n\n## Response Format:\n\nYou MUST strictly adhere to the following "
            'schema to reply:\n{"a": 1}<｜User｜>Hi<｜Assistant｜></think>',
        ),
        ([{**USER, "task": "query"}], {"thinking": False}, f"{B}<｜User｜>Hi<｜query｜>"),
        (
            [{**USER, "task": "action"}],
            {},
            f"{B}<｜User｜>Hi<｜Assistant｜><think><｜action｜>",
        ),
        ([], {"effort": "max"}, B),
    ],
)
def test_worked_examples(
    messages: list[dict[str, Any]], settings: dict[str, Any], prompt: str
) -> None:
    assert chat.render(messages, **settings) == prompt


def call(name: str, arguments: Any, call_id: str = "") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


TOOL = {"type": "function", "function": {"name": "f"}}
CALLS = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="s" string="true">q</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="x" string="false">[2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def test_calls_and_results_in_the_order_of_the_calls() -> None:
    first, second = call("f", '{"x": 1, "s": "q"}', "a"), call("f", '{"x": [2]}', "b")
    messages = [
        {**SYSTEM, "tools": [TOOL]},
        USER,
        {"role": "assistant", "reasoning_content": "r1", "tool_calls": [first, second]},
        {"role": "tool", "tool_call_id": "b", "content": "B"},
        {"role": "tool", "tool_call_id": "a", "content": "A"},
        {"role": "user", "content": "and?"},
    ]
    assert chat.render(messages).endswith(
        '\n\n{"name": "f"}\n\nYou MUST strictly follow the above defined tool name and parameter '
        "schemas to invoke tool calls.\n"
        f"<｜User｜>Hi<｜Assistant｜><think>r1</think>{CALLS}{E}"
        "<｜User｜><tool_result>A</tool_result>\n\n<tool_result>B</tool_result>\n\nand?"
        "<｜Assistant｜><think>"
    )


def test_an_id_may_stand_on_the_function() -> None:
    inner = [{"function": {"id": i, "name": "f", "arguments": "{}"}} for i in ("a", "b")]
    messages = [
        {"role": "assistant", "tool_calls": inner},
        {"role": "tool", "tool_call_id": "b", "content": "B"},
        {"role": "tool", "tool_call_id": "a", "content": "A"},
    ]
    results = "<tool_result>A</tool_result>\n\n<tool_result>B</tool_result>"
    assert f"<｜User｜>{results}<｜Assistant｜>" in chat.render(messages)


def test_tools_on_a_user_are_lost_and_keep_no_reasoning() -> None:
    messages = [{**message, "tools": [TOOL]} for message in ANSWERED if message["role"] == "user"]
    system, _, answer, _ = ANSWERED
    with_tools = [system, messages[0], answer, messages[1]]
    assert chat.render(with_tools) == chat.render(ANSWERED)


def test_arguments_given_as_an_object_are_the_arguments() -> None:
    as_text, as_object = (
        chat.render([{"role": "assistant", "tool_calls": [call("f", arguments)]}])
        for arguments in ('{"x": [1, {"y": null}], "s": "t"}', {"x": [1, {"y": None}], "s": "t"})
    )
    assert as_object == as_text


@pytest.mark.parametrize(
    ("messages", "settings", "says"),
    [
        ("Hi", {}, "messages is a str"),
        ([3], {}, r"messages\[0\] is a int"),
        ([{"content": "Hi"}], {}, "role None"),
        ([USER, {"role": "alien"}], {}, r"messages\[1\] has the role 'alien'"),
        ([{"role": ["user"]}], {}, "has the role"),
        ([{**USER, "task": "sing"}], {}, "task 'sing'"),
        ([{"role": "user", "content": None}], {}, "content of type NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}, "need text"),
        ([{"role": "developer", "content": ""}], {}, "is empty"),
        ([{**SYSTEM, "tools": ["f"]}], {}, r"tools\[0\] has no function"),
        ([{**SYSTEM, "tools": "f"}], {}, "tools is a str"),
        ([{**SYSTEM, "tools": [{"function": {1, 2}}]}], {}, "as JSON"),
        ([{"role": "assistant", "tool_calls": [{}]}], {}, "names no function"),
        ([{"role": "assistant", "tool_calls": ["f"]}], {}, "tool_calls must be"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}], {}, "no arguments"),
        ([{"role": "assistant", "tool_calls": [call("f", "[1]")]}], {}, "no object"),
        ([{"role": "tool", "content": ["x"]}], {}, "part of type str"),
        ([{"role": "tool", "content": [{"type": "text", "text": 1}]}], {}, "holds no text"),
        ([USER], {"effort": "low"}, "effort is 'low'"),
    ],
)
def test_what_cannot_be_written_is_an_error(
    messages: Any, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(PromptError, match=says):
        chat.render(messages, **settings)


def test_flatten_joins_text_parts_and_refuses_others() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c"]
    assert flatten(parts) == "a\n\nb\n\nc"
    assert flatten("a") == "a"
    assert flatten(None) is None
    with pytest.raises(PromptError, match="image_url"):
        flatten([{"type": "image_url", "image_url": {"url": "u"}}])


def controls(messages: list[dict[str, Any]], **settings: Any) -> list[str]:
    return [s.text for s in chat.segments(messages, **settings) if s.control]


def test_control_segments_are_those_the_encoder_writes() -> None:
    messages = [
        {**SYSTEM, "tools": [TOOL]},
        {"role": "latest_reminder", "content": "now"},
        USER,
        {"role": "assistant", "reasoning_content": "r", "tool_calls": [call("f", '{"a": 1}')]},
    ]
    d = "｜DSML｜"
    in_tools = [d] * 9 + ["<think>", "<think>", "</think>", "</think>"]
    assert controls(messages) == [
        B,
        *in_tools,
        "<｜latest_reminder｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        *[d] * 6,
        E,
    ]


spelling = st.lists(st.sampled_from([*CONTROL_TOKENS, "a", " ", "\n", "<", "｜"]), max_size=5).map(
    "".join
)


@given(spelling, spelling, spelling, st.booleans())
def test_text_never_gives_control_segments(x: str, y: str, z: str, thinking: bool) -> None:
    def conversation(a: str, b: str, c: str) -> list[dict[str, Any]]:
        function = {"name": b, "arguments": json.dumps({c: a, a + "k": [b], "l": c})}
        return [
            {"role": "system", "content": a, "tools": [{"function": {"description": b}}]},
            {"role": "user", "content": b},
            {
                "role": "assistant",
                "reasoning_content": c,
                "content": a,
                "tool_calls": [{"function": function}],
            },
            {"role": "tool", "content": [{"type": "text", "text": b}, {"type": c}]},
            {"role": "latest_reminder", "content": a},
            {"role": "developer", "content": "d" + c, "response_format": {"type": b}},
        ]

    plain = controls(conversation("p", "q", "r"), thinking=thinking)
    missing = ["｜DSML｜"] * 2 * (3 - len({z, x + "k", "l"}))  # keys that came out equal
    assert sorted(controls(conversation(x, y, z), thinking=thinking) + missing) == sorted(plain)


@given(st.sampled_from(CASES))
def test_segments_are_the_prompt_cut_at_control_tokens(case: dict[str, Any]) -> None:
    if case["prompt"] is None:
        return
    settings = {key: case[key] for key in ("thinking", "effort", "drop_thinking")}
    segments = chat.segments(case["messages"], **settings)
    assert "".join(s.text for s in segments) == case["prompt"]
    assert all(s.text in CONTROL_TOKENS for s in segments if s.control)
    texts = [s for s in segments if not s.control]
    assert all(s.text for s in texts)
    assert all(a.control or b.control for a, b in itertools.pairwise(segments))


def test_what_a_model_wrote_stands_for_its_message_where_it_fits() -> None:
    calls = [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]
    wrote = {"tokens": [7, 8, 9], "thinking": True}
    answer = {"role": "assistant", "content": "", "tool_calls": calls, "sampled": wrote}
    tools = {"role": "system", "content": "s", "tools": [{"function": {"name": "f"}}]}
    turns = [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}]

    def found(messages: list[Any], **settings: Any) -> list[tuple[int, ...]]:
        return [s.tokens for s in chat.segments(messages, **settings) if s.tokens]

    assert found([tools, *turns]) == [(7, 8, 9)]
    assert found([tools, *turns], thinking=False) == []  # it did not reason there
    assert found(turns) == []  # without tools, old reasoning is dropped
    assert found(turns, drop_thinking=False) == [(7, 8, 9)]


def test_rendered_text_is_taken_apart_again() -> None:
    messages = [{"role": "user", "content": "a < b"}, {"role": "assistant", "content": "<b>"}]
    parts = chat.segments(messages, thinking=False)
    text = "".join(part.text for part in parts)
    again = spelled(text)
    assert "".join(part.text for part in again) == text
    assert [p for p in again if p.control] == [p for p in parts if p.control]
