"""Decoding with guesses gives what decoding without them gives: tokens, logits and states, bit for
bit, wherever a guess is right, wrong, or cut off.

The golden set with V4-Flash's ratios and window has random weights, so every part of the state
matters; what is guessed there is told by the test. The embedded model guesses for itself.
"""

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4py import Engine, EngineOptions, SamplingOptions, Session
from ds4py.cache.snapshot import capture, capture_frontier
from ds4py.cache.state import SequenceState
from ds4py.cache.store import Store
from ds4py.engine.decode import Decoder
from ds4py.engine.disk import DiskSessions
from ds4py.engine.speculative import HEAD_START, SHARE, Speculation
from ds4py.errors import OptionsError
from ds4py.text import chat
from tests.golden.guesses import Counted, Eager, Told, content, started
from tests.golden.sets import DATA, load

SET = DATA / "flashlike"
OPTIONS = {
    "greedy": SamplingOptions(temperature=0),
    "sampled": SamplingOptions(seed=5, temperature=1.3, min_p=0),
    "hot": SamplingOptions(seed=5, temperature=2, min_p=0),
    "bounded": SamplingOptions(seed=6, top_k=40, top_p=0.8),
    "penalised": SamplingOptions(
        seed=7,
        temperature=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        logit_bias=((3, 2.0), (9, -np.inf)),
    ),
    "logprobs": SamplingOptions(seed=8, top_logprobs=3),
}


@pytest.fixture(scope="module")
def plain() -> Engine:
    return Engine.open(SET, EngineOptions(prefill_chunk=64))


@pytest.fixture(scope="module")
def drafting() -> Engine:
    return Engine.open(SET, EngineOptions(draft=True, prefill_chunk=64))


@pytest.fixture(scope="module")
def tiny() -> tuple[Engine, Engine]:
    """The embedded model without guesses, and with one at every step."""
    eager = Engine.open("tiny", EngineOptions(draft=True))
    eager.decoder = Decoder(eager.model, Eager(eager))
    return Engine.open("tiny"), eager


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return [int(t) for t in np.resize(load("flashlike")["input_ids"], 300)]


def options(name: str, **more: Any) -> SamplingOptions:
    return SamplingOptions(**{**vars(OPTIONS[name]), "stop_at_eos": False, **more})


class Case:
    """The same prompt continued without guesses."""

    def __init__(self, plain: Engine, prompt: list[int], sampling: SamplingOptions):
        self.prompt, self.sampling = prompt, sampling
        self.session = started(plain, prompt)
        self.made = list(self.session.generate(sampling))

    def check(self, drafting: Engine, right: Callable[[int], bool]) -> Speculation:
        told = Told(drafting, self.session.tokens, right)
        drafting.decoder = Decoder(drafting.model, told)
        session = started(drafting, self.prompt)
        assert list(session.generate(self.sampling)) == self.made
        assert content(session, drafts=False) == content(self.session)
        return told


@settings(max_examples=8)
@given(
    st.sampled_from([1, 2, 3, 61, 124, 125, 126, 127, 128, 129]),
    st.integers(1, 11),
    st.lists(st.booleans(), min_size=4, max_size=9),
    st.sampled_from(list(OPTIONS)),
)
def test_guesses_change_nothing(
    plain: Engine,
    drafting: Engine,
    ids: list[int],
    length: int,
    n_tokens: int,
    right: list[bool],
    name: str,
) -> None:
    """Around closing windows, under any options, with an end on either token of a pair."""
    case = Case(plain, ids[:length], options(name, max_tokens=n_tokens))
    case.check(drafting, lambda at: right[at % len(right)])


def test_a_step_may_be_taken_in_parts(drafting: Engine, ids: list[int]) -> None:
    """Some of its positions, later others, across rows of every ratio that they complete."""
    whole, parts = (drafting.model.new_state() for _ in range(2))
    for n_taken in ((1, 5, 3, 119, 6), (140,)):
        state = parts if len(n_taken) > 1 else whole
        _, delta = drafting.model.step(mx.array(ids[:140]), state)
        for n in n_taken:
            state.commit(delta, n)
    expected = capture(whole, whole.frontier, ids, 0)
    parts.commit(drafting.model.step(mx.array(ids[134:140]), parts)[1], 6)
    found = capture(parts, parts.frontier, ids, 0)
    for name, array in {**expected.rows, **expected.frontier}.items():
        np.testing.assert_array_equal({**found.rows, **found.frontier}[name], array, name)


