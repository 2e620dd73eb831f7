"""Saved conversations: private, whole or not at all, and never outside their folder."""

import json
from pathlib import Path

import pytest

from ds4py.cli.store import Store, StoreError, state_directory
from ds4py.errors import OptionsError

TALK = {"version": 1, "messages": [{"role": "user", "content": "hé"}]}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_saved_can_be_loaded_and_is_private(tmp_path: Path) -> None:
    store = Store(tmp_path / "state" / "ds4")
    path = store.save("first", TALK)
    assert store.load("first") == TALK and store.names() == ["first"]
    assert mode(path) == 0o600
    assert mode(path.parent) == mode(store.directory) == 0o700
    assert mode(store.history_file()) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["first.json"]


def test_a_failed_save_leaves_the_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("talk", TALK)
    with pytest.raises(TypeError):
        store.save("talk", {"messages": [object()]})
    (tmp_path / "chats" / "taken.json").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        store.save("taken", TALK)
    assert store.load("talk") == TALK
    assert sorted(p.name for p in (tmp_path / "chats").iterdir()) == ["taken.json", "talk.json"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "x" * 65, "a b", "é", "a\n"])
def test_names_that_could_leave_the_folder(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    for action in (store.load, store.snapshot, lambda n: store.save(n, TALK)):
        with pytest.raises(OptionsError, match="cannot name"):
            action(name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_conversation_names_those_there_are(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="none was saved yet"):
        store.load("x")
    store.save("b", TALK)
    store.save("a", TALK)
    with pytest.raises(StoreError, match="no saved conversation x; there are: a, b"):
        store.load("x")


@pytest.mark.parametrize(
    "content",
    [b"{", b"\xff", b"[]", b"{}", b'{"messages": 1}', b'{"messages": [1]}']
    + [json.dumps({"messages": [m]}).encode() for m in ({"role": "x", "content": ""}, {})],
)
def test_a_file_that_is_no_conversation(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.save("talk", TALK).write_bytes(content)
    with pytest.raises(StoreError, match="is not a saved conversation"):
        store.load("talk")


def test_the_state_directory_is_the_users() -> None:
    assert state_directory({"XDG_STATE_HOME": "/s"}) == Path("/s/ds4")
    at_home = Path.home() / ".local" / "state" / "ds4"
    assert state_directory({}) == state_directory({"XDG_STATE_HOME": "relative"}) == at_home
