"""Sessions through the store: bit for bit what they were, and never anything else.

Runs on the golden set with V4-Flash's ratios and window; from 68 tokens on the indexer selects.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ds4py import Engine, EngineOptions, SamplingOptions, Session
from ds4py.cache.store import Store
from ds4py.engine.disk import DiskSessions
from ds4py.engine.scheduler import Scheduler
from tests.golden.sets import DATA, load

ROOM = 1 << 28
SET = DATA / "flashlike"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open(SET, EngineOptions(prefill_chunk=64))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(t) for t in np.resize(load("flashlike")["input_ids"], 700)]


@pytest.fixture
def kept(engine: Engine, tmp_path: Path) -> Iterator[Callable[[Engine], DiskSessions]]:
    """Opens the same directory for an engine, as often as asked."""
    opened: list[Store] = []

    def open_for(engine: Engine) -> DiskSessions:
        opened.append(Store.open(tmp_path / "kv", ROOM))
        return DiskSessions(engine, opened[-1])

    yield open_for
    for store in opened:
        assert store.trouble is None
        store.close()


Kept = Callable[[Engine], DiskSessions]


def generated(session: Session, n: int) -> list[int]:
    options = SamplingOptions(seed=3, max_tokens=n, temperature=1.2, stop_at_eos=False)
    return [token.id for token in session.generate(options)]


def arrays(session: Session) -> dict[str, bytes]:
    """Everything a session's future depends on."""
    image = session.image()
    named = {**image.rows, **image.frontier, "tokens": image.tokens, "logits": session.logits()}
    return {name: np.asarray(array).tobytes() for name, array in named.items()}


def test_restored_goes_on_as_if_never_stopped(engine: Engine, ids: list[int], kept: Kept) -> None:
    disk = kept(engine)
    session = engine.session()
    cuts = (32, 127, 128, 131, 257)
    for cut in cuts:
        session.sync(ids[:cut])
        assert disk.keep(session)
    whole = engine.session()
    again = kept(Engine.open(SET, EngineOptions(prefill_chunk=96)))
    for cut in cuts:
        restored = again._engine.session()
        assert again.restore(restored, ids[:cut]) == cut
        whole.sync(ids[:cut])
        assert arrays(restored) == arrays(whole)
        assert generated(restored, 9) == generated(whole, 9)
        assert arrays(restored) == arrays(whole)
        restored.rewind(max(cut - 5, 1))
        whole.rewind(max(cut - 5, 1))
        assert arrays(restored) == arrays(whole)
    four = [again._engine.session() for _ in cuts[-4:]]
    for session, cut in zip(four, cuts[-4:], strict=True):
        again.restore(session, ids[:cut])
    options = SamplingOptions(seed=3, max_tokens=5, temperature=1.2, stop_at_eos=False)
    for _ in zip(*(session.generate(options) for session in four), strict=True):
        pass  # in turns
    for session, cut in zip(four, cuts[-4:], strict=True):
        whole.sync(ids[:cut])
        generated(whole, 5)
        assert arrays(session) == arrays(whole)


def test_another_model_is_a_miss(engine: Engine, ids: list[int], kept: Kept) -> None:
    session = engine.session()
    session.sync(ids[:200])
    assert kept(engine).keep(session)
    for options in (
        EngineOptions(trained_rounding=False),
        EngineOptions(dtype="float32"),
        EngineOptions(kernels="reference"),
    ):
        other = Engine.open(SET, options)
        assert kept(other).reusable(ids[:200]) == 0
    small = Engine.open(SET, EngineOptions(context=150))
    fresh = small.session()
    assert kept(small).restore(fresh, ids[:200]) == 0 and fresh.position == 0


def test_files_of_one_model_in_the_place_of_anothers(
    engine: Engine, ids: list[int], tmp_path: Path
) -> None:
    """Even a segment that is whole and has the right name is refused when it says otherwise."""
    other = Engine.open(SET, EngineOptions(dtype="float32"))
    names = []
    for n, one in enumerate((engine, other)):
        store = Store.open(tmp_path / str(n), ROOM)
        session = one.session()
        session.sync(ids[:200])
        assert DiskSessions(one, store).keep(session)
        names.append(sorted((tmp_path / str(n)).glob("s*/*")))
        store.close()
    for mine, theirs in zip(*names, strict=True):
        shutil.copy(theirs, mine)
    store = Store.open(tmp_path / "0", ROOM)
    session = engine.session()
    disk = DiskSessions(engine, store)
    assert disk.reusable(ids[:200]) == 200 and disk.restore(session, ids[:200]) == 0
    assert disk.reusable(ids[:200]) == 0
    session.sync(ids[:200])
    np.testing.assert_array_equal(session.logits(), engine.score(ids[:200])[-1])
    assert [disk.keep(session) and disk.restore(engine.session(), ids[:200]) for _ in (1, 2)] == [
        0,  # the segment is met only now, and dropped
        200,
    ]
    store.close()


