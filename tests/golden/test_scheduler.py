"""Several sessions in one budget: what each request finds, who is dropped, and that nobody notices.

Runs on the golden set with V4-Flash's ratios and window. Equality is bit for bit.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from ds4py import Engine, EngineOptions, SamplingOptions, Session
from ds4py.engine.scheduler import Scheduler
from ds4py.errors import CapacityError, PromptError
from ds4py.text.messages import Segment
from tests.golden.sets import DATA, load

GREEDY = SamplingOptions(max_tokens=12, temperature=0.0, stop_at_eos=False)
ROOM = 1 << 30


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open(DATA / "flashlike", EngineOptions(prefill_chunk=64))


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(t) for t in np.resize(load("flashlike")["input_ids"], 420)]


class Clock:
    """Seconds that pass when told to, in either direction."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def read(session: Session, tokens: list[int]) -> list[float]:
    session.sync(tokens)
    return session.logits()


def test_forks_share_rows_and_disturb_nobody(engine: Engine, ids: list[int]) -> None:
    session = engine.session()
    session.sync(ids[:300])
    forks = [session.fork(300), session.fork(256), session.fork(130)]
    assert [fork.position for fork in forks] == [300, 256, 128]
    shared = {id(store.data) for store in session._state.rows.values()}
    for fork in forks:
        assert {id(store.data) for store in fork._state.rows.values()} == shared
        assert fork.tokens == ids[: fork.position]
    assert read(forks[0], ids[:300]) == session.logits()
    prompts = [[*ids[: fork.position], 5 + n, *ids[200:240]] for n, fork in enumerate(forks)]
    slices = [f.sync_slices(p, 16) for f, p in zip(forks, prompts, strict=True)]
    for _ in range(5):  # in turns, with the first session appending as well
        for part in slices:
            next(part, None)
        session.sync([*session.tokens, 9])
    for fork, prompt in zip([session, *forks], [session.tokens, *prompts], strict=True):
        assert fork.tokens == prompt
        np.testing.assert_array_equal(fork.logits(), engine.score(prompt)[-1])
    session.rewind(140)
    session.sync(ids[:150])
    np.testing.assert_array_equal(forks[1].logits(), engine.score(prompts[1])[-1])
    forks[1].sync([*prompts[1], 3])
    np.testing.assert_array_equal(forks[1].logits(), engine.score([*prompts[1], 3])[-1])


def test_forks_of_lazy_arrays(ids: list[int]) -> None:
    lazy = Engine.open(DATA / "flashlike", EngineOptions(kernels="reference", prefill_chunk=64))
    session, alone = lazy.session(), [lazy.session(), lazy.session()]
    for one in [session, *alone]:
        one.sync(ids[:66])
    both = [session, session.fork(66)]
    for n in range(66, 70):
        for one, same, new in zip(both, alone, ([1, 2, 3, 4], [5, 6, 7, 8]), strict=True):
            prompt = [*ids[:66], *new[: n - 65]]
            assert read(one, prompt) == read(same, prompt)


def test_slices_are_bounded_and_can_be_dropped(engine: Engine, ids: list[int]) -> None:
    session = engine.session()
    slices = session.sync_slices(ids[:200], 24)
    done = [next(slices)[0] for _ in range(3)]
    assert done == [24, 48, 72] and session.position == 72
    slices.close()  # type: ignore[attr-defined]
    assert list(session.sync_slices(ids[:200], 50))[-1] == (128, 128)
    assert session.reused == 72
    np.testing.assert_array_equal(session.logits(), engine.score(ids[:200])[-1])
    with pytest.raises(PromptError):
        session.sync_slices([])
    assert session.position == 200


def test_a_conversation_goes_on_where_it_was(engine: Engine, ids: list[int]) -> None:
    scheduler = Scheduler(engine, ROOM)
    first = scheduler.acquire(ids[:150], "a")
    first.sync(ids[:150])
    reply = [token.id for token in first.generate(GREEDY)]
    scheduler.release(first)
    prompt = [*ids[:150], *reply, *ids[150:200]]
    again = scheduler.acquire(prompt, "a")
    assert again is first
    assert again.sync(prompt) == 162
    scheduler.release(again)
    edited = [*ids[:140], 7, 7]
    third = scheduler.acquire(edited, "a")
    assert third is first and third.sync(edited) == 128
    np.testing.assert_array_equal(third.logits(), engine.score(edited)[-1])


def test_others_get_forks(engine: Engine, ids: list[int]) -> None:
    """A second conversation on the same prefix, and a side request, leave the first as it is."""
    scheduler = Scheduler(engine, ROOM)
    first = scheduler.acquire(ids[:300])
    first.sync(ids[:300])
    other = scheduler.acquire([*ids[:270], 1, 2])  # while the first is in use
    assert other is not first and other.sync([*ids[:270], 1, 2]) == 256
    scheduler.release(first)
    branch = scheduler.acquire([*ids[:200], 1, 2])
    assert branch is not first and branch.sync([*ids[:200], 1, 2]) == 192
    side = scheduler.acquire([*ids[:300], 8, 9], side=True)
    assert side is not first and side.sync([*ids[:300], 8, 9]) == 300
    assert first.tokens == ids[:300]
    separate = sum(sum(s.arrays().values()) for s in (first, other, branch, side))
    assert scheduler.n_bytes < separate
    assert scheduler.acquire([*ids[:300], 4]) is first


