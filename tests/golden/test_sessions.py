"""A session at position p is the same whatever its history: rewind, chunks, snapshots, neighbours.

Runs on the golden set with V4-Flash's ratios (128 and 4) and window, whose weights are random, so
that every part of the state matters. Equality is bit for bit.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ds4py import Engine, EngineOptions, SamplingOptions, Session
from ds4py.engine.pacing import Pacer
from ds4py.errors import InputError, OptionsError, PromptError
from tests.golden.sets import DATA, load

SET = DATA / "flashlike"
N = 300


@pytest.fixture(scope="module", params=["auto", "reference"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.open(SET, EngineOptions(kernels=request.param, prefill_chunk=64))


@pytest.fixture(scope="module")
def host() -> Engine:
    return Engine.open(SET, EngineOptions(prefill_chunk=96))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(t) for t in np.resize(load("flashlike")["input_ids"], N)]


def test_chunks_of_any_size_agree(engine: Engine, ids: list[int]) -> None:
    whole = engine.score(ids)
    for chunks in ([126, *[1] * 8, 166], [5, 7, 64, 129, 1, 2, 92], [127, 1, 1, 127, 44]):
        np.testing.assert_array_equal(engine.score(ids, chunks), whole)


def test_a_paced_session_reads_the_same(ids: list[int]) -> None:
    """However short its chunks must be, and whatever it was asked for."""
    engine = Engine.open(SET, EngineOptions(prefill_chunk=128))
    plain = engine.session()
    plain.sync(ids)
    engine.pacer = Pacer(limit_s=1e-9)
    paced = engine.session()
    chunks: list[int] = []
    paced.sync(ids, lambda stage, done, total: chunks.append(done))
    assert chunks[:3] == [128, 160, 192], "the first one is measured, the others are shortest"
    np.testing.assert_array_equal(paced.logits(), plain.logits())
    assert paced.tokens == ids


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.long)])
def test_rewind_at_every_phase(host: Engine, ids: list[int], every: int) -> None:
    """Of the ratios 4 and 128; of the latter's, a third unless there is time."""
    expected = host.score(ids)
    session = host.session()
    for position in range(128, 256, every):
        other = [*ids[:position], (ids[position] + 1) % 96, 5, 6, 7, 8, 9]
        session.sync(other)
        session.rewind(position)
        assert session.position == position
        np.testing.assert_array_equal(session.logits(), expected[position - 1])
        session.sync(ids[: position + 5])
        np.testing.assert_array_equal(session.logits(), expected[position + 4])


def test_interleaved_sessions_equal_separate_ones(engine: Engine, ids: list[int]) -> None:
    options = SamplingOptions(seed=5, max_tokens=9, temperature=1.3)

    def start(offset: int) -> Iterator[int]:
        session = engine.session()
        session.sync(ids[offset : offset + 130])
        return (token.id for token in session.generate(options))

    separate = [list(start(0)), list(start(40))]
    one, two = start(0), start(40)
    mixed = list(zip(one, two, strict=True))
    assert [list(column) for column in zip(*mixed, strict=True)] == separate