def test_a_dropped_session_comes_back_from_disk(engine: Engine, ids: list[int], kept: Kept) -> None:
    disk = kept(engine)
    scheduler = Scheduler(engine, 3_000_000, disk)
    prompts = [[n, *ids[:300]] for n in range(5)]
    expected = []
    for prompt in prompts:
        session = scheduler.acquire(prompt)
        session.sync(prompt)
        expected.append(session.logits())
        scheduler.release(session)
        assert scheduler.n_bytes <= scheduler.kv_bytes
    assert scheduler.stats()["parked"] > 0 and scheduler.stats()["dropped"] == 0
    for prompt, logits in zip(prompts, expected, strict=True):
        session = scheduler.acquire([*prompt, 5])
        assert session.sync([*prompt, 5]) == 301
        session.rewind(301)
        np.testing.assert_array_equal(session.logits(), logits)
        scheduler.release(session)
    scheduler.close()
    after = Scheduler(engine, 3_000_000, kept(engine))
    assert after.acquire(prompts[0]).position == 301
    assert after.stats()["reused_disk"] == 301


def test_answers_need_not_wait_for_the_disk(engine: Engine, ids: list[int], tmp_path: Path) -> None:
    reader = Store.open(tmp_path / "kv", ROOM)  # before there is a directory
    disk = DiskSessions(engine, Store.open(tmp_path / "kv", ROOM), background=True)
    scheduler = Scheduler(engine, ROOM, disk)
    for end in (150, 300, 450):
        session = scheduler.acquire(ids[:end])
        session.sync(ids[:end])
        scheduler.release(session)
    scheduler.close()
    assert [DiskSessions(engine, reader).reusable(ids[:n]) for n in (450, 449, 200)] == [
        450, 300, 150,
    ]  # fmt: skip
    assert disk.reusable(ids) == 450 and disk.store.trouble is None
    reader.close()
    disk.store.close()


def test_a_snapshot_that_fails_is_replaced_by_a_fork(
    engine: Engine, ids: list[int], kept: Kept
) -> None:
    disk = kept(engine)
    session = engine.session()
    session.sync(ids[:400])
    assert disk.keep(session)
    scheduler = Scheduler(engine, ROOM, disk)
    first = scheduler.acquire(ids[:200])
    first.sync(ids[:200])
    for path in disk.store.directory.glob("s*/*"):
        path.write_bytes(path.read_bytes()[:-1])
    second = scheduler.acquire([*ids[:401]])
    assert second.reusable(ids) == 200 and second is not first
    assert scheduler.stats()["reused_live"] == 200 and scheduler.stats()["reused_disk"] == 0
    disk.store.trouble = None


def test_bytes_of_growth(engine: Engine, ids: list[int], kept: Kept) -> None:
    """200 more tokens: their rows and a quarter more, 64 KiB and one frontier at most."""
    disk, session = kept(engine), engine.session()

    def size() -> int:
        return sum(p.stat().st_size for p in disk.store.directory.rglob("*") if p.is_file())

    session.sync(ids[:500])
    disk.keep(session)
    before = size()
    session.sync(ids)
    disk.keep(session)
    per_token = sum(
        store.row_bytes * store.data.shape[0] / s.ratio
        for s, store in zip(session._state.series, session._state.rows.values(), strict=True)
    )
    frontier = session._state.frontier.n_bytes
    assert size() - before < 200 * per_token * 1.25 + 65536 + frontier


def test_the_seed_of_an_answer_is_kept(engine: Engine, ids: list[int], tmp_path: Path) -> None:
    """An answer drawn with a seed of its own can be taken up where it was cut."""
    session = engine.session()
    session.sync(ids[:150])
    options = SamplingOptions(max_tokens=20, temperature=1.5, stop_at_eos=False)
    first = [token.id for token in session.generate(options)]
    assert session.seed is not None
    session.rewind(160)
    session.save(tmp_path / "s")
    restored = engine.restore(tmp_path / "s")
    options = SamplingOptions(max_tokens=10, temperature=1.5, stop_at_eos=False, seed=restored.seed)
    assert [token.id for token in restored.generate(options)] == first[10:]
