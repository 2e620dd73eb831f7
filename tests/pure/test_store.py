"""The store finds the longest prefix, writes what is new, gives back what was saved or nothing."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from ds4py.cache.rows import row_formats
from ds4py.cache.snapshot import capture
from ds4py.cache.state import SequenceState
from ds4py.cache.store import SEGMENT, Store
from ds4py.config import ModelConfig
from ds4py.errors import InputError
from ds4py.hub import manifest
from ds4py.kernels.ops import MlxOps
from tests.pure import images

ROOM = 1 << 26
MODEL = "model one"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "kv", ROOM)
    yield opened
    opened.close()


def save(store: Store, tokens: np.ndarray, identity: str = MODEL) -> bool:
    start = store.stored_tokens(identity, tokens.tolist())
    return store.save(identity, images.image(tokens, start), images.text(tokens))


def longest(store: Store, tokens: np.ndarray, identity: str = MODEL) -> int:
    """Length of the longest prefix that loads, after comparing it with what was saved."""
    for found in store.prefixes(identity, images.text(tokens)):
        image = store.load(found, tokens[: found.tokens].tolist())
        if image is not None:
            assert images.same(image, images.image(tokens[: found.tokens]))
            return found.tokens
    return 0


def size(store: Store) -> int:
    return sum(p.stat().st_size for p in store.directory.glob("s*/*"))


def test_the_longest_prefix_is_found(store: Store) -> None:
    tokens = images.ids(1, 1000)
    for n in (5, 127, 128, 129, 300, 640):
        assert save(store, tokens[:n])
    for n, expected in ((4, 0), (5, 5), (127, 127), (200, 129), (639, 300), (1000, 640)):
        assert longest(store, tokens[:n]) == expected
    assert longest(store, images.ids(2, 1000)) == 0
    assert longest(store, images.ids(2, 1000, shared=400)) == 0
    assert longest(store, tokens, "another model") == 0
    assert store.trouble is None


def test_a_longer_one_costs_what_it_adds(store: Store) -> None:
    tokens = images.ids(1, 8192)
    assert save(store, tokens[:8000])
    before = size(store)
    assert save(store, tokens[:8192])
    rows = sum(np.prod(a.shape) for a in images.image(tokens[:192]).rows.values())
    assert size(store) - before < 1.25 * rows + 1000 + 5000  # a frontier, three headers
    assert save(store, tokens[:8192])
    assert longest(store, tokens) == 8192
    other = images.ids(3, 500, shared=256)
    assert save(store, other)
    assert store.stats()["segments"] == 64 + 3


def test_the_text_finds_and_the_ids_decide(store: Store) -> None:
    tokens = images.ids(1, 300)
    assert save(store, tokens)
    other = tokens.copy()
    other[100] += 1  # another spelling of the same text
    found = store.prefixes(MODEL, images.text(tokens))[0]
    assert store.ids(found) == tokens.tolist()
    assert store.load(found, other.tolist()) is None
    assert longest(store, tokens) == 300


def test_private(store: Store) -> None:
    os.umask(0o022)
    save(store, images.ids(1, 300))
    for path in [store.directory, *store.directory.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.parametrize("damage", ["lost", "noise", "empty", "old"])
def test_the_index_is_made_again(tmp_path: Path, damage: str) -> None:
    store = Store.open(tmp_path, ROOM)
    shared, branches = images.ids(1, 200), [images.ids(n, 500, shared=200) for n in (2, 3, 4)]
    shared = branches[0][:200]
    for tokens in (shared, *branches):
        save(store, tokens)
    before = {(e.name, e.tokens, e.n_bytes) for e in store.entries()}
    superseded = {e.tokens for e in store._index.tree().tree.entries if e.continuations < 2}
    store.close()
    path = tmp_path / "index.sqlite"
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes({"noise": os.urandom(9000), "empty": b"", "old": _old_index()}[damage])
    again = Store.open(tmp_path, ROOM)
    assert {(e.name, e.tokens, e.n_bytes) for e in again.entries()} == before
    for tokens in branches:
        assert longest(again, tokens) == 500
    tree = again._index.tree().tree
    assert {e.tokens for e in tree.entries if e.continuations < 2} == superseded == {500}
    again.close()


def test_an_index_cut_anywhere_is_made_again(tmp_path: Path) -> None:
    store, tokens = Store.open(tmp_path, ROOM), images.ids(1, 2000)
    for end in (300, 900, 2000):
        assert save(store, tokens[:end])
    store.close()
    path = tmp_path / "index.sqlite"
    data = path.read_bytes()
    for n in range(0, len(data), 3500):
        path.write_bytes(data[:n])
        again = Store.open(tmp_path, ROOM)
        found = {e.tokens: again.ids(e) for e in again.entries()}
        assert found == {end: tokens[:end].tolist() for end in (300, 900, 2000)}, n
        again.close()


@pytest.mark.parametrize("which", ["parent IS NULL", "name = :last"], ids=["all", "one"])
def test_an_index_that_goes_in_circles(store: Store, which: str) -> None:
    tokens = images.ids(1, 700)
    assert save(store, tokens)
    (found,) = store.entries()
    change = f"UPDATE segments SET parent = :last WHERE {which}"
    store._index._db.execute(change, {"last": found.parent})
    assert store.ids(found) == []
    assert store._index.tree().broken == [found.name]


def _old_index() -> bytes:
    import sqlite3

    db = sqlite3.connect(":memory:")
    db.executescript("CREATE TABLE snapshots(x); PRAGMA user_version = 99;")
    return db.serialize()


def test_damaged_files_are_misses_and_can_be_written_again(store: Store) -> None:
    tokens = images.ids(1, 400)
    for n in (130, 400):
        save(store, tokens[:n])
    for path in sorted(store.directory.glob("s*/*")):
        data = path.read_bytes()
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 4]) + data[-2:])
        assert longest(store, tokens[:130]) in (0, 130)
        assert longest(store, tokens) in (0, 130, 400)
        assert not path.exists()
        assert save(store, tokens[:130]) and save(store, tokens)
        assert longest(store, tokens) == 400
    victim = next(store.directory.glob("segments/*"))
    victim.write_bytes(b"x")
    assert [path for path, _ in store.verify()] == [victim]
    assert [path for path, _ in store.verify()] == []


def test_the_budget_holds_and_shared_prefixes_outlive_branches(tmp_path: Path) -> None:
    store = Store.open(tmp_path, 60_000)
    preamble = images.ids(0, 600)
    save(store, preamble)
    for n in range(1, 16):
        tokens = images.ids(n, 900, shared=600)
        store.use(MODEL, images.text(tokens), tokens.tolist())
        assert save(store, tokens)
        assert size(store) <= 60_000
        assert longest(store, tokens) == 900
        assert longest(store, images.ids(999, 900, shared=600)) == 600
    assert 1 < store.stats()["snapshots"] < 15
    assert not store.save(MODEL, images.image(images.ids(5, 9000)), b"t")
    assert store.trouble is not None and "--kv-space" in store.trouble
    assert store.stats()["bytes"] == size(store)
    store.close()


def test_the_end_of_the_last_turn_replaces_the_one_before(tmp_path: Path) -> None:
    store = Store.open(tmp_path, 80_000)
    tokens = images.ids(1, 3000)
    for end in range(200, 1600, 100):
        assert save(store, tokens[:end])
        assert longest(store, tokens) == end
    kept = [e.tokens for e in store.entries()]
    assert max(kept) == 1500 and size(store) <= 80_000
    store.close()


def test_removing_frees_what_nobody_else_needs(store: Store) -> None:
    a, b = images.ids(1, 700, shared=300), images.ids(2, 700, shared=300)
    save(store, a)
    alone = size(store)
    save(store, b)
    both = size(store)
    newest = store.prefixes(MODEL, images.text(b))[0]
    assert store.remove([newest.name, "unknown"]) == both - alone
    assert size(store) == alone
    assert longest(store, a) == 700 and longest(store, b) == 0


def test_a_clock_that_goes_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.open(tmp_path, 25_000)
    now = [2e9]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for n in range(10):
        now[0] -= 1e8
        tokens = images.ids(n, 500)
        assert save(store, tokens)
        assert longest(store, tokens) == 500
    store.close()


def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="cannot hold KV snapshots"):
            Store.open(path, ROOM)


def test_segments_are_whole_rows_of_the_released_ratios() -> None:
    assert SEGMENT % 128 == 0 == SEGMENT % 4


def test_a_habit_stays_until_it_is_given_up(tmp_path: Path) -> None:
    store = Store.open(tmp_path, 30_000)
    talk = images.ids(0, 2000)
    for end in range(400, 800, 50):
        assert save(store, talk[:end])
    assert not save(store, images.ids(1, 900))
    assert longest(store, talk) == 750
    tries = next(n for n in range(2, 40) if save(store, images.ids(n, 900)))
    assert tries > 3 and longest(store, images.ids(tries, 900)) == 900
    store.close()


@pytest.mark.parametrize("start", [8063, 8119])  # most rows to repeat; most of a frontier
def test_a_turn_of_flash_costs_its_rows_and_a_frontier(store: Store, start: int) -> None:
    known = manifest.load("flash")
    assert known is not None
    config = ModelConfig.from_dict(dict(known.config))
    rows = row_formats(MlxOps(), config, mx.bfloat16, rounded=True, native=True)
    state, end = SequenceState(config, config.layers, rows), start + 200
    for s in state.series:
        own = state.rows[s.name]
        own.write(0, mx.zeros((len(s.layers), s.count(end), own.data.shape[2]), mx.uint8))
    tokens, written = list(range(end)), []
    for position in (start, end):
        before, frontier = size(store), replace(state.frontier, position=position)
        image = capture(state, frontier, tokens, store.stored_tokens(MODEL, tokens[:position]))
        store.n_bytes = 1 << 30
        assert store.save(MODEL, image, images.text(image.tokens))
        written.append(size(store) - before)
    assert written[1] < 200 * 3515 * 1.25 + 64 * 1024 + state.frontier.n_bytes
