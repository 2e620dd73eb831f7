"""Anthropic's messages through the `anthropic` package."""

import json
from typing import Any

import anthropic
import httpx2
import pytest

from ds4py.eval.toolpool import POOL
from tests.server.scripted import Running, Script, ScriptedEngine

COLD: Any = {"temperature": 0}  # the package has no such argument any more
SUM: Any = [{"role": "user", "content": "What is 17 + 25?"}]
FUNCTION = next(tool for tool in POOL if tool.name == "get_weather").schema()["function"]
TOOL: Any = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "input_schema": FUNCTION["parameters"],
}
CALLS = (
    "Two calls.</think>Look:\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">Rome &lt;</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="get_weather">\n</｜DSML｜invoke>\n'
    "</｜DSML｜tool_calls>"
)


def test_an_answer_and_its_usage(served: Any) -> None:
    message = served.anthropic().messages.create(
        model="claude-any", messages=SUM, max_tokens=100, extra_body=COLD
    )
    assert message.id.startswith("msg_") and message.model == "claude-any"
    assert [block.type for block in message.content] == ["text"]
    assert message.content[0].text == "17 + 25 = 42."
    assert message.stop_reason == "end_turn" and message.stop_sequence is None
    used = message.usage
    assert used.input_tokens + used.cache_read_input_tokens == 14
    assert used.output_tokens == 12 and used.cache_creation_input_tokens == 0


def test_reasoning_is_a_signed_block_that_comes_back(served: Any) -> None:
    create = served.anthropic().messages.create
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    first = create(model="m", messages=SUM, max_tokens=200, extra_body=COLD, thinking=thinking)
    assert [block.type for block in first.content] == ["thinking", "text"]
    assert "Ones" in first.content[0].thinking and first.content[0].signature
    again: Any = [*SUM, {"role": "assistant", "content": first.content}, *SUM]
    second = create(model="m", messages=again, max_tokens=200, extra_body=COLD, thinking=thinking)
    assert second.content[-1].text


def test_a_stream_equals_the_whole(served: Any) -> None:
    ask: Any = {
        "model": "m",
        "messages": SUM,
        "max_tokens": 200,
        "extra_body": COLD,
        "thinking": {"type": "adaptive"},
    }
    whole = served.anthropic().messages.create(**ask)
    with served.anthropic().messages.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
    assert [block.model_dump() for block in final.content] == [
        block.model_dump() for block in whole.content
    ]
    assert final.stop_reason == whole.stop_reason
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0) == 14


def test_a_tool_call_and_its_result(served: Any) -> None:
    asked: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    ask: Any = {"model": "m", "max_tokens": 200, "extra_body": COLD, "tools": [TOOL]}
    first = served.anthropic().messages.create(messages=asked, **ask)
    assert first.stop_reason == "tool_use"
    call = first.content[-1]
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Rome"})
    result = '{"temperature": 21, "sky": "sunny"}'
    back = [{"type": "tool_result", "tool_use_id": call.id, "content": result}]
    history = [
        *asked,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": back},
    ]
    second = served.anthropic().messages.create(messages=history, **ask)
    assert second.content[0].text == "It is 21 degrees and sunny in Rome."


def test_tools_run_by_the_client(served: Any) -> None:
    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """Get the weather in a city.

        Args:
            city: The city.
        """
        assert city == "Rome"
        return json.dumps({"temperature": 21, "sky": "sunny"})

    runner = served.anthropic().beta.messages.tool_runner(
        model="m",
        max_tokens=200,
        messages=[{"role": "user", "content": "What is the weather in Rome?"}],
        tools=[get_weather],
        extra_body={"temperature": 0},
    )
    assert runner.until_done().content[0].text == "It is 21 degrees and sunny in Rome."


