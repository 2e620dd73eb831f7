"""What all layers of one step share: positions, rotations, masks, and how many rows close.

Built on the host from Python integers before the layers run; the shapes of a step depend on the
position and the number of new tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ds4py.cache.state import SequenceState, Series
from ds4py.config import LayerPlan, ModelConfig
from ds4py.kernels import rope
from ds4py.kernels.ops import Array, Ops


@dataclass(frozen=True)
class Closing:
    """The rows of one series that the new tokens complete."""

    n_old: int
    """Rows committed before this step."""
    n_new: int
    visible: Array
    """Rows each query may see, counting the new ones: [S, 1] int32."""
    rotation: rope.Rotation | None
    """For the new rows, at the position of their window's first token; None without rows."""


class Frequencies:
    """Rotary frequencies of the two kinds of layer, computed once per model."""

    def __init__(self, config: ModelConfig):
        self.sliding = rope.frequencies(config, compressed=False)
        self.compressed = rope.frequencies(config, compressed=True)


class StepPlan:
    """The host-side facts of one step of S tokens at `state.position`."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        freqs: Frequencies,
        state: SequenceState,
        n_tokens: int,
    ):
        self.ops, self.config, self.freqs, self.state = ops, config, freqs, state
        self.n_tokens, self.start = n_tokens, state.position
        self.positions = np.arange(self.start, self.start + n_tokens)
        self.closing = {s.name: self._closing(s) for s in state.series}

    def turn(self, layer: LayerPlan) -> rope.Rotation:
        """For q, window rows and outputs of a layer, [S, head_dim]."""
        return self.compressed if layer.compressed else self.sliding

    @cached_property
    def sliding(self) -> rope.Rotation:
        """For q, rows and outputs of sliding layers, [S, head_dim]."""
        return self._rotation(self.freqs.sliding, self.config.head_dim)

    @cached_property
    def compressed(self) -> rope.Rotation:
        """For q, window rows and outputs of compressed layers, [S, head_dim]."""
        return self._rotation(self.freqs.compressed, self.config.head_dim)

    @cached_property
    def indexer(self) -> rope.Rotation:
        """For indexer queries, [S, index_head_dim]."""
        if self.config.index_head_dim == self.config.head_dim:
            return self.compressed
        return self._rotation(self.freqs.compressed, self.config.index_head_dim)

    @cached_property
    def window_valid(self) -> Array:
        """Slot s of query p's window holds position p - W + 1 + s: valid from 0, [S, 1, W]."""
        slots = np.arange(1 - self.config.sliding_window, 1)
        return self.ops.array((self.positions[:, None] + slots >= 0)[:, None])

    def _rotation(self, freqs: rope.F32, width: int) -> rope.Rotation:
        return rope.rotation(self.ops, self.positions, freqs, width)

    def _closing(self, s: Series) -> Closing:
        n_old = s.count(self.start)
        n_new = s.count(self.start + self.n_tokens) - n_old
        visible = self.ops.array(((self.positions + 1) // s.ratio)[:, None].astype(np.int32))
        if not n_new:
            return Closing(n_old, 0, visible, None)
        first_tokens = s.ratio * np.arange(n_old, n_old + n_new)
        table = rope.rotation(self.ops, first_tokens, self.freqs.compressed, s.width)
        return Closing(n_old, n_new, visible, table)
