"""Streaming changes when things happen and nothing that is computed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4py import Engine, EngineOptions, SamplingOptions
from ds4py.errors import OptionsError
from ds4py.experts.options import StreamingOptions
from tests.experts import models
from tests.experts.models import LEAST, prompt, resident, streamed

IDS = prompt(80)
CHUNKS = [30, 9, 3, *[1] * 8, 8, 2, 15, *[1] * 5]
"""Prefill that passes through staging, drafts and decoding."""


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Any:
    return resident(bundle).score(IDS, CHUNKS)


@pytest.mark.parametrize(
    ("slots", "streaming"),
    [
        (LEAST, {}),
        (LEAST, {"prefetch": "router", "policy": "decayed", "readers": 8, "verify": "always"}),
        (LEAST + 1, {"prefetch": "router"}),
        (40, {"policy": "decayed", "readers": 3, "verify": "never"}),
        (64, {"prefetch": "off", "readers": 1}),
        (500, {"prefetch": "router"}),
    ],
)
def test_logits_are_those_of_resident_experts(
    bundle: Path, expected: Any, slots: int, streaming: dict[str, Any]
) -> None:
    """Cold, and again warm."""
    engine = streamed(bundle, slots, **streaming)
    for _ in range(2):
        np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)


@pytest.mark.long
@pytest.mark.parametrize("slots", [LEAST, 27, 36, 48, 70, 96])
@pytest.mark.parametrize("policy", ["lru", "decayed"])
@pytest.mark.parametrize("prefetch", ["hash", "router", "off"])
def test_every_size_policy_and_prefetch(
    bundle: Path, expected: Any, slots: int, policy: str, prefetch: str
) -> None:
    for readers in (1, 5):
        engine = streamed(bundle, slots, policy=policy, prefetch=prefetch, readers=readers)
        np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)


def test_drafts(bundle: Path) -> None:
    np.testing.assert_array_equal(
        streamed(bundle).score_mtp(IDS[:20]), resident(bundle).score_mtp(IDS[:20])
    )


def test_decoding_with_guesses(bundle: Path) -> None:
    """They read experts, and change no token; with swaps they would."""
    sampling, made = SamplingOptions(seed=2, max_tokens=24, stop_at_eos=False), []
    streaming = StreamingOptions(slots=LEAST, readers=2)
    for draft in (False, True):
        options = EngineOptions(draft=draft, experts="streamed", streaming=streaming)
        engine = Engine.open(bundle, options)
        session = engine.session()
        session.sync(IDS[:20])
        made.append([token.id for token in session.generate(sampling)])
    assert made[0] == made[1]
    assert engine.stats()["draft"]["drafted"] > 0
    with pytest.raises(OptionsError, match=r"draft and swap 0\.2"):
        EngineOptions(draft=True, streaming=StreamingOptions(swap=0.2))


def test_mlx_too(bundle: Path) -> None:
    """The lazy back end: no slot is written while something unevaluated may read it."""
    chunks = [12, 3, *[1] * 5]
    expected = resident(bundle, kernels="reference").score(IDS[:20], chunks)
    for slots, prefetch in ((LEAST, "hash"), (40, "router"), (96, "off")):
        engine = streamed(bundle, slots, kernels="reference", prefetch=prefetch)
        np.testing.assert_array_equal(engine.score(IDS[:20], chunks), expected)


@pytest.mark.shader
@pytest.mark.long
def test_kernels_read_experts_by_slot(bundle: Path) -> None:
    """On the Metal kernels, run on this CPU: steps and a chunk too large for the slots."""
    pytest.importorskip("ziglang")
    from ds4py import Engine, EngineOptions
    from ds4py.experts.options import StreamingOptions
    from ds4py.kernels.build import Launcher
    from tests.metal.test_model import make

    def score(experts: str, **streaming: Any) -> Any:
        options = EngineOptions(
            kernels="metal",
            experts=experts,
            context=512,
            streaming=StreamingOptions(readers=2, **streaming),
        )
        engine = Engine.open(bundle, options, launcher=Launcher(make))
        logits = engine.score(IDS[:14], [10, 1, 2, 1])
        assert not engine.stats()["kernels"]["plain"]
        return logits

    expected = score("resident")
    for slots, prefetch in ((LEAST, "hash"), (40, "router"), (96, "hash")):
        found = score("streamed", slots=slots, prefetch=prefetch)
        np.testing.assert_array_equal(found[:10], expected[:10])
        # A step whose experts may not fit together is computed as prompts are, in another order.
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_records_of_two_sizes(tmp_path: Path) -> None:
    bundle = models.make(tmp_path, models.TWO_SIZES)
    expected = resident(bundle).score(IDS, CHUNKS)
    for slots in (LEAST, 50):
        engine = streamed(bundle, slots, prefetch="router")
        assert len(engine.experts.sections) == 2  # type: ignore[attr-defined]
        np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)


def test_sessions_take_turns(bundle: Path) -> None:
    """Tokens of two sessions that share the slots, greedy and sampled."""

    def texts(engine: Any) -> list[list[int]]:
        made: list[list[int]] = [[], []]
        sessions = [engine.session(), engine.session()]
        for session, start in zip(sessions, (IDS[:30], IDS[60:75]), strict=True):
            session.sync(start)
        options = [
            SamplingOptions(temperature=0.0, max_tokens=8, stop_at_eos=False),
            SamplingOptions(seed=3, max_tokens=8, stop_at_eos=False),
        ]
        runs = [s.generate(o) for s, o in zip(sessions, options, strict=True)]
        for _ in range(8):
            for tokens, run in zip(made, runs, strict=True):
                tokens.append(next(run).id)
        return made

    assert texts(streamed(bundle)) == texts(resident(bundle))


def test_too_few_slots_are_refused(bundle: Path) -> None:
    with pytest.raises(OptionsError, match=f"{LEAST - 1} expert slots.*{LEAST}"):
        streamed(bundle, LEAST - 1)