def test_blocks_of_a_stream_with_calls() -> None:
    with Running(ScriptedEngine(Script([CALLS]))) as server:
        ask: Any = {"model": "m", "max_tokens": 500, "messages": SUM, "tools": [TOOL]}
        ask["thinking"] = {"type": "enabled", "budget_tokens": 2000}
        with server.anthropic().messages.stream(**ask) as stream:
            events = list(stream)
            final = stream.get_final_message()
    starts = [e.content_block.type for e in events if e.type == "content_block_start"]
    assert starts == ["thinking", "text", "tool_use", "tool_use"]
    assert [e.index for e in events if e.type == "content_block_stop"] == [0, 1, 2, 3]
    assert final.content[0].thinking == "Two calls."  # type: ignore[union-attr]
    assert final.content[1].text == "Look:"  # type: ignore[union-attr]
    inputs = [block.input for block in final.content[2:]]  # type: ignore[union-attr]
    assert inputs == [{"city": "Rome &lt;"}, {}]
    ids = [block.id for block in final.content[2:]]  # type: ignore[union-attr]
    assert len(set(ids)) == 2 and all(i.startswith("toolu_") for i in ids)
    assert final.stop_reason == "tool_use"


def test_stops_and_limits() -> None:
    with Running(ScriptedEngine(Script(["one two three four"]), context=60)) as server:
        create = server.anthropic().messages.create
        message = create(model="m", messages=SUM, max_tokens=50, stop_sequences=["three"])
        assert message.content[0].text == "one two "  # type: ignore[union-attr]
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "three")
        message = create(model="m", messages=SUM, max_tokens=2)
        assert message.stop_reason == "max_tokens"
        with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 60"):
            create(model="m", messages=[{"role": "user", "content": "7" * 90}], max_tokens=2)


def test_an_answer_begun_is_gone_on_with() -> None:
    script = Script(["42."])
    with Running(ScriptedEngine(script)) as server:
        begun: Any = [*SUM, {"role": "assistant", "content": "17 + 25 ="}]
        thinking: Any = {"type": "enabled", "budget_tokens": 2000}
        message = server.anthropic().messages.create(
            model="m", messages=begun, max_tokens=50, thinking=thinking
        )
    assert message.content[0].text == "42."  # type: ignore[union-attr]
    written = server.engine.tokenizer.decode(script.prompts[0])
    assert written.endswith("<｜Assistant｜></think>17 + 25 =")


def test_counting_equals_using(served: Any) -> None:
    ask: Any = {"model": "m", "messages": SUM, "system": "Be brief.", "tools": [TOOL]}
    counted = served.anthropic().messages.count_tokens(**ask)
    used = served.anthropic().messages.create(**ask, max_tokens=1).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_errors_in_shape(served: Any) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        served.anthropic().messages.create(model="m", messages=SUM, max_tokens=0)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith("max_tokens: ")
    assert body["request_id"] == caught.value.response.headers["request-id"]
    image = {"type": "image", "source": {"type": "base64", "media_type": "x", "data": ""}}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0: .*no vision"):
        served.anthropic().messages.create(
            model="m", max_tokens=1, messages=[{"role": "user", "content": [image]}]
        )
    unknown = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "x"}
    with pytest.raises(anthropic.BadRequestError, match="toolu_1"):
        served.anthropic().messages.create(
            model="m", max_tokens=1, messages=[{"role": "user", "content": [unknown]}]
        )
    response = httpx2.get(f"{served.url}/v1/messages")
    assert response.status_code == 405 and response.json()["type"] == "error"


def test_a_system_message_inside_stays_where_it_is() -> None:
    script = Script(["ok"])
    with Running(ScriptedEngine(script)) as server:
        inside: Any = [*SUM, {"role": "system", "content": "Mind the gap."}]
        server.anthropic().messages.create(model="m", messages=inside, max_tokens=5)
    written = server.engine.tokenizer.decode(script.prompts[0])
    assert written.index("17 + 25") < written.index("Mind the gap.")
    assert written.endswith("<｜Assistant｜></think>")