def test_right_guesses_halve_the_steps(plain: Engine, drafting: Engine, ids: list[int]) -> None:
    case = Case(plain, ids[:121], options("sampled", max_tokens=14))
    told = case.check(drafting, lambda at: True)
    assert (told.drafted, told.accepted) == (7, 7)
    told = case.check(drafting, lambda at: False)
    assert (told.drafted, told.accepted) == (13, 0)


@pytest.mark.long
@pytest.mark.parametrize("name", list(OPTIONS))
def test_guesses_change_nothing_at_any_phase(
    plain: Engine, drafting: Engine, ids: list[int], name: str
) -> None:
    for length in (*range(1, 10), *range(120, 137), *range(250, 262)):
        case = Case(plain, ids[:length], options(name, max_tokens=9))
        for right in (lambda at: True, lambda at: False, lambda at: at % 3 > 0):
            case.check(drafting, right)


def test_a_session_holds_what_was_handed_out(
    plain: Engine, drafting: Engine, ids: list[int]
) -> None:
    """Closed after any token, between the two of a pair, too; rejected guesses leave no trace."""
    sampling = options("sampled", max_tokens=12)
    case = Case(plain, ids[:125], sampling)
    bases = started(drafting, ids[:125]), started(plain, ids[:125])
    for right in (lambda at: True, lambda at: False):
        drafting.decoder = Decoder(drafting.model, Told(drafting, case.session.tokens, right))
        for n_taken in (1, 2, 3, 6):
            session, other = (base.fork(125) for base in bases)
            for one in (session, other):
                tokens = one.generate(sampling)
                for _ in range(n_taken):
                    next(tokens)
                assert one.position == one._state.position == 125 + n_taken
                tokens.close()
            assert content(session, drafts=False) == content(other)
            never = bases[0].fork(125)
            never.sync(session.tokens)
            assert content(session) == content(never), "as if nobody had ever guessed"


def test_the_end_of_the_context(ids: list[int]) -> None:
    for length in (129, 130):
        engines = [
            Engine.open(SET, EngineOptions(draft=draft, context=140)) for draft in (False, True)
        ]
        case = Case(engines[0], ids[:length], options("greedy"))
        told = case.check(engines[1], lambda at: True)
        assert case.session.position == 140 and told.accepted >= 5


def test_rewind_and_fork(plain: Engine, drafting: Engine, ids: list[int]) -> None:
    """The draft layer's window goes back with the rest."""
    case = Case(plain, ids[:120], options("sampled", max_tokens=20))
    told = Told(drafting, case.session.tokens, lambda at: at % 3 > 0)
    drafting.decoder = Decoder(drafting.model, told)
    session = started(drafting, ids[:120])
    list(session.generate(case.sampling))
    for position in (137, 129, 128, 126, 1):
        forked = session.fork(position)
        forked.sync(session.tokens[:position])
        session.rewind(position)
        fresh = started(drafting, session.tokens)
        assert content(session) == content(fresh) == content(forked)


def test_a_prompt_read_in_any_chunks_leaves_the_same_window(tiny: tuple[Engine, Engine]) -> None:
    """Also where a turn begins inside a chunk that is longer than a window, or shorter."""
    _, engine = tiny
    assert engine.tokenizer is not None
    words = "One day, a little fox found a red ball. " * 8
    texts = [("user", words), ("assistant", "Yes."), ("user", words * 2), ("user", "Why?")]
    messages = [{"role": role, "content": text} for role, text in texts]
    prompt = engine.tokenizer.encode(chat.segments(messages, thinking=False))
    whole, parts = started(engine, prompt), engine.session()
    for _ in parts.sync_slices(prompt, 7):
        pass
    assert content(whole) == content(parts)
    turns = [turn.position for turn in whole.turns()]
    assert len(turns) >= 3 and max(turns) > 200
    for position in turns:
        forks = [session.fork(position) for session in (whole, parts)]
        assert [fork.position for fork in forks] == [position, position]
        captured = [fork.image().frontier for fork in forks]
        assert captured[0].keys() == captured[1].keys() and "draft" in captured[0]
        for name, array in captured[0].items():
            np.testing.assert_array_equal(array, captured[1][name], name)


