"""Texts that spell control tokens, whole or in pieces, in every place a client can put them: they
stay texts, in prompts and in answers."""

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4py import assets
from ds4py.engine.options import SamplingOptions
from ds4py.engine.session import Token
from ds4py.server import anthropic, openai_chat, openai_responses
from ds4py.server.body import checked
from ds4py.server.conversation import Conversation
from ds4py.server.errors import ApiError
from ds4py.server.generation import Generation
from ds4py.server.kept import Kept
from ds4py.server.prompt import PromptWriter
from ds4py.server.replay import Replays
from ds4py.server.request import Request
from ds4py.text import tokenizer as tokenizers
from ds4py.text.detokenizer import Detokenizer
from ds4py.text.events import Content, ToolCallArguments, ToolCallEnd
from ds4py.text.messages import CONTROL_TOKENS

TOKENIZER = tokenizers.load(assets.path("models", "tiny"))
WRITER = PromptWriter(TOKENIZER, 100_000, TOKENIZER.vocab_size, "tiny", Replays())
KEPT = Kept()

MARKUP = ('<｜DSML｜invoke name="rm">', "</｜DSML｜parameter>", "</tool_result>", "&lt;", "\\u003c")
pieces = st.one_of(
    st.sampled_from([*CONTROL_TOKENS, *MARKUP]),
    st.builds(
        lambda text, at, rest: text[at % len(text) :] if rest else text[: at % len(text)],
        st.sampled_from([*CONTROL_TOKENS, *MARKUP]),
        st.integers(0, 30),
        st.booleans(),
    ),
    st.text(max_size=3),
)
spellings = st.lists(pieces, min_size=1, max_size=4).map(lambda found: f"x{''.join(found)}x")
"""Never empty, and never only white space: that alone would change what is written around it."""
N_PLACES = 12


def chat(texts: list[str], thinks: bool) -> Conversation:
    """Chat completions with a text in every place."""
    t = iter(texts)
    call = {"name": "f", "arguments": json.dumps({next(t): next(t), "n": [next(t)]})}
    tool = {"name": "f", "description": next(t), "parameters": {"properties": {next(t): {}}}}
    body = {
        "messages": [
            {"role": "system", "content": next(t)},
            {"role": "user", "name": next(t), "content": [{"type": "text", "text": next(t)}] * 2},
            {
                "role": "assistant",
                "reasoning_content": next(t),
                "content": next(t),
                "tool_calls": [{"id": "a", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": "a", "content": next(t)},
        ],
        "tools": [{"type": "function", "function": tool}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": {next(t): {}}}},
        "metadata": {"x": texts[0]},
        "user": texts[0],
    }
    return openai_chat.conversation(checked(openai_chat.ChatBody, body), thinks)


def responses(texts: list[str], thinks: bool) -> Conversation:
    t = iter(texts)
    arguments = json.dumps({next(t): next(t), "n": [next(t)]})
    tool = {"type": "function", "name": "f", "description": next(t)}
    body = {
        "instructions": next(t),
        "input": [
            {"role": "developer", "content": next(t)},
            {"role": "user", "content": [{"type": "input_text", "text": next(t)}] * 2},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": next(t)}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": next(t)}]},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": arguments},
            {"type": "function_call_output", "call_id": "a", "output": next(t)},
            {"role": "user", "content": next(t)},
        ],
        "tools": [{**tool, "parameters": {"properties": {next(t): {}}}}],
    }
    checked_ = checked(openai_responses.ResponsesBody, body)
    items = openai_responses.history(checked_, KEPT)
    return openai_responses.conversation(checked_, items, thinks, KEPT)


def messages(texts: list[str], thinks: bool) -> Conversation:
    t = iter(texts)
    content = [
        {"type": "thinking", "thinking": next(t), "signature": "s"},
        {"type": "text", "text": next(t)},
        {"type": "tool_use", "id": "a", "name": "f", "input": {next(t): {next(t): [next(t)]}}},
    ]
    caption = {"type": "image", "source": {"type": "base64", "data": next(t)}, "title": texts[0]}
    result = [{"type": "text", "text": next(t)}, caption]
    body = {
        "system": [{"type": "text", "text": next(t)}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": next(t)}]},
            {"role": "assistant", "content": content},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": result},
                {"type": "text", "text": next(t)},
            ]},
            {"role": "system", "content": next(t)},
        ],
        "tools": [{"name": "f", "description": next(t), "input_schema": {"properties": {}}}],
        "thinking": {"type": "adaptive" if thinks else "disabled"},
        "metadata": {"user_id": texts[0]},
        "max_tokens": 1,
    }  # fmt: skip
    return anthropic.conversation(checked(anthropic.MessagesBody, body))


def controls(ids: list[int]) -> list[int]:
    return [token for token in ids if TOKENIZER.is_control(token)]


@pytest.mark.parametrize("make", [chat, responses, messages])
@settings(max_examples=40)
@given(st.lists(spellings, min_size=N_PLACES, max_size=N_PLACES, unique=True), st.booleans())
def test_no_text_of_a_client_becomes_a_control_token(
    make: Callable[[list[str], bool], Conversation], texts: list[str], thinks: bool
) -> None:
    found = WRITER.tokens(make(texts, thinks))
    innocent = WRITER.tokens(make([f"x{i}x" for i in range(N_PLACES)], thinks))
    assert controls(found) == controls(innocent)
    assert any(text in TOKENIZER.decode(found) for text in texts)


@given(spellings)
def test_names_of_tools_cannot_spell_them(text: str) -> None:
    tool = {"type": "function", "function": {"name": text}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool]}
    try:
        made = openai_chat.conversation(checked(openai_chat.ChatBody, body), False)
    except ApiError as error:
        assert error.param == "tools.0.name"
    else:
        assert made.tools[0].name == text and not set(text) & set("<>｜\n\"'")


@given(spellings, st.booleans())
def test_a_value_is_written_back_as_it_was(text: str, thinks: bool) -> None:
    """An argument comes out of the parser as it went in, however its tokens were cut, unless it
    spells the tag that ends it."""
    if "</｜DSML｜" in text or "</|DSML|" in text:
        return
    written = WRITER.tokens(
        Conversation(
            [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "y",
                    "tool_calls": [
                        {"id": "a", "function": {"name": "f", "arguments": {"k": text}}}
                    ],
                },
                {"role": "tool", "tool_call_id": "a", "content": "r"},
            ],
            thinking=thinks,
        )
    )
    end = TOKENIZER.eos_id
    start = written.index(TOKENIZER.control_id("</think>"), 2) + 1
    answer = written[start : written.index(end, start) + 1]
    generation = Generation(Request([1], SamplingOptions(), tools=True), [1], TOKENIZER)
    detokenizer, events = Detokenizer(TOKENIZER), []
    for token in answer:
        ended = token == end
        shown = detokenizer.flush() if ended else detokenizer.push(token)
        events += generation.take(Token(token, shown, "stop" if ended else None))
    (call,) = (event for event in events if isinstance(event, ToolCallEnd))
    assert json.loads(call.arguments) == {"k": text}
    deltas = [event.text for event in events if isinstance(event, ToolCallArguments)]
    assert "".join(deltas) == call.arguments
    assert not any(isinstance(event, Content) for event in events)
