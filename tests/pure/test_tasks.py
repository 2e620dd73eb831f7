"""The generated tasks: split, answers that are right, and conversations that can be rendered."""

import json
import re
from random import Random

import pytest

from ds4py.eval import stories, tasks, toolpool
from ds4py.text import chat
from ds4py.text.stream import StreamParser


def count(text: str) -> int:
    return len(text) // 4


def test_the_split_depends_on_the_content_alone() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    share = sum(tasks.held_out("sum", a, b) for a, b in pairs) / len(pairs)
    assert share == pytest.approx(1 / tasks.HELD_OUT, abs=0.02)
    assert tasks.held_out("sum", 12, 34) == tasks.held_out("sum", 12, 34)


def sums_in(text: str) -> list[tuple[int, int, int]]:
    found = re.findall(r"(?<!\+ )\b(\d+) \+ (\d+) = (\d+)", text)
    return [(int(a), int(b), int(c)) for a, b, c in found]


def training_texts(seed: int) -> list[str]:
    rng = Random(seed)
    made = [tasks.short_chat(rng), tasks.recall_chat(rng, 2000, 0.6), tasks.tool_chat(rng)]
    texts = [chat.render(c.messages, c.thinking, c.effort, c.drop_thinking) for c in made]
    return [*texts, tasks.sum_drill(rng, 20), tasks.plain_story(rng, False)]


@pytest.mark.parametrize("seed", range(20))
def test_training_never_sees_a_held_out_sum(seed: int) -> None:
    for a, b, c in sums_in("\n".join(training_texts(seed))):
        assert a + b == c
        if a >= 10 and b >= 10:
            assert not tasks.held_out("sum", min(a, b), max(a, b))


@pytest.mark.parametrize("seed", range(20))
def test_training_never_sees_a_held_out_fact(seed: int) -> None:
    for name, value in re.findall(r"(\w+)'s number is (\d+)", "\n".join(training_texts(seed))):
        assert not tasks.held_out("fact", name, value)


@pytest.mark.parametrize("seed", range(20))
def test_training_never_sees_a_held_out_call(seed: int) -> None:
    for message in tasks.tool_chat(Random(seed)).messages:
        for call in message.get("tool_calls", ()):
            function = call["function"]
            assert not tasks.held_out("tool", function["name"], function["arguments"])


@pytest.mark.parametrize("seed", range(10))
def test_cases_are_held_out(seed: int) -> None:
    rng = Random(seed)
    reference = tasks.addition_case(rng).reference["content"]
    a, b, _ = sums_in(reference)[0]
    assert tasks.held_out("sum", min(a, b), max(a, b))
    name, value = re.findall(
        r"(\w+)'s number is (\d+)", tasks.recall_case(rng, 200, count).reference["content"]
    )[0]
    assert tasks.held_out("fact", name, value)
    call = tasks.tool_call_case(rng).call
    assert call is not None and tasks.held_out("tool", call[0], json.dumps(call[1]))


@pytest.mark.parametrize("seed", range(10))
def test_a_recall_case_states_its_fact_once(seed: int) -> None:
    case = tasks.recall_case(Random(seed), 600, count)
    name = case.reference["content"].split("'")[0]
    spoken = " ".join(m["content"] for m in case.messages[:-1])
    forms = (f"{name}'s number is {case.expect}.", f"The number of {name} is {case.expect}.")
    assert sum(spoken.count(form) for form in forms) == 1
    assert case.messages[-1]["role"] == "user" and name in case.messages[-1]["content"]
    assert count(spoken) >= 500


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_the_reference_call_is_read_back_by_the_parser(seed: int, thinking: bool) -> None:
    case = tasks.tool_call_case(Random(seed), thinking)
    prompt = chat.render(case.messages, thinking)
    whole = chat.render([*case.messages, case.reference], thinking)
    assert whole.startswith(prompt)
    parser = StreamParser(thinking)
    parser.push(whole[len(prompt) :].removesuffix("<｜end▁of▁sentence｜>"))
    parser.finish()
    function = parser.message()["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == case.call


def test_every_tool_has_a_question_and_an_answer_for_its_values() -> None:
    rng = Random(3)
    for tool in toolpool.POOL:
        values = {**tool.arguments(rng), **tool.outcome(rng)}
        for pattern in (*tool.questions, tool.answer):
            assert "{" not in pattern.format(**values)
        assert set(tool.schema()["function"]["parameters"]["required"]) == set(tool.params)


def test_stories_are_sentences_about_their_hero() -> None:
    rng = Random(5)
    for _ in range(50):
        cast = stories.cast(rng)
        text = stories.story(cast, rng)
        assert cast.hero in text and text.endswith(".") and "  " not in text
        assert not re.search(r"[{}]|HERO|FRIEND|THING|PLACE|SHE", text)
