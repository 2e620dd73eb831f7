"""Responses that are stored: referred to, told and forgotten, also after a restart."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from ds4py.server.app import Rules
from ds4py.server.kept import Kept
from tests.server.scripted import Running, Script, ScriptedEngine

OFF: Any = {"effort": "none"}


def server(directory: Path | None, *answers: str) -> Running:
    return Running(ScriptedEngine(Script(list(answers))), Rules(state=directory))


def test_a_conversation_goes_on_after_a_restart(tmp_path: Path) -> None:
    with server(tmp_path, "The first.") as running:
        create = running.openai().responses.create
        first = create(model="m", input="One?", reasoning=OFF)
        unstored = create(model="m", input="Two?", reasoning=OFF, store=False)
        path = tmp_path / "responses.sqlite"
        assert path.stat().st_mode & 0o777 == 0o600
    assert b"Two?" not in path.read_bytes()
    with server(tmp_path, "The second.") as running:
        client = running.openai()
        ask: Any = {"model": "m", "reasoning": OFF}
        second = client.responses.create(input="More?", previous_response_id=first.id, **ask)
        prompt = running.engine.tokenizer.decode(running.engine.script.prompts[-1])
        assert "One?" in prompt and "The first." in prompt and "More?" in prompt
        reference: Any = {"type": "item_reference", "id": first.output[0].id}
        items: Any = [{"role": "user", "content": "Again?"}, reference]
        client.responses.create(input=[*items, {"role": "user", "content": "?"}], **ask)
        prompt = running.engine.tokenizer.decode(running.engine.script.prompts[-1])
        assert "Again?" in prompt and "The first." in prompt
        counted = client.responses.input_tokens.count(
            input="More?", previous_response_id=first.id, reasoning=OFF
        )
        assert counted.input_tokens == second.usage.input_tokens
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(input="More?", previous_response_id=unstored.id, **ask)
        assert caught.value.code == "previous_response_not_found"


@pytest.mark.parametrize("stored_on_disk", [True, False])
def test_a_response_is_told_and_forgotten(tmp_path: Path, stored_on_disk: bool) -> None:
    with server(tmp_path if stored_on_disk else None, "An answer.") as running:
        responses = running.openai().responses
        with responses.stream(model="m", input="One?", reasoning=OFF) as stream:
            first = stream.get_final_response()
        made = responses.create(
            model="m", input="Two?", previous_response_id=first.id, reasoning=OFF
        )
        for response in (first, made):
            told = responses.retrieve(response.id)
            assert told.output_text == "An answer."
            assert told.model_dump_json(exclude={"output": {"__all__": {"content"}}}) == (
                response.model_dump_json(exclude={"output": {"__all__": {"content"}}})
            )
        items = responses.input_items.list(made.id, order="asc", limit=2)
        assert [item.role for item in items.data] == ["user", "assistant"] and items.has_more
        assert items.data[0].content[0].text == "One?"
        assert [item.role for item in items] == ["user", "assistant", "user"]
        newest = responses.input_items.list(made.id).data[0]
        assert newest.content[0].text == "Two?"
        responses.delete(first.id)
        for gone in (responses.retrieve, responses.delete, responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match="is not known here"):
                gone(first.id)
        assert responses.retrieve(made.id).id == made.id
        assert responses.create(model="m", input="?", previous_response_id=made.id).id
        for wrong in ({"order": "x"}, {"limit": 0}, {"after": "x"}):
            with pytest.raises(openai.BadRequestError):
                responses.input_items.list(made.id, extra_query=wrong)
        with pytest.raises(openai.BadRequestError):
            responses.retrieve(made.id, stream=True)


def response(number: int, *texts: str) -> dict[str, Any]:
    output = [{"id": f"msg_{number}_{i}", "text": text} for i, text in enumerate(texts)]
    return {"id": f"resp_{number}", "output": output}


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    kept = Kept(tmp_path, max_bytes=50_000)
    history: list[Any] = [{"role": "user", "content": "x" * 1000}]
    for number in range(100):
        kept.put(response(number, "y" * 1000), history)
        history += response(number, "y" * 1000)["output"]
    # All share their items, so that the oldest go with their history, but for what others hold.
    assert kept.history("resp_99") == [*history]
    size = len(json.dumps(history))
    assert size > 50_000  # the last one stays, however long it is
    assert kept.history("resp_98") is None
    kept.put(response(100, "z"), [])
    assert kept.history("resp_99") is None and kept.item("msg_99_0") is None
    assert kept.history("resp_100") == response(100, "z")["output"]
    kept.close()
    again = Kept(tmp_path, max_bytes=50_000)
    assert again.item("msg_100_0") == {"id": "msg_100_0", "text": "z"}
    assert again.delete("resp_100") and not again.delete("resp_100")
    assert again.item("msg_100_0") is None
    again.close()


def test_many_responses(tmp_path: Path) -> None:
    kept = Kept(max_responses=20)
    for number in range(23):
        kept.put({"id": f"resp_{number}", "output": []}, ["same"])
    assert kept.history("resp_2") is None and kept.history("resp_3") == ["same"]
    kept.close()


def test_ids_that_no_database_can_hold(tmp_path: Path) -> None:
    """Half a surrogate pair, from a client, costs nobody anything."""
    kept, odd = Kept(tmp_path), "\ud800"
    kept.put(response(1, "a"), [{"id": odd, "role": "user", "content": odd}])
    assert kept.history(odd) is None and kept.item(odd) is None and not kept.delete(odd)
    kept.close()
    again = Kept(tmp_path)
    assert again.inputs("resp_1") == [{"id": odd, "role": "user", "content": odd}]
    again.close()


def test_a_damaged_or_missing_store_costs_only_what_was_kept(tmp_path: Path) -> None:
    (tmp_path / "responses.sqlite").write_bytes(b"no database" * 1000)
    for directory in (tmp_path, tmp_path / "missing"):
        kept = Kept(directory)
        assert kept.history("resp_1") is None
        kept.put(response(1, "a"), ["b"])
        assert kept.history("resp_1") == ["b", *response(1, "a")["output"]]
        assert kept.response("resp_1") == response(1, "a")
        kept.close()