def guessed(session: Session, n: int) -> list[list[float]]:
    """Draft logits of the next n tokens."""
    found: list[list[float]] = []

    class Watched(Eager):
        def guess(self, state: SequenceState, token: mx.array, *rest: Any) -> mx.array | None:
            draft = session._engine.draft
            logits = draft.logits(state.frontier.streams, token[None], state)
            found.append(logits[0].tolist())  # type: ignore[arg-type]
            return super().guess(state, token, *rest)

    engine = session._engine
    engine.decoder = Decoder(engine.model, Watched(engine))
    list(session.generate(options("sampled", max_tokens=n)))
    return found


def test_a_restored_session_drafts_the_same(
    drafting: Engine, ids: list[int], tmp_path: Path
) -> None:
    """From a file and from the store, in another engine."""
    other = Engine.open(SET, EngineOptions(draft=True, prefill_chunk=96))
    for cut in (127, 131):
        session = started(drafting, ids[:cut])
        session.save(tmp_path / "s")
        store = Store.open(tmp_path / f"kv{cut}", 1 << 26)
        assert DiskSessions(drafting, store).keep(session)
        stored = other.session()
        assert DiskSessions(other, store).restore(stored, ids[:cut]) == cut
        store.close()
        before, expected = content(session), guessed(session, 6)
        for restored in (other.restore(tmp_path / "s"), stored):
            assert content(restored) == before
            assert guessed(restored, 6) == expected


def test_snapshots_with_and_without_a_draft_layers_window(
    plain: Engine, drafting: Engine, ids: list[int], tmp_path: Path
) -> None:
    """Who drafts begins with an empty window where none was saved; who does not ignores it."""
    sampling = options("sampled", max_tokens=8)
    expected = Case(plain, ids[:131], sampling)
    drafting.decoder = Decoder(drafting.model, Eager(drafting))
    for saver, reader in ((plain, drafting), (drafting, plain)):
        started(saver, ids[:131]).save(tmp_path / "s")
        restored = reader.restore(tmp_path / "s")
        assert list(restored.generate(sampling)) == expected.made
        assert content(restored, drafts=False) == content(expected.session)
    assert drafting.decoder.speculation.drafted > 0


def test_without_drafts_nothing_is_kept_for_them(plain: Engine, drafting: Engine) -> None:
    layers = len(plain.config.layers)
    for engine, n_layers in ((plain, layers), (drafting, layers + 1)):
        state = engine.model.new_state()
        assert state.frontier.window.shape[0] == n_layers
        arrays = capture_frontier(state, state.frontier)
        assert ("draft" in arrays) == (engine is drafting)
        assert bool(engine.stats()["draft"]) == (engine is drafting)
    assert plain.plan.dense < drafting.plan.dense
    assert plain.plan.all_experts < drafting.plan.all_experts


def test_the_embedded_model_guesses_for_itself(tiny: tuple[Engine, Engine]) -> None:
    """Most of its guesses are right, sampled or not: the noise is that of the token itself."""
    engine, eager = tiny
    assert engine.tokenizer is not None
    prompt = [engine.tokenizer.bos_id, *engine.tokenizer.encode("One day, a little fox")]
    for name, share in (("greedy", 0.75), ("hot", 0.5)):
        stats = eager.stats()["draft"]
        case = Case(engine, prompt, options(name, max_tokens=40, top_logprobs=2))
        session = started(eager, prompt)
        assert list(session.generate(case.sampling)) == case.made
        assert content(session, drafts=False) == content(case.session)
        found = {key: eager.stats()["draft"][key] - stats[key] for key in ("drafted", "accepted")}
        assert found["drafted"] + found["accepted"] >= 38
        assert found["accepted"] >= share * found["drafted"], name
    drafted = eager.stats()["draft"]["drafted"]
    list(started(eager, prompt).generate(options("greedy", max_tokens=1)))
    assert eager.stats()["draft"]["drafted"] == drafted, "nobody wants a second token"