def fill(scheduler: Scheduler, prompts: Iterator[list[int]], side: bool = False) -> list[Session]:
    """Acquire and read until there is no room."""
    taken: list[Session] = []
    while True:
        prompt = next(prompts)
        try:
            taken.append(scheduler.acquire(prompt, side=side))
        except CapacityError:
            return taken
        taken[-1].sync(prompt)
        assert scheduler.n_bytes <= scheduler.kv_bytes


def test_the_budget_holds_and_the_least_valuable_goes_first(engine: Engine, ids: list[int]) -> None:
    clock, prompts = Clock(), ([n, *ids[:99]] for n in range(96))
    scheduler = Scheduler(engine, 5_000_000, clock=clock)
    taken = fill(scheduler, prompts)
    assert len(taken) >= 3
    with pytest.raises(CapacityError, match=f"{len(taken)} sessions in use") as full:
        scheduler.acquire(next(prompts))
    assert full.value.retry_after == 1
    scheduler.release(taken[0], awaiting_tool=True)
    with pytest.raises(CapacityError) as full:
        scheduler.acquire(next(prompts))
    assert full.value.retry_after == scheduler._pin_seconds
    for session in taken[1:]:
        scheduler.release(session)
    later = fill(scheduler, prompts)  # in the place of all but the pinned one
    assert len(later) == len(taken) - 1
    again = [*taken[0].tokens, 1]
    assert taken[0].reusable(again) == 100 and scheduler.acquire(again) is taken[0]
    scheduler.release(taken[0], awaiting_tool=True)
    clock.now -= 1e6  # a clock that jumps back keeps a pin for longer, not for ever
    assert fill(scheduler, prompts) == []
    clock.now += 1e6 + scheduler._pin_seconds
    assert len(fill(scheduler, prompts)) == 1
    with pytest.raises(CapacityError, match="prompt needs") as never:
        Scheduler(engine, 100_000).acquire(next(prompts))
    assert never.value.retry_after is None


def test_side_requests_do_not_push_out_the_conversation(engine: Engine, ids: list[int]) -> None:
    prompts = ([n, *ids[:99]] for n in range(96))
    scheduler = Scheduler(engine, 5_000_000)
    main = scheduler.acquire(ids[:100], "main")
    main.sync(ids[:100])
    scheduler.release(main)
    for _ in range(3):
        sides = fill(scheduler, prompts, side=True)
        assert len(sides) >= 2
        for side in sides:
            scheduler.release(side)
    assert scheduler.acquire([*ids[:100], 1], "main") is main
    assert main.tokens[:100] == ids[:100]
    scheduler.release(main)
    others = fill(scheduler, prompts)  # conversations of their own may: side sessions go first
    assert len(others) > len(sides)


def test_the_next_prompt_finds_the_turn_when_reasoning_is_dropped() -> None:
    engine = Engine.open("tiny")
    from ds4py.text import chat

    tokenizer = engine.tokenizer
    assert tokenizer is not None
    asked = [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.encode(chat.segments(asked, thinking=True))
    scheduler = Scheduler(engine, ROOM)
    session = scheduler.acquire(prompt)
    session.sync(prompt)
    list(session.generate(GREEDY))
    scheduler.release(session)
    asked += [
        {"role": "assistant", "content": "Hello", "reasoning_content": "greet"},
        {"role": "user", "content": "2+2?"},
    ]
    again = tokenizer.encode(chat.segments(asked, thinking=True))
    assert scheduler.acquire(again) is session
    assert session.sync(again) == len(prompt) - 1  # all but <think>
    scheduler.release(session)
    other = tokenizer.encode(chat.segments([asked[0], {"role": "user", "content": "Why?"}]))
    branch = scheduler.acquire(other)
    first_turn = prompt.index(tokenizer.control_id("<｜User｜>"))
    assert branch is not session and branch.sync(other) == first_turn


def test_a_reply_in_its_own_spelling_is_found() -> None:
    engine = Engine.open("tiny")
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    letters = [t for c in "hello there" for t in tokenizer.encode(f"x{c}")[-1:]]
    eos = [engine.config.eos_token_id]
    spelled = [engine.config.bos_token_id, *letters, *eos]
    said = [spelled[0], *tokenizer.encode([Segment(""), Segment(tokenizer.decode(letters))]), *eos]
    assert said != spelled
    scheduler = Scheduler(engine, ROOM)
    session = scheduler.acquire(spelled)
    session.sync(spelled)
    scheduler.release(session)
    prompt = [*said, 100, 101]
    assert scheduler.respell(prompt) == [*spelled, 100, 101]
    assert scheduler.respell([*spelled, 100]) == [*spelled, 100]
    assert scheduler.respell([7, *prompt]) == [7, *prompt]
    assert scheduler.acquire(scheduler.respell(prompt)) is session
    assert session.sync(scheduler.respell(prompt)) == len(spelled)


def test_a_step_copies_no_rows(ids: list[int]) -> None:
    """What a token takes beside the state does not grow with the room for rows."""
    lazy = Engine.open(DATA / "flashlike", EngineOptions(kernels="reference", prefill_chunk=64))
    session = lazy.session()
    session.sync(ids[:40])
    rows = session._state.rows["attn4"]
    room = mx.zeros((rows.data.shape[0], 200_000, rows.data.shape[2]), rows.data.dtype)
    rows.data = mx.concatenate([rows.data, room], axis=1)
    mx.eval(rows.data)
    del room
    steps = session.generate(SamplingOptions(max_tokens=12, stop_at_eos=False))
    next(steps)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(8):  # two rows are completed
        next(steps)
    assert mx.get_peak_memory() - before < rows.data.nbytes / 8
