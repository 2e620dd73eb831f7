"""A prefill reads each expert once per chunk, ahead of need, and leaves what decoding uses."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ds4py.experts.streamed import StreamedExperts
from tests.experts.models import CHOSEN, EXPERTS, LEAST, prompt, streamed


def source(engine: Any) -> StreamedExperts:
    found = engine.experts
    assert isinstance(found, StreamedExperts)
    return found


def test_every_expert_is_read_once_per_chunk(bundle: Path) -> None:
    """More experts than slots: all pass through staging, none twice."""
    engine, seen = streamed(bundle, LEAST), []

    def record(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        seen.append((descriptor, offset))
        return os.preadv(descriptor, buffers, offset)

    source(engine).reader.read_into = record
    engine.score(prompt(60), [60])
    assert len(seen) == len(set(seen)) and len(seen) >= 7 * (EXPERTS - 2)


def test_layers_are_read_ahead(bundle: Path) -> None:
    """A long chunk needs nearly all experts: those of the next layer are on their way before its
    router has spoken."""
    engine = streamed(bundle, LEAST)
    engine.score(prompt(60), [60])
    reads = source(engine).sections[0].reads
    assert reads.useful + reads.late >= 5 * (EXPERTS - CHOSEN - 2) and reads.wasted <= 7


def test_a_prefill_leaves_the_decode_working_set(bundle: Path) -> None:
    """Its chunks pass through; only what its last token chose is taken in."""
    engine = streamed(bundle, LEAST + 16)
    section = source(engine).sections[0]
    state = engine.model.new_state()
    for token in prompt(6):
        _, delta = engine.model.step(np.array([token]), state)
        state.commit(delta, 1)
    before = set(section.residency.slot_of)
    other = engine.model.new_state()
    engine.model.step(np.array(prompt(40, seed=4)), other, n_logits=0)
    assert set(section.residency.slot_of) >= before
    engine.model.step(np.array(prompt(40, seed=5)), other, n_logits=1)
    gone = before - set(section.residency.slot_of)
    assert len(gone) <= 7 * CHOSEN


def test_hash_layers_are_known_from_the_token(bundle: Path) -> None:
    """Decoding never misses a hash-routed expert: it is present or on its way."""
    engine = streamed(bundle, 40)
    engine.score(prompt(24), [1] * 24)
    counts = source(engine).sections[0].residency.counts
    assert all(counts[layer].misses == 0 for layer in range(3))
    assert sum(counts[layer].prefetched for layer in range(3)) > 0
    told = streamed(bundle, 40)
    source(told).announce(np.array(prompt(1)))
    reads = source(told).sections[0].reads
    assert reads.records > 0
    told.score(prompt(1))
    assert reads.wasted == 0 and reads.useful + reads.late > 0
    for seed in (1, 2):  # a step that is broken off: nobody came for what was read
        source(told).begin(np.array(prompt(1, seed=seed)), True)
    assert reads.wasted > 0