def test_mlx_too() -> None:
    """The lazy back end, where a step is computed when its guess is compared."""
    made = []
    for draft in (False, True):
        engine = Engine.open("tiny", EngineOptions(draft=draft, kernels="reference"))
        if draft:
            engine.decoder = Decoder(engine.model, Eager(engine))
        session = started(engine, [0, *range(50, 60)])
        made.append([list(session.generate(options("sampled", max_tokens=12))), session.logits()])
    assert made[0] == made[1] and engine.stats()["draft"]["accepted"] > 0


def test_right_guesses_go_on(tiny: tuple[Engine, Engine]) -> None:
    """Time is saved, as the clock of the test says."""
    _, engine = tiny
    decoder = engine.decoder
    engine.decoder = Decoder(engine.model, counted := Counted(engine, 1.4))
    list(started(engine, [0, 50, 60]).generate(options("greedy", max_tokens=60)))
    engine.decoder = decoder
    assert counted.now < 55 and counted.stats()["gate"] == "open"


def test_stop_strings_and_the_models_own_end(tiny: tuple[Engine, Engine]) -> None:
    engine, eager = tiny
    assert engine.tokenizer is not None
    prompt = [engine.tokenizer.bos_id, *engine.tokenizer.encode("One day, a little fox")]
    text = "".join(
        t.text for t in started(engine, prompt).generate(options("greedy", max_tokens=30))
    )
    for stop in (text[9:12], text[20:21]):
        case = Case(engine, prompt, SamplingOptions(temperature=0, max_tokens=40, stop=(stop,)))
        session = started(eager, prompt)
        assert list(session.generate(case.sampling)) == case.made
        assert case.made[-1].finish_reason == "stop"
        assert content(session, drafts=False) == content(case.session)
    case = Case(engine, prompt, SamplingOptions(seed=1, max_tokens=200))
    session = started(eager, prompt)
    assert list(session.generate(case.sampling)) == case.made
    assert case.made[-1].finish_reason == "stop"


class Alternating:
    """Even and odd ids in turns, as a grammar would say it: from the tokens it was told."""

    def __init__(self, n_vocabulary: int):
        self.told: list[int] = []
        self._odd = np.arange(n_vocabulary) % 2 == 1

    def allowed(self) -> np.ndarray:
        return self._odd if len(self.told) % 2 else ~self._odd

    def accept(self, token: int) -> None:
        self.told.append(token)


def test_constraints_are_told_every_token(plain: Engine, drafting: Engine, ids: list[int]) -> None:
    n, sampling = plain.config.vocab_size, options("sampled", max_tokens=13)
    session, first = started(plain, ids[:126]), Alternating(n)
    made = list(session.generate(sampling, first))
    told = Told(drafting, session.tokens, lambda at: at % 4 > 0)
    drafting.decoder = Decoder(drafting.model, told)
    other, second = started(drafting, ids[:126]), Alternating(n)
    assert list(other.generate(sampling, second)) == made
    assert second.told == first.told and told.accepted >= 3
    assert content(other, drafts=False) == content(session)


def test_a_choice_that_fails_after_a_right_guess(
    plain: Engine, drafting: Engine, ids: list[int]
) -> None:
    class Broken(Alternating):
        def allowed(self) -> np.ndarray:
            if len(self.told) == 5:
                raise RuntimeError("no token is left")
            return super().allowed()

    sampling = options("sampled", max_tokens=13)
    session = started(plain, ids[:126])
    list(session.generate(sampling, Alternating(plain.config.vocab_size)))
    drafting.decoder = Decoder(drafting.model, Told(drafting, session.tokens, lambda at: True))
    echoing = Engine.open(SET, EngineOptions(draft=True))
    echoing.decoder = Decoder(echoing.model, Echo(echoing.model))
    for engine in (plain, drafting, echoing):
        broken, made = started(engine, ids[:126]), []
        with pytest.raises(RuntimeError, match="no token"):
            for token in broken.generate(sampling, Broken(plain.config.vocab_size)):
                made.append(token.id)
        assert made == session.tokens[126:131]
        assert broken.position == broken._state.position == 131


