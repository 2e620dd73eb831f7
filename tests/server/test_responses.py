"""OpenAI's responses and completions through the `openai` package."""

from typing import Any

import numpy as np
import openai
import pytest

from ds4py import Engine, EngineOptions
from ds4py.eval.toolpool import POOL
from tests.server.scripted import Running, Script, ScriptedEngine

FUNCTION = next(tool for tool in POOL if tool.name == "get_weather").schema()["function"]
TOOL: Any = {"type": "function", "strict": False, **FUNCTION}
OFF: Any = {"effort": "none"}
CALL = (
    "A call.</think>Look:\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


def test_an_answer_and_its_usage(served: Any) -> None:
    response = served.openai().responses.create(
        model="m", input="What is 17 + 25?", temperature=0, reasoning=OFF
    )
    assert response.id.startswith("resp_") and response.status == "completed"
    assert response.output_text == "17 + 25 = 42."
    assert response.usage.input_tokens == 14 and response.usage.output_tokens == 12
    assert 0 <= response.usage.input_tokens_details.cached_tokens <= 14
    assert response.usage.output_tokens_details.reasoning_tokens == 0


def test_a_stream_equals_the_whole(served: Any) -> None:
    ask: Any = {"model": "m", "input": "What is 17 + 25?", "temperature": 0}
    whole = served.openai().responses.create(**ask)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    with served.openai().responses.stream(**ask) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == whole.output_text
    assert final.output[0].summary[0].text == whole.output[0].summary[0].text
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.output_tokens_details.reasoning_tokens > 0


def test_a_tool_call_and_its_result(served: Any) -> None:
    ask: Any = {"model": "m", "tools": [TOOL], "temperature": 0, "reasoning": OFF}
    asked: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    first = served.openai().responses.create(input=asked, **ask)
    call = first.output[-1]
    assert (call.type, call.name) == ("function_call", "get_weather")
    assert call.arguments == '{"city": "Rome"}'
    output = '{"temperature": 21, "sky": "sunny"}'
    result = {"type": "function_call_output", "call_id": call.call_id, "output": output}
    items = [*asked, *(item.model_dump(exclude_none=True) for item in first.output), result]
    expected = "It is 21 degrees and sunny in Rome."
    assert served.openai().responses.create(input=items, **ask).output_text == expected
    referred = {"previous_response_id": first.id, "input": [result]}
    assert served.openai().responses.create(**referred, **ask).output_text == expected
    reference = {"type": "item_reference", "id": call.id}
    items = [*asked, reference, result]
    assert served.openai().responses.create(input=items, **ask).output_text == expected


def test_tools_in_a_namespace(served: Any) -> None:
    """As Codex sends those of its MCP servers."""
    home: Any = {"type": "namespace", "name": "home", "description": "At home.", "tools": [TOOL]}
    asked: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    ask: Any = {"model": "m", "tools": [home], "temperature": 0, "reasoning": OFF}
    with served.openai().responses.stream(input=asked, **ask) as stream:
        first = stream.get_final_response()
    call = first.output[-1]
    assert (call.type, call.namespace, call.name) == ("function_call", "home", "get_weather")
    assert first.tools[0].name == "home"
    output = '{"temperature": 21, "sky": "sunny"}'
    result = {"type": "function_call_output", "call_id": call.call_id, "output": output}
    items = [*asked, *(item.model_dump(exclude_none=True) for item in first.output), result]
    answer = served.openai().responses.create(input=items, **ask)
    assert "21 degrees" in answer.output_text
    cached = answer.usage.input_tokens_details.cached_tokens
    assert cached >= first.usage.input_tokens + first.usage.output_tokens - 1
    work = {**home, "name": "work"}
    twice = {**ask, "tools": [home, work]}
    chosen: Any = {"type": "function", "name": "work.get_weather"}
    (call,) = served.openai().responses.create(input=asked, **twice, tool_choice=chosen).output
    assert (call.namespace, call.name) == ("work", "get_weather")
    for wrong in ({**home, "tools": None}, {**home, "name": 5}):
        with pytest.raises(openai.BadRequestError):
            served.openai().responses.create(input=asked, **{**ask, "tools": [wrong]})


def test_the_life_of_items() -> None:
    with Running(ScriptedEngine(Script([CALL]))) as server:
        stream = server.openai().responses.create(
            model="m", input="x", tools=[TOOL], stream=True, reasoning={"summary": "auto"}
        )
        events = [event.model_dump() for event in stream]
    added = [e["item"]["type"] for e in events if e["type"] == "response.output_item.added"]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert added == [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    for index, item in enumerate(done):
        of_item = [e for e in events if e.get("item_id") == item["id"]]
        assert {e["output_index"] for e in of_item} == {index}
    assert done[2]["arguments"] == '{"city": "Rome"}' and done[2]["status"] == "completed"
    assert done[0]["summary"][0]["text"] == "A call."
    deltas = [e["delta"] for e in events if e["type"].endswith("arguments.delta")]
    assert "".join(deltas) == done[2]["arguments"] and len(deltas) > 2
    kinds = [e["type"].removeprefix("response.") for e in events if "delta" not in e["type"]]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "reasoning_summary_part.added",
        "reasoning_summary_text.done",
        "reasoning_summary_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]


def test_limits_and_refusals() -> None:
    with Running(ScriptedEngine(Script(["a b c d e f"]), context=60)) as server:
        create = server.openai().responses.create
        response = create(model="m", input="x", max_output_tokens=2, reasoning=OFF)
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"  # type: ignore[union-attr]
        assert create(model="m", input="", max_output_tokens=1, reasoning=OFF).id  # a warm-up
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="m", input="7" * 100)
        assert caught.value.code == "context_length_exceeded"
        for refused in (
            {"previous_response_id": "resp_1"},
            {"background": True},
            {"conversation": "conv_1"},
            {"input": [{"type": "item_reference", "id": "rs_1"}]},
            {"input": [{"type": "computer_call"}]},
            {"input": [5]},
        ):
            with pytest.raises(openai.BadRequestError):
                create(**{"model": "m", "input": "x", **refused})  # type: ignore[call-overload]


def test_completions_go_on_with_the_text(served: Any) -> None:
    create = served.openai().completions.create
    with served.http() as http:
        ids = http.post("/tokenize", json={"content": "Once upon", "add_special": True})
    ask: Any = {"model": "m", "max_tokens": 8, "temperature": 0}
    whole = create(prompt="Once upon", **ask)
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 8
    assert create(prompt=ids.json()["tokens"], **ask).choices[0].text == whole.choices[0].text
    chunks = list(create(prompt="Once upon", stream=True, **ask))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    both = create(prompt=["Once upon", "Tom"], n=2, echo=True, **ask)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == both.choices[1].text == "Once upon" + whole.choices[0].text
    assert both.choices[3].text.startswith("Tom")


def test_completions_with_logprobs(served: Any) -> None:
    answer = served.openai().completions.create(
        model="m", prompt="Once upon", max_tokens=5, logprobs=2, temperature=0
    )
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert [len(top) for top in found.top_logprobs] == [2] * 5
    assert found.text_offset[0] == 0 and found.token_logprobs[0] <= 0


def test_logprobs_where_they_are_included(served: Any) -> None:
    ask: Any = {"model": "m", "input": "What is 17 + 25?", "temperature": 0, "reasoning": OFF}
    response = served.openai().responses.create(**ask, include=["message.output_text.logprobs"])
    (part,) = response.output[0].content
    assert "".join(chance.token for chance in part.logprobs) == part.text
    assert all(chance.top_logprobs == [] for chance in part.logprobs)
    response = served.openai().responses.create(**ask, include=["reasoning.encrypted_content"])
    assert response.output[0].content[0].logprobs == []


def test_a_prompt_is_scored(served: Any) -> None:
    """As evaluations ask for it: how likely each token of a text is, and whether it is the first
    choice."""
    create = served.openai().completions.create
    with served.http() as http:
        ids = http.post("/tokenize", json={"content": "Once upon a time", "add_special": True})
    tokens = ids.json()["tokens"]
    logits = Engine.open("tiny", EngineOptions(context=64)).score(tokens)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    expected = [float(logprobs[i, token]) for i, token in enumerate(tokens[1:])]
    ask: Any = {"model": "m", "temperature": 0, "echo": True, "logprobs": 1}
    for prompt, first in (("Once upon a time", []), (tokens, [None])):
        scored = create(prompt=prompt, max_tokens=0, **ask)
        assert scored.usage.completion_tokens == 0
        (choice,) = scored.choices
        found = choice.logprobs
        assert choice.finish_reason == "length" and choice.text.endswith("Once upon a time")
        assert "".join(found.tokens) == choice.text
        assert found.token_logprobs[: len(first)] == found.top_logprobs[: len(first)] == first
        assert found.token_logprobs[len(first) :] == pytest.approx(expected, abs=1e-4)
        assert [max(top.values()) for top in found.top_logprobs[len(first) :]] == pytest.approx(
            logprobs.max(axis=1)[:-1].tolist(), abs=1e-4
        )
        whole = create(prompt=prompt, max_tokens=3, **ask).choices[0]
        n = len(found.tokens)
        assert whole.logprobs.tokens[:n] == found.tokens and len(whole.logprobs.tokens) == n + 3
        assert whole.text == "".join(whole.logprobs.tokens)
        chunks = [c.choices[0] for c in create(prompt=prompt, max_tokens=3, stream=True, **ask)]
        assert chunks[0].text == choice.text and chunks[0].logprobs.tokens == found.tokens
        for key in ("tokens", "token_logprobs", "text_offset"):
            streamed = [value for chunk in chunks for value in getattr(chunk.logprobs, key)]
            assert streamed == getattr(whole.logprobs, key)
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="m", prompt="x", max_tokens=0)
    assert caught.value.param == "max_tokens"
