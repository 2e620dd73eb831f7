"""Replaying a trace: the misses a cache of any size and policy has on it.

The decisions are `policy.Residency`'s own, asked in the order in which the engine asks, so that the
counts are the engine's to the integer. Belady's policy, which knows the future, is the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds4py.errors import InputError
from ds4py.experts.policy import (
    DECODE_ROWS,
    Belady,
    Counts,
    Ids,
    Key,
    Policy,
    Residency,
    online_policy,
)
from ds4py.experts.swaps import BoundedSwaps
from ds4py.experts.trace import Step, Trace

POLICIES = ("lru", "decayed", "belady")


def replay(
    trace: Trace,
    n_slots: int,
    policy: str,
    prefetch: str = "hash",
    layers: Sequence[int] | None = None,
    swaps: BoundedSwaps | None = None,
) -> dict[int, Counts]:
    """What happens per layer with `n_slots` for `layers` (all the main model's by default).

    policy: one of POLICIES. prefetch: as in `StreamingOptions`. swaps: choose again in every
    score-routed layer of a decoding step, under what is in memory, and count there; the streams
    after a swap are taken to be those without. Raises InputError when the trace does not tell.
    """
    _check(trace, prefetch, swaps)
    kept = list(range(trace.facts.n_layers)) if layers is None else list(layers)
    chooser: Policy = _belady(trace) if policy == "belady" else online_policy(policy)
    residency = Residency(n_slots, kept, trace.facts.n_chosen, chooser)
    for now, step in enumerate(trace.steps, 1):
        residency.withdraw()
        if prefetch != "off" and step.n_tokens <= DECODE_ROWS:
            for layer in trace.facts.hash_layers:
                if layer in residency.counts and layer in step.chosen:
                    residency.promise(layer, np.unique(step.chosen[layer]).tolist(), now)
        for layer in step.chosen:
            if layer in residency.counts:
                ids, displaced = _choose(step, layer, residency, swaps)
                keep = residency.worth_keeping(layer, ids, step.last)
                residency.use(layer, np.unique(ids).tolist(), now, keep)
                for expert in displaced:
                    residency.admit(Key(layer, expert), now)
            guess = step.foreseen.get(layer + 1) if prefetch == "router" else None
            if guess is not None and layer + 1 in residency.counts:
                residency.promise(layer + 1, list(dict.fromkeys(guess.ravel().tolist())), now)
    return residency.counts


def _choose(
    step: Step, layer: int, residency: Residency, swaps: BoundedSwaps | None
) -> tuple[Ids, list[int]]:
    """The ids [S, k] a layer computes with, and which gave way."""
    ids = step.chosen[layer]
    if swaps is None or step.n_tokens > 1 or layer not in step.scored:
        return ids, []
    held, best = residency.slot_of, step.scored[layer].token(0)
    chosen, displaced = swaps.choose(
        layer, best, ids.shape[1], lambda expert: Key(layer, expert) in held
    )
    return chosen[None], displaced


def _check(trace: Trace, prefetch: str, swaps: BoundedSwaps | None) -> None:
    decoding = [step for step in trace.steps if step.n_tokens <= DECODE_ROWS]
    if swaps is not None and not any(step.scored for step in decoding):
        raise InputError("the trace has no scores to swap by; record it again")
    if prefetch == "router" and not any(step.foreseen for step in decoding):
        raise InputError(
            "the trace has no guesses of the next layer's router; record it with --prefetch router"
        )


def total(counts: dict[int, Counts]) -> Counts:
    """All layers together."""
    return Counts(
        sum(c.hits for c in counts.values()),
        sum(c.prefetched for c in counts.values()),
        sum(c.misses for c in counts.values()),
        sum(c.wasted for c in counts.values()),
    )


def _belady(trace: Trace) -> Belady:
    uses: dict[Key, list[int]] = {}
    for now, step in enumerate(trace.steps, 1):
        for layer, ids in step.chosen.items():
            for expert in np.unique(ids).tolist():
                uses.setdefault(Key(layer, expert), []).append(now)
    return Belady(uses)