def test_snapshot_continues_bit_for_bit(engine: Engine, ids: list[int], tmp_path: Path) -> None:
    expected, session = engine.score(ids), engine.session()
    for cut in (1, 127, 128, 131, 256):
        session.sync(ids[:cut])
        session.save(tmp_path / "s")
        restored = engine.restore(tmp_path / "s")
        assert restored.tokens == ids[:cut]
        np.testing.assert_array_equal(restored.logits(), expected[cut - 1])
        end = min(cut // 128 * 128 + 132, N)  # behind the row of the ratio 128 that was begun
        assert restored.sync(ids[:end]) == cut
        np.testing.assert_array_equal(restored.logits(), expected[end - 1])


def test_damaged_and_foreign_snapshots(host: Engine, ids: list[int], tmp_path: Path) -> None:
    session = host.session()
    session.sync(ids[:140])
    session.save(tmp_path / "s")
    data = (tmp_path / "s").read_bytes()
    for name, content in (("cut", data[:-5]), ("empty", b""), ("noise", b"x" * 400)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            host.restore(tmp_path / name)
    other = Engine.open(SET, EngineOptions(trained_rounding=False))
    with pytest.raises(InputError, match="another model or with other numerics"):
        other.restore(tmp_path / "s")
    with pytest.raises(InputError, match="does not exist"):
        host.restore(tmp_path / "absent")
    with pytest.raises(InputError, match="cannot be written"):
        session.save(tmp_path / "no" / "such")
    assert {p.name for p in tmp_path.iterdir()} == {"s", "cut", "empty", "noise"}


def test_sync_reuses_the_common_prefix(host: Engine, ids: list[int]) -> None:
    session = host.session()
    assert session.sync(ids[:200]) == 0
    assert session.sync(ids[:200]) == 200
    assert session.sync(ids) == 200
    branch = [*ids[:250], 7, 7]
    assert 192 <= session.sync(branch) <= 250
    assert session.tokens == branch
    np.testing.assert_array_equal(session.logits(), host.score(branch)[-1])
    assert session.sync(branch[:192]) == 192, "a checkpoint knows what comes next"
    np.testing.assert_array_equal(session.logits(), host.score(branch[:192])[-1])


def test_an_abandoned_generation_keeps_what_was_handed_out(host: Engine, ids: list[int]) -> None:
    session = host.session()
    session.sync(ids[:120])
    steps = session.generate(SamplingOptions(seed=1))
    got = [next(steps).id for _ in range(11)]
    steps.close()  # type: ignore[attr-defined]
    assert session.tokens == ids[:120] + got
    np.testing.assert_array_equal(session.logits(), host.score(session.tokens)[-1])


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt."""


@pytest.mark.parametrize("at", [1, 2, 5, 9])
def test_interrupt_inside_a_step(host: Engine, ids: list[int], at: int) -> None:
    """An interrupt between a commit and its record leaves tokens and state in agreement."""
    session = host.session()
    session.sync(ids[:126])
    count, commit = 0, session._state.commit

    def interrupting(delta: object, n: int) -> None:
        nonlocal count
        commit(delta, n)  # type: ignore[arg-type]
        count += 1
        if count == at:
            raise Interrupted

    session._state.commit = interrupting  # type: ignore[method-assign,assignment]
    with pytest.raises(Interrupted):
        list(session.generate(SamplingOptions(seed=1)))
    session._state.commit = commit  # type: ignore[method-assign]
    assert session.position == 126 + at - 1 == session._state.position
    np.testing.assert_array_equal(session.logits(), host.score(session.tokens)[-1])


def test_seed_reproduces_and_matters(host: Engine, ids: list[int]) -> None:
    def run(seed: int | None, **options: float) -> list[int]:
        session = host.session()
        session.sync(ids[:50])
        sampling = SamplingOptions(seed=seed, max_tokens=16, **options)  # type: ignore[arg-type]
        return [token.id for token in session.generate(sampling)]

    assert run(3) == run(3) != run(4)
    assert run(None, temperature=0.0) == run(7, temperature=0.0)


def test_limits_and_bad_prompts(host: Engine) -> None:
    small = Engine.open(SET, EngineOptions(context=20))
    session = small.session()
    with pytest.raises(PromptError, match="21 tokens but the context is 20"):
        session.sync([1] * 21)
    with pytest.raises(PromptError, match="no tokens"):
        session.sync([])
    with pytest.raises(PromptError, match="outside the model's vocabulary"):
        session.sync([1, 99999])
    with pytest.raises(PromptError, match="empty"):
        next(session.generate())
    session.sync([1] * 15)
    with pytest.raises(OptionsError, match="from 0 to 15"):
        session.rewind(16)
    tokens = list(session.generate(SamplingOptions(stop_at_eos=False)))
    assert (len(tokens), tokens[-1].finish_reason) == (5, "length")
    with pytest.raises(PromptError, match="is full"):
        next(session.generate())
    session.rewind(0)
    assert session.tokens == []
    with pytest.raises(OptionsError, match="chunks add up to 2"):
        host.score([1, 2, 3], [1, 1])


def test_draft_logits_do_not_depend_on_chunks(host: Engine, ids: list[int]) -> None:
    other = Engine.open(SET, EngineOptions(prefill_chunk=17))
    np.testing.assert_array_equal(host.score_mtp(ids), other.score_mtp(ids))


def test_state_grows_with_rows_only(host: Engine, ids: list[int]) -> None:
    session: Session = host.session()
    session.sync(ids[:130])  # a row of every kind: everything is allocated
    small = session.n_bytes
    session.sync(ids)
    assert session.n_bytes == small
