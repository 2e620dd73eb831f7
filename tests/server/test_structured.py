"""Formats and forced calls through the official clients, whatever the model would rather say."""

import json
from typing import Any, Literal

import openai
import pydantic
import pytest

from ds4py.eval.toolpool import POOL

STORY: Any = [{"role": "user", "content": "Tell me a short story about a fox."}]
OFF: Any = {"thinking": {"type": "disabled"}}
SCHEMAS: Any = [tool.schema() for tool in POOL[:3]]
STRICT: Any = [
    {
        "type": "function",
        "function": {
            **schema["function"],
            "strict": True,
            "parameters": {**schema["function"]["parameters"], "additionalProperties": False},
        },
    }
    for schema in SCHEMAS
]
NAMES = {schema["function"]["name"] for schema in SCHEMAS}


class Fox(pydantic.BaseModel):
    """What the story is about."""

    model_config = pydantic.ConfigDict(extra="forbid")
    colour: Literal["red", "grey"]
    legs: Literal[3, 4]
    friends: bool


@pytest.mark.parametrize("thinking", ["enabled", "disabled"])
def test_a_parsed_answer(served: Any, thinking: str) -> None:
    answer = served.openai().chat.completions.parse(
        model="m",
        messages=STORY,
        response_format=Fox,
        seed=1,
        extra_body={"thinking": {"type": thinking}},
    )
    assert isinstance(answer.choices[0].message.parsed, Fox)
    assert answer.choices[0].finish_reason == "stop"


def test_a_parsed_stream_and_response(served: Any) -> None:
    ask: Any = {"model": "m", "extra_body": {"temperature": 0}}
    with served.openai().chat.completions.stream(
        messages=STORY, response_format=Fox, **ask
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert isinstance(message.parsed, Fox)
    response = served.openai().responses.parse(input=STORY, text_format=Fox, **ask)
    assert isinstance(response.output_parsed, Fox)


@pytest.mark.long
def test_any_object(served: Any) -> None:
    answer = served.openai().chat.completions.create(
        model="m",
        messages=STORY,
        response_format={"type": "json_object"},
        max_tokens=60,
        temperature=0,
        extra_body=OFF,
    )
    text = answer.choices[0].message.content
    assert text.startswith("{")
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "tools",
    [pytest.param(SCHEMAS, marks=pytest.mark.long, id="loose"), pytest.param(STRICT, id="strict")],
)
def test_forced_calls(served: Any, tools: Any) -> None:
    create = served.openai().chat.completions.create
    ask: Any = {"model": "m", "messages": STORY, "tools": tools, "max_tokens": 120, "seed": 4}
    answer = create(**ask, tool_choice="required", extra_body=OFF)
    message = answer.choices[0].message
    assert message.tool_calls and {c.function.name for c in message.tool_calls} <= NAMES
    named: Any = {"type": "function", "function": {"name": SCHEMAS[2]["function"]["name"]}}
    answer = create(**ask, tool_choice=named, extra_body={"reasoning_effort": "none"})
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == named["function"]["name"]
    if tools is STRICT and answer.choices[0].finish_reason == "tool_calls":
        required = STRICT[2]["function"]["parameters"]["required"]
        assert list(json.loads(call.function.arguments)) == required


def test_only_allowed_tools_are_called(served: Any) -> None:
    wanted = SCHEMAS[0]
    name = wanted["function"]["name"]
    ask: Any = {"model": "m", "messages": STORY, "tools": SCHEMAS, "max_tokens": 40, "seed": 4}
    allowed: Any = {"mode": "required", "tools": [wanted]}
    answer = served.openai().chat.completions.create(
        **ask, tool_choice={"type": "allowed_tools", "allowed_tools": allowed}, extra_body=OFF
    )
    assert {call.function.name for call in answer.choices[0].message.tool_calls} == {name}
    response = served.openai().responses.create(
        model="m",
        input=STORY,
        tools=[{"type": "function", **schema["function"]} for schema in SCHEMAS],
        tool_choice={
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": name}],
        },
        max_output_tokens=40,
        reasoning={"effort": "none"},
    )
    assert {item.name for item in response.output if item.type == "function_call"} == {name}
    none: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}
    for refused in (none, {"type": "allowed_tools"}, {"type": "custom", "custom": {"name": "x"}}):
        with pytest.raises(openai.BadRequestError) as caught:
            served.openai().chat.completions.create(**ask, tool_choice=refused)
        assert caught.value.param == "tool_choice"


