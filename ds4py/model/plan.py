"""What all layers of one step share: positions, rotations, masks, and how many rows close.

Built on the host from Python integers before the layers run; the shapes of a step depend on the
position and the number of new tokens only.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.cache.state import SequenceState, Series
from ds4py.config import LayerPlan, ModelConfig
from ds4py.kernels import rope
from ds4py.kernels.ops import Array, Ops


class Frequencies:
    """Rotary frequencies of the two kinds of layer, computed once per model."""

    def __init__(self, config: ModelConfig):
        self.sliding = rope.frequencies(config, compressed=False)
        self.compressed = rope.frequencies(config, compressed=True)


class StepPlan:
    """The host-side facts of one step of S tokens."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        freqs: Frequencies,
        state: SequenceState,
        n_tokens: int,
        start: int | None = None,
    ):
        """start: None = the state's position; a draft layer is one behind."""
        self.ops, self.config, self.freqs, self.state = ops, config, freqs, state
        self.n_tokens, self.start = n_tokens, state.position if start is None else start
        self.positions = np.arange(self.start, self.start + n_tokens)
        self.closing = {s.name: Closing(self, s) for s in state.series}
        self.views: dict[int, Any] = {}
        """What the fused operations gathered of this for layers of one ratio."""

    def table(self, layer: LayerPlan) -> Array:
        """Rotations of queries, window rows and outputs of a layer, as the kernels read them:
        [S, rope / 2, 2]."""
        return self._compressed_table if layer.compressed else self._sliding_table

    @cached_property
    def origin(self) -> Array:
        """For layers without compressed rows, what `Closing.step` is for the others."""
        return self.ops.array(np.array([self.start, 0], np.int32))

    @cached_property
    def _sliding_table(self) -> Array:
        return rope.table(self.ops, self.positions, self.freqs.sliding)

    @cached_property
    def _compressed_table(self) -> Array:
        return rope.table(self.ops, self.positions, self.freqs.compressed)


class StepPlans:
    """A step of one or several sequences, whose tokens follow one another: S in all."""

    def __init__(self, each: Sequence[StepPlan]):
        self.each = tuple(each)
        self.counts = tuple(plan.n_tokens for plan in self.each)
        ends = np.cumsum(self.counts).tolist()
        self.rows = [slice(e - plan.n_tokens, e) for e, plan in zip(ends, self.each, strict=True)]
        """Which of the S are each sequence's."""
        self.n_tokens = ends[-1]
        self.positions = np.concatenate([plan.positions for plan in self.each])
        self.ops, self._freqs = self.each[0].ops, self.each[0].freqs
        self._turns: dict[Hashable, rope.Rotation] = {}

    def turn(self, layer: LayerPlan, width: int) -> rope.Rotation:
        """For queries, window rows and outputs of a layer, [S, width]."""
        key = layer.compressed, width
        if key not in self._turns:
            freqs = self._freqs.compressed if layer.compressed else self._freqs.sliding
            self._turns[key] = rope.rotation(self.ops, self.positions, freqs, width)
        return self._turns[key]

    def closing_turn(self, series: Series) -> rope.Rotation:
        """For the rows that all sequences complete, one sequence's after the other's."""
        key = series.ratio, series.width
        if key not in self._turns:
            first = [plan.closing[series.name].first_tokens for plan in self.each]
            at, freqs = np.concatenate(first), self._freqs.compressed
            self._turns[key] = rope.rotation(self.ops, at, freqs, series.width)
        return self._turns[key]

    def most_rows(self, series: Series) -> int:
        """Rows of the sequence that has most, counting the new ones."""
        return max(plan.closing[series.name].n_rows for plan in self.each)

    def visible(self, series: Series) -> Array:
        """Rows each query may see, counting the new ones: int32 [S, 1]."""
        if len(self.each) == 1:
            return self.each[0].closing[series.name].visible
        return self.ops.array(((self.positions + 1) // series.ratio)[:, None].astype(np.int32))

    @cached_property
    def sequence(self) -> Array:
        """Whose each of the S is: its place in `each`."""
        return self.ops.array(np.repeat(np.arange(len(self.counts)), self.counts))

    @cached_property
    def window_valid(self) -> Array:
        """Slot s of query p's window holds position p - W + 1 + s: valid from 0, [S, 1, W]."""
        slots = np.arange(1 - self.each[0].config.sliding_window, 1)
        return self.ops.array((self.positions[:, None] + slots >= 0)[:, None])


class Closing:
    """The rows of one series that the new tokens complete. Arrays are made when asked for."""

    def __init__(self, plan: StepPlan, series: Series):
        self.n_old = series.count(plan.start)
        """Rows committed before this step."""
        self.n_new = series.count(plan.start + plan.n_tokens) - self.n_old
        self._plan, self._series = plan, series

    @property
    def n_rows(self) -> int:
        """With the new ones."""
        return self.n_old + self.n_new

    @property
    def first_tokens(self) -> npt.NDArray[np.int64]:
        """Positions of the new rows: those of their windows' first tokens."""
        return self._series.ratio * np.arange(self.n_old, self.n_old + self.n_new)

    @cached_property
    def visible(self) -> Array:
        """Rows each query may see, counting the new ones: [S, 1] int32."""
        rows = (self._plan.positions + 1) // self._series.ratio
        return self._plan.ops.array(rows[:, None].astype(np.int32))

    @cached_property
    def table(self) -> Array:
        """Rotations of the new rows as the kernels read them, [n_new, rope / 2, 2]."""
        return rope.table(self._plan.ops, self.first_tokens, self._plan.freqs.compressed)

    @cached_property
    def step(self) -> Array:
        """Where the step begins, as the kernels take it: int32 [first position, n_old]."""
        return self._plan.ops.array(np.array([self._plan.start, self.n_old], np.int32))