class Echo(Speculation):
    """Guesses that every token comes twice."""

    def guess(self, state: SequenceState, token: mx.array, *rest: Any) -> mx.array | None:
        return token


def test_sequences_together_take_plain_steps(
    plain: Engine, drafting: Engine, ids: list[int]
) -> None:
    """A guess that is open when another joins is settled first; alone again, it guesses again."""
    sampling = options("sampled", max_tokens=14)
    alone = [Case(plain, ids[:n], sampling) for n in (125, 40)]
    for n_first in (1, 2):
        told = Told(drafting, alone[0].session.tokens, lambda at: True)
        drafting.decoder = Decoder(drafting.model, told)
        sessions = [started(drafting, case.prompt) for case in alone]
        first, second = (session.generate(sampling) for session in sessions)
        made = [next(first) for _ in range(n_first)]
        n_alone = told.drafted
        others = []
        for _ in range(5):
            others.append(next(second))
            made.append(next(first))
        assert told.drafted <= n_alone + 1, "for the second's first step"
        second.close()
        made += list(first)
        assert told.drafted > n_alone
        assert made == alone[0].made and others == alone[1].made[:5]
        assert content(sessions[0], drafts=False) == content(alone[0].session)
        reread = started(plain, sessions[1].tokens)
        assert content(sessions[1], drafts=False) == content(reread)


def test_shared_steps_are_not_measured(drafting: Engine, ids: list[int]) -> None:
    """The clock goes on by one each time it is read: so many are taken or made meanwhile."""
    decoder = Decoder(drafting.model, Speculation(drafting.model, count().__next__))
    drafting.decoder, gate = decoder, decoder.speculation._gate
    a, b = (started(drafting, ids[:n]).generate(options("sampled", max_tokens=9)) for n in (40, 50))
    for stream in (a, b, a, a, a, b, b, b):  # a alone, both, -, both, a alone, -, both, b alone
        next(stream)
    a.close()
    b.close()
    assert list(gate._plain) == [1, 2, 1], "the second with b's token, which was there already"


def test_a_session_that_went_on_keeps_no_guess(
    plain: Engine, drafting: Engine, ids: list[int]
) -> None:
    case = Case(plain, ids[:125], options("sampled", max_tokens=9))
    drafting.decoder = Decoder(drafting.model, Told(drafting, case.session.tokens, lambda at: True))
    session, other = started(drafting, ids[:125]), started(drafting, ids[:40])
    slow = session.generate(case.sampling)
    next(slow)
    session.sync(ids[:130])
    before = content(session)
    next(other.generate(case.sampling))  # settles what is open
    slow.close()
    assert content(session) == before


def test_time_lost_on_wrong_guesses_is_bounded(drafting: Engine, ids: list[int]) -> None:
    """Random weights guess nothing right: a few probes, and plain steps from then on."""
    drafting.decoder = Decoder(drafting.model, counted := Counted(drafting, 2.5))
    for seed in range(3):
        session = started(drafting, ids[: 20 + seed])
        list(session.generate(options("sampled", seed=seed, max_tokens=30)))
    assert 0 < counted.drafted < 12
    assert counted.now <= (1 + SHARE) * 90 + HEAD_START


@pytest.fixture
def without_drafts(tmp_path: Path) -> Iterator[Path]:
    from tests.golden import sets

    c, tensors = sets.checkpoint("fast")
    kept = {n: sets.plain(t) for n, t in tensors.items() if not n.startswith("mtp.")}
    yield sets.write(tmp_path, c, kept)


def test_a_model_without_a_draft_layer(without_drafts: Path) -> None:
    assert Engine.open(without_drafts).stats()["draft"] == {}
    with pytest.raises(OptionsError, match="no draft layer"):
        Engine.open(without_drafts, EngineOptions(draft=True))