def test_a_call_has_the_name_of_a_tool_whatever_the_model_calls_it(served: Any) -> None:
    """The embedded model shortens names that it was not trained on."""
    weather = next(tool for tool in POOL if tool.name == "get_weather").schema()["function"]
    tool: Any = {"type": "function", "function": {**weather, "name": "mcp__home__get_weather"}}
    ask: Any = {"messages": [{"role": "user", "content": "What is the weather in Rome?"}]}
    for stream in (False, True):
        made = served.openai().chat.completions.create(
            model="m", tools=[tool], temperature=0, stream=stream, **ask
        )
        if stream:
            names = [c.function.name for d in made for c in d.choices[0].delta.tool_calls or ()]
        else:
            names = [call.function.name for call in made.choices[0].message.tool_calls]
            assert "get_weather for this" in made.choices[0].message.reasoning_content
            assert set(json.loads(made.choices[0].message.tool_calls[0].function.arguments)) == {
                "city"
            }
        assert names[0] == "mcp__home__get_weather"


@pytest.mark.long
def test_forced_calls_in_the_other_protocols(served: Any) -> None:
    flat = [{"type": "function", **schema["function"]} for schema in SCHEMAS]
    response = served.openai().responses.create(
        model="m",
        input=STORY,
        tools=flat,
        tool_choice="required",
        max_output_tokens=60,
        reasoning={"effort": "none"},
    )
    assert response.output[0].type == "function_call"
    tools = [
        {"name": s["function"]["name"], "input_schema": s["function"]["parameters"]}
        for s in SCHEMAS
    ]
    ask: Any = {"model": "m", "messages": STORY, "tools": tools, "max_tokens": 60}
    message = served.anthropic().messages.create(**ask, tool_choice={"type": "any"})
    assert message.content[0].type == "tool_use"
    named: Any = {"type": "tool", "name": tools[1]["name"]}
    message = served.anthropic().messages.create(**ask, tool_choice=named)
    assert [block.name for block in message.content] == [tools[1]["name"]]
    message = served.anthropic().messages.create(**ask, tool_choice={"type": "none"})
    assert {block.type for block in message.content} == {"text"}


def test_an_anthropic_format(served: Any) -> None:
    form = {"type": "json_schema", "schema": Fox.model_json_schema()}
    message = served.anthropic().messages.create(
        model="m", messages=STORY, max_tokens=300, extra_body={"output_config": {"format": form}}
    )
    Fox.model_validate_json(message.content[0].text)


def test_a_schema_that_cannot_be_enforced_is_refused_before_the_answer(served: Any) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        served.openai().chat.completions.create(
            model="m", messages=STORY, response_format=form, stream=True
        )


def test_bias_and_penalties_change_the_answer(served: Any) -> None:
    ask: Any = {
        "model": "m",
        "messages": [{"role": "user", "content": "What is 17 + 25?"}],
        "temperature": 0,
        "extra_body": OFF,
    }
    create = served.openai().chat.completions.create
    with served.http() as http:
        four = http.post("/tokenize", json={"content": "4"}).json()["tokens"][-1]
    answer = create(**ask, logit_bias={str(four): -100})
    assert "4" not in answer.choices[0].message.content
    ask |= {"messages": STORY, "max_tokens": 40}
    plain, penalised = create(**ask), create(**ask, frequency_penalty=2, presence_penalty=2)
    assert penalised.choices[0].message.content != plain.choices[0].message.content


@pytest.mark.long
def test_the_same_seed_gives_the_same_answer(served: Any) -> None:
    def told(seed: int) -> str:
        answer = served.openai().chat.completions.create(
            model="m", messages=STORY, seed=seed, max_tokens=20, temperature=1.5, extra_body=OFF
        )
        return str(answer.choices[0].message.content)

    assert told(3) == told(3)
    assert told(3) != told(4)
