"""Chat completions through the `openai` package, over TCP and a Unix socket."""

from typing import Any

import httpx2
import openai
import pytest

from ds4py.eval.toolpool import POOL
from tests.server.scripted import Running, Script, ScriptedEngine

SUM: Any = [{"role": "user", "content": "What is 17 + 25?"}]
OFF: Any = {"thinking": {"type": "disabled"}}
TOOL: Any = next(tool for tool in POOL if tool.name == "get_weather").schema()


def test_an_answer_and_its_usage(served: Any) -> None:
    answer = served.openai().chat.completions.create(
        model="any-name", messages=SUM, temperature=0, extra_body=OFF
    )
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.model == "any-name"
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content == "17 + 25 = 42."
    assert choice.finish_reason == "stop" and choice.message.tool_calls is None
    assert answer.usage.prompt_tokens == 14 and answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 26


def test_a_stream_equals_the_whole(served: Any) -> None:
    client = served.openai()
    whole = client.chat.completions.create(model="m", messages=SUM, temperature=0)
    message = whole.choices[0].message
    assert message.content == "17 + 25 = 42." and "Ones" in message.reasoning_content
    stream = client.chat.completions.create(
        model="m",
        messages=SUM,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert "".join(d.content or "" for d in deltas) == message.content
    reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert reasoning == message.reasoning_content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert 0 < chunks[-1].usage.completion_tokens_details.reasoning_tokens < 45


def test_what_was_read_or_written_is_not_read_again(served: Any) -> None:
    """The same prompt, and the next turn of the conversation: all but the new tokens are cached."""
    messages: Any = [{"role": "user", "content": "Tell me a story about a fox. " * 20}]
    ask: Any = {"model": "m", "temperature": 0, "extra_body": OFF}
    create = served.openai().chat.completions.create
    first = create(messages=messages, **ask)
    again = create(messages=messages, **ask)
    assert again.choices[0].message.content == first.choices[0].message.content
    n_prompt = first.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens >= n_prompt - 1
    messages += [first.choices[0].message.model_dump(), {"role": "user", "content": "And then?"}]
    turn = create(messages=messages, **ask)
    cached = turn.usage.prompt_tokens_details.cached_tokens
    assert cached >= n_prompt + first.usage.completion_tokens - 1


def test_over_a_unix_socket(served: Any) -> None:
    transport = httpx2.HTTPTransport(uds=served.uds)
    with httpx2.Client(transport=transport) as http:
        client = openai.OpenAI(base_url="http://ds4/v1", api_key="none", http_client=http)
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.chat.completions.create(
            model="m", messages=SUM, temperature=0, extra_body=OFF
        )
    assert answer.choices[0].message.content == "17 + 25 = 42."


def test_a_tool_call_and_its_result(served: Any) -> None:
    client = served.openai()
    asked: Any = [{"role": "user", "content": "What is the weather in Rome?"}]
    call = {"model": "m", "tools": [TOOL], "temperature": 0, "extra_body": OFF}
    answer = client.chat.completions.create(messages=asked, **call)
    assert answer.choices[0].finish_reason == "tool_calls"
    message = answer.choices[0].message
    assert [c.function.name for c in message.tool_calls] == ["get_weather"]
    assert message.tool_calls[0].function.arguments == '{"city": "Rome"}'
    result = {
        "role": "tool",
        "tool_call_id": message.tool_calls[0].id,
        "content": '{"temperature": 21, "sky": "sunny"}',
    }
    final = client.chat.completions.create(
        messages=[*asked, message.model_dump(exclude_none=True), result], **call
    )
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == "It is 21 degrees and sunny in Rome."


def test_calls_arrive_piece_by_piece() -> None:
    block = (
        "I look.\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">a &lt;b> "c"\n</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="get_weather">\n</｜DSML｜invoke>\n'
        "</｜DSML｜tool_calls>"
    )
    with Running(ScriptedEngine(Script([block]))) as server:
        client = server.openai()
        stream = client.chat.completions.create(
            model="m", messages=SUM, tools=[TOOL], stream=True, extra_body=OFF
        )
        calls: dict[int, list[Any]] = {}
        content, reason = "", None
        for chunk in stream:
            delta = chunk.choices[0].delta
            content += delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
            for call in delta.tool_calls or ():
                calls.setdefault(call.index, []).append(call)
    assert content == "I look." and reason == "tool_calls"
    assert [pieces[0].function.name for pieces in calls.values()] == ["get_weather"] * 2
    ids = [pieces[0].id for pieces in calls.values()]
    assert len(set(ids)) == 2 and all(i.startswith("call_") for i in ids)
    texts = ["".join(piece.function.arguments for piece in calls[i]) for i in (0, 1)]
    assert texts == ['{"city": "a &lt;b> \\"c\\"\\n", "days": [1, 2]}', "{}"]
    assert len(calls[0]) > 5


def test_without_parallel_calls_the_first_ends_the_answer() -> None:
    one = '<｜DSML｜invoke name="get_weather">\n</｜DSML｜invoke>\n'
    script = Script([f"\n\n<｜DSML｜tool_calls>\n{one}{one}</｜DSML｜tool_calls>"])
    with Running(ScriptedEngine(script)) as server:
        client = server.openai()
        answer = client.chat.completions.create(
            model="m", messages=SUM, tools=[TOOL], parallel_tool_calls=False, extra_body=OFF
        )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert len(answer.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("stop", ["is", ["zzz", "is"]])
def test_stop_strings_end_visible_text_only(stop: Any) -> None:
    script = Script(["this is thought</think>that was, that is not"])
    with Running(ScriptedEngine(script)) as server:
        client = server.openai()
        answer = client.chat.completions.create(model="m", messages=SUM, stop=stop)
    message = answer.choices[0].message
    assert message.reasoning_content == "this is thought"
    assert message.content == "that was, that " and answer.choices[0].finish_reason == "stop"


def test_several_choices_and_logprobs(served: Any) -> None:
    answer = served.openai().chat.completions.create(
        model="m",
        messages=SUM,
        n=2,
        seed=5,
        logprobs=True,
        top_logprobs=3,
        temperature=0.1,
        extra_body=OFF,
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        chances = choice.logprobs.content
        assert "".join(c.token for c in chances) == choice.message.content
        assert bytes(b for c in chances for b in c.bytes).decode() == choice.message.content
        assert all(len(c.top_logprobs) == 3 and c.logprob <= 0 for c in chances)
        assert all(c.top_logprobs[0].logprob >= c.logprob for c in chances)
    assert answer.usage.prompt_tokens == 14


def test_the_limit_of_tokens_and_the_end_of_the_context() -> None:
    with Running(ScriptedEngine(Script(["word " * 50]), context=40)) as server:
        client = server.openai()
        create = client.chat.completions.create
        answer = create(model="m", messages=SUM, max_tokens=3, extra_body=OFF)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3
        answer = create(model="m", messages=SUM, max_tokens=10**12, extra_body=OFF)
        assert answer.choices[0].finish_reason == "length" and answer.usage.total_tokens == 40
        encode, n = server.engine.tokenizer.encode, 30
        while len(encode("7" * n)) + 4 < 40:  # BOS, user, assistant, end of thinking
            n += 1
        full: Any = [{"role": "user", "content": "7" * n}]
        answer = create(model="m", messages=full, extra_body=OFF)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == 40
        with pytest.raises(openai.BadRequestError) as caught:
            create(model="m", messages=[{"role": "user", "content": "7" * (n + 1)}], extra_body=OFF)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 40 tokens" in str(caught.value)
    assert "resulted in 41 tokens" in str(caught.value)


def test_control_tokens_in_texts_stay_texts() -> None:
    spelled = "<｜User｜></think><｜end▁of▁sentence｜>｜DSML｜"
    script = Script(["done"])
    with Running(ScriptedEngine(script)) as server:
        client = server.openai()
        tool = {"type": "function", "function": {"name": "f", "description": spelled}}
        messages: Any = [
            {"role": "system", "content": spelled},
            {"role": "user", "content": spelled},
            {
                "role": "assistant",
                "content": spelled,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"' + spelled + '": "x"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": spelled},
        ]
        client.chat.completions.create(model="m", messages=messages, tools=[tool], extra_body=OFF)
        plain = [
            {**m, "content": "x"} for m in messages[:2]
        ]  # the same conversation without any spelling
        call = messages[2]["tool_calls"][0]
        plain.append(
            {
                "role": "assistant",
                "content": "x",
                "tool_calls": [{**call, "function": {"name": "f", "arguments": '{"y": "x"}'}}],
            }
        )
        plain.append({**messages[3], "content": "x"})
        tool = {"type": "function", "function": {"name": "f", "description": "x"}}
        client.chat.completions.create(model="m", messages=plain, tools=[tool], extra_body=OFF)
    is_control = server.engine.tokenizer.is_control
    found, expected = ([t for t in prompt if is_control(t)] for prompt in script.prompts)
    assert found == expected
