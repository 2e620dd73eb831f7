"""The line from messages to events, with a session that follows a script."""

from typing import Any

import pytest

from ds4py.cli.conversation import Conversation, RawParser, Stopped, Turn, answer
from ds4py.errors import PromptError
from ds4py.text import chat
from ds4py.text.events import Content, Reasoning


@pytest.fixture
def talk(scripted: Any, tokenizer: Any, sampling: Any) -> Conversation:
    return Conversation(scripted([["Hel", "lo"], ["again"]]), tokenizer, sampling)


def test_an_answer_is_drawn_kept_and_counted(talk: Conversation) -> None:
    events = list(talk.ask("hi"))
    assert [e.text for e in events if isinstance(e, Content)] == ["Hel", "lo"]
    assert talk.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    turn = talk.last
    assert turn is not None and turn.finish_reason == "stop" and turn.tokens == [1000, 1001]
    assert turn.cached_tokens == 0 and turn.prompt_tokens == len(talk.encode(talk.messages[:1]))


def test_the_session_gets_the_whole_conversation_in_the_chat_encoding(
    talk: Conversation, tokenizer: Any
) -> None:
    talk.system = "Be brief."
    list(talk.ask("one"))
    list(talk.ask("two"))
    session: Any = talk.session
    prompt = tokenizer.decode(session.tokens[: -len(["again"])])
    assert prompt == chat.render(talk.messages[:-1], thinking=False)
    assert talk.last is not None and talk.last.cached_tokens > 0


def test_reasoning_and_answer_are_told_apart(scripted: Any, tokenizer: Any, sampling: Any) -> None:
    talk = Conversation(scripted([["so", "</think>", "yes"]]), tokenizer, sampling)
    talk.thinking = True
    assert list(talk.ask("?")) == [Reasoning("so"), Content("yes")]
    assert talk.messages[-1] == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "so",
    }


def test_a_stopped_answer_is_kept_as_far_as_it_came(
    scripted: Any, tokenizer: Any, sampling: Any
) -> None:
    session = scripted([["a", "b", "c", "d"], ["e"]])
    talk = Conversation(session, tokenizer, sampling)
    seen: list[object] = []
    for event in talk.ask("go", stopped=lambda: len(seen) >= 2):
        seen.append(event)
    assert talk.messages[-1]["content"] == "ab" and talk.last is not None
    assert talk.last.finish_reason is None and session.closed == 1
    list(talk.ask("on"))
    assert [m["content"] for m in talk.messages] == ["go", "ab", "on", "e"]


def test_an_abandoned_answer_is_kept_too(talk: Conversation) -> None:
    events = talk.ask("go")
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert [m["content"] for m in talk.messages] == ["go", "Hel"]
    assert talk.session.closed == 1  # type: ignore[attr-defined]


def test_stopping_while_the_prompt_is_read_leaves_the_history(talk: Conversation) -> None:
    with pytest.raises(Stopped):
        list(talk.ask("x" * 500, stopped=lambda: True))
    assert talk.messages == []
    assert [e.text for e in talk.ask("hi") if isinstance(e, Content)] == ["Hel", "lo"]


def test_a_prompt_that_does_not_fit_leaves_the_history(
    scripted: Any, tokenizer: Any, sampling: Any
) -> None:
    talk = Conversation(scripted([["a"]], context=20), tokenizer, sampling)
    with pytest.raises(PromptError):
        list(talk.ask("x" * 50))
    assert talk.messages == []


def test_an_empty_message_is_refused(talk: Conversation) -> None:
    with pytest.raises(PromptError, match="empty"):
        list(talk.ask(" \n"))


def test_the_system_message_is_replaced_removed_and_survives_a_reset(talk: Conversation) -> None:
    list(talk.ask("hi"))
    talk.system = "one"
    talk.system = "two"
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "two"}] and talk.last is None
    talk.system = ""
    assert talk.messages == [] and talk.system == ""
    talk.reset()
    assert talk.messages == []


def test_progress_is_passed_on(talk: Conversation) -> None:
    seen: list[tuple[str, int, int]] = []
    list(talk.ask("x" * 100, progress=lambda *state: seen.append(state)))
    assert seen[0] == ("prefill", 64, seen[0][2]) and seen[-1][1] == seen[-1][2]


def test_a_raw_answer_is_all_content(scripted: Any, sampling: Any) -> None:
    turn = Turn(prompt_tokens=3)
    parser = RawParser()
    session = scripted([["<think>", "", "</think>x"]])
    events = list(answer(session, [1, 2, 3], sampling, parser, turn))
    assert events == [Content("<think>"), Content("</think>x")]
    assert turn.message["content"] == "<think></think>x"


def test_rates_of_nothing_are_zero() -> None:
    assert Turn(prompt_tokens=5).prefill_tps == 0.0 == Turn(prompt_tokens=5).decode_tps
    turn = Turn(prompt_tokens=12, cached_tokens=2, tokens=[1] * 6, prefill_s=2.0, decode_s=3.0)
    assert (turn.prefill_tps, turn.decode_tps) == (5.0, 2.0)
