"""Replaying a trace: the misses a cache of any size and policy has on it.

The decisions are `policy.Residency`'s own, asked in the order in which the engine asks, so that the
counts are the engine's to the integer. Belady's policy, which knows the future, is the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ds4py.experts.policy import (
    DECODE_ROWS,
    Belady,
    Counts,
    Key,
    Policy,
    Residency,
    online_policy,
)
from ds4py.experts.trace import Trace

POLICIES = ("lru", "decayed", "belady")


def replay(
    trace: Trace,
    n_slots: int,
    policy: str,
    prefetch: bool = True,
    layers: Sequence[int] | None = None,
) -> dict[int, Counts]:
    """What happens per layer with `n_slots` for `layers` (all the main model's by default).

    policy: one of POLICIES. prefetch: hash-routed layers' experts are read ahead.
    """
    kept = list(range(trace.facts.n_layers)) if layers is None else list(layers)
    chooser: Policy = _belady(trace) if policy == "belady" else online_policy(policy)
    residency = Residency(n_slots, kept, trace.facts.n_chosen, chooser)
    for now, step in enumerate(trace.steps, 1):
        residency.withdraw()
        if prefetch and step.n_tokens <= DECODE_ROWS:
            for layer in trace.facts.hash_layers:
                if layer in residency.counts and layer in step.chosen:
                    residency.promise(layer, np.unique(step.chosen[layer]).tolist(), now)
        for layer, ids in step.chosen.items():
            if layer in residency.counts:
                keep = residency.worth_keeping(layer, ids, step.last)
                residency.use(layer, np.unique(ids).tolist(), now, keep)
    return residency.counts


def total(counts: dict[int, Counts]) -> Counts:
    """All layers together."""
    return Counts(
        sum(c.hits for c in counts.values()),
        sum(c.prefetched for c in counts.values()),
        sum(c.misses for c in counts.values()),
    )


def _belady(trace: Trace) -> Belady:
    uses: dict[Key, list[int]] = {}
    for now, step in enumerate(trace.steps, 1):
        for layer, ids in step.chosen.items():
            for expert in np.unique(ids).tolist():
                uses.setdefault(Key(layer, expert), []).append(now)
    return Belady(uses)
