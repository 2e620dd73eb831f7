"""A call's id brings back the very tokens that were sampled, however the client writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds4py.server.app import Rules
from ds4py.server.generation import Turn
from ds4py.server.replay import Replays
from ds4py.text.tokenizer import Tokenizer
from tests.server.scripted import Running, Script, ScriptedEngine

ANSWER = (
    "I <b>must</b> look.</think>One moment.\n\n<｜DSML｜tool_calls>\n"
    '<｜DSML｜invoke name="look">\n'
    '<｜DSML｜parameter name="where" string="true">a &lt; b\n</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">[1,2]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
LOOK: Any = {"type": "function", "function": {"name": "look"}}
ASKED: Any = [{"role": "user", "content": "Where?"}]


def run(directory: Path, messages: Any, parallel: bool = True) -> tuple[Any, list[int], list[int]]:
    """One request to a server of its own: its message, prompt and sampled ids."""
    script = Script([ANSWER], by_character=True)
    with Running(ScriptedEngine(script), Rules(state=directory)) as server:
        answer = server.openai().chat.completions.create(
            model="m", messages=messages, tools=[LOOK], parallel_tool_calls=parallel
        )
        spelled = script.spell(server.engine.tokenizer, ANSWER + "<｜end▁of▁sentence｜>")
    return answer.choices[0].message, script.prompts[0], spelled


def redumped(message: Any, **changes: Any) -> Any:
    """The message as clients send it back: without reasoning, arguments written anew."""
    call = message.tool_calls[0]
    arguments = json.dumps(json.loads(call.function.arguments), separators=(",", ":"))
    function = {"name": "look", "arguments": arguments}
    made = {"id": call.id, "type": "function", "function": {**function, **changes}}
    return {"role": "assistant", "content": None, "tool_calls": [made]}


def result(message: Any) -> Any:
    return {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "there"}


def holds(prompt: list[int], part: list[int]) -> bool:
    return any(prompt[i : i + len(part)] == part for i in range(len(prompt)))


def test_the_same_tokens_after_a_restart(tmp_path: Path) -> None:
    message, first, spelled = run(tmp_path, ASKED)
    _, second, _ = run(tmp_path, [*ASKED, redumped(message), result(message)])
    assert second[: len(first) + len(spelled)] == first + spelled


def test_other_directories_know_nothing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    message, _, spelled = run(tmp_path / "a", ASKED)
    _, prompt, _ = run(tmp_path / "b", [*ASKED, redumped(message), result(message)])
    assert not holds(prompt, spelled)


@pytest.mark.parametrize(
    "changes", [{"arguments": '{"where": "elsewhere"}'}, {"name": "other"}], ids=str
)
def test_what_the_client_changed_is_what_it_says(tmp_path: Path, changes: Any) -> None:
    message, _, spelled = run(tmp_path, ASKED)
    history = [*ASKED, redumped(message, **changes), result(message)]
    _, prompt, _ = run(tmp_path, history)
    assert not holds(prompt, spelled)


def test_an_answer_that_was_ended_is_closed(tmp_path: Path) -> None:
    message, first, spelled = run(tmp_path, ASKED, parallel=False)
    _, second, _ = run(tmp_path, [*ASKED, redumped(message), result(message)])
    n_sampled = len(spelled) - len("\n</tool_calls>") - 2  # the closing tag and the end token
    assert second[: len(first) + n_sampled] == first + spelled[:n_sampled]


def turn(tokenizer: Tokenizer, text: str) -> Turn:
    call = {"id": text, "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    return Turn(tuple(tokenizer.encode(text)), False, message)


def test_a_damaged_or_missing_store_costs_only_the_replay(tmp_path: Path) -> None:
    tokenizer = ScriptedEngine(Script(["x"])).tokenizer
    (tmp_path / "replay.sqlite").write_bytes(b"no database" * 1000)
    for directory in (tmp_path, tmp_path / "missing"):
        replays = Replays(directory)
        replays.put(["c1"], turn(tokenizer, "hello"), tokenizer)
        assert replays.get("c1", tokenizer) == turn(tokenizer, "hello")
        assert replays.get("c2", tokenizer) is None
        replays.close()


def test_another_tokenizer_finds_nothing(tmp_path: Path) -> None:
    tokenizer = ScriptedEngine(Script(["x"])).tokenizer
    replays = Replays(tmp_path)
    replays.put(["c1"], turn(tokenizer, "hello"), tokenizer)
    replays.close()

    class Other:
        vocab_size = tokenizer.vocab_size

        def decode(self, ids: Any) -> str:
            return "something else"

    other: Any = Other()
    again = Replays(tmp_path)
    assert again.get("c1", other) is None
    assert again.get("\ud800", tokenizer) is None  # and the rest can still be read
    assert again.get("c1", tokenizer) == turn(tokenizer, "hello")
    again.close()
