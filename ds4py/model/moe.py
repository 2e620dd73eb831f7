"""The feed-forward of every layer: routed experts and one shared expert."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from ds4py.kernels import moe
from ds4py.kernels.formats import ExpertRecords
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.ops import Array, LinearMaps, Ops, PackedWeight, Weight
from ds4py.model.fused import Fused, Residual, Streams

ExpertWeight = Weight | PackedWeight
Compute = Callable[[ExpertRecords, Array, Array, bool], Array]
"""(records, ids [S, k] with -1 where an expert is not among them, their slots [S, k], whether the
shared expert is computed, too) -> float32 [S, k + 1, D], each choice's result, the shared expert's
last; what was not computed is anything."""


class RoutingTrace(Protocol):
    """Sees which experts were chosen."""

    def step(self, n_tokens: int, last: bool) -> None:
        """A step over that many tokens begins; `last` as in `ExpertSource.begin`."""
        ...

    def chosen(self, layer: int, ids: Array) -> None:
        """ids [S, k] of a layer in this step; computed at the latest when the next one begins."""
        ...

    def scored(self, layer: int, score: Array, bias: Array) -> None:
        """The router's score [S, E] and selection bias [E] in this step, of score-routed layers."""
        ...

    def foreseen(self, layer: int, ids: Array) -> None:
        """ids [S, k] that were guessed before the layer ran, to read them ahead."""
        ...


class ExpertSource(ABC):
    """Where the routed experts' weights are, resident or not."""

    observe: Callable[[int, Array, Array, Array], None] | None = None
    """Set while importance is collected: sees the layer and what `moe.Observer` sees."""
    trace: RoutingTrace | None = None

    def begin(self, tokens: Array, last: bool) -> None:
        """A step over tokens [S] begins. last: its logits are wanted, so decoding may follow."""
        if self.trace is not None:
            self.trace.step(tokens.shape[0], last)

    def announce(self, tokens: Array) -> None:
        """Token ids [S] that are about to be computed."""
        return

    def foresee(self, layer: int, streams: Array) -> None:
        """The streams [S, H, D] that enter `layer`'s feed-forward: a hint for the next layer."""
        return

    def end(self, streams: Array) -> None:
        """The streams after the last layer: once they are computed, nothing of the step is left."""
        return

    @property
    def prefers(self) -> bool:
        """Whether `prefer` wants to see the scores."""
        return self.trace is not None

    def prefer(self, layer: int, score: Array, bias: Array, ids: Array) -> Array:
        """A last word on the router's choice ids [S, k], made from score [S, E] + bias [E]; the
        same object where it stays."""
        if self.trace is not None:
            self.trace.scored(layer, score, bias)
        return ids

    def hot_set(self) -> list[tuple[int, int]]:
        """(layer, expert) of what a session worked with lately, the most valuable first. Goes into
        a snapshot's header; empty where nothing would be gained."""
        return []

    def warm(self, hot: Sequence[tuple[int, int]]) -> None:
        """Read a remembered hot set in the background, into memory that is still free."""
        return

    def stats(self) -> dict[str, Any]:
        """Counters for people and scripts; empty where all is resident."""
        return {}

    def routed(self, layer: int, x: Array, ids: Array, weight: Array) -> Array:
        """x [S, D] through experts ids [S, k] of `layer`, weighted: float32 [S, D]."""
        if self.trace is not None:
            self.trace.chosen(layer, ids)
        return self._routed(layer, x, ids, weight)

    def place(self, layer: int, ids: Array) -> tuple[ExpertRecords, Array] | None:
        """Records that hold experts ids [S, k] of `layer` and where in them, slots [S, k], for
        kernels that read them there; None: ask `routed`."""
        return None

    def in_parts(self, layer: int, ids: Array, compute: Compute) -> Array | None:
        """For kernels, where `place` has no room for all: `compute` with some experts after the
        other -> what it would make of all at once. None: ask `routed`."""
        return None

    @abstractmethod
    def _routed(self, layer: int, x: Array, ids: Array, weight: Array) -> Array: ...


class ResidentExperts(ExpertSource):
    """All experts of all layers in memory, as float maps or packed."""

    def __init__(self, ops: Ops, swiglu_limit: float):
        self.ops, self.limit = ops, swiglu_limit
        self.weights: dict[int, tuple[ExpertWeight, ExpertWeight]] = {}
        self._records: dict[int, ExpertRecords] = {}

    def _routed(self, layer: int, x: Array, ids: Array, weight: Array) -> Array:
        w13, w2 = self.weights[layer]
        observe = partial(self.observe, layer) if self.observe is not None else None
        return moe.routed(self.ops, x, ids, weight, w13, w2, self.limit, observe)

    def place(self, layer: int, ids: Array) -> tuple[ExpertRecords, Array] | None:
        if self.observe is not None:
            return None
        if self.trace is not None:
            self.trace.chosen(layer, ids)
        records = self._records.get(layer)
        if records is None:
            w13, w2 = self.weights[layer]
            assert isinstance(w13, PackedWeight) and isinstance(w2, PackedWeight)
            records = self._records[layer] = ExpertRecords.of(w13, w2)
        return records, ids


@dataclass(frozen=True)
class MoE:
    """Router, routed experts and the shared expert of one layer."""

    index: int
    fused: Fused
    w_in: LinearMaps
    """gate | shared w1 | shared w3"""
    shared_w2: LinearMaps
    bias: Array | None
    """[E] float32, score-routed layers."""
    tid2eid: Array | None
    """[vocab, k] int32, hash-routed layers."""
    experts: ExpertSource

    def __call__(
        self, x: Array, tokens: Array, residual: Residual, reader: HyperWeights
    ) -> Streams:
        """x [S, D], normed; tokens [S], the ids at these positions."""
        routing = self.fused.route(x, self, tokens)
        return self.fused.experts(x, self, routing, residual, reader)
