"""Append-only compressed rows of all layers of one kind, in one growing array.

The array may hold rows beyond a state's count (after a rewind, or an interrupted append): counts
live in the state, rows below a count are never rewritten while that state can be used.
"""

from __future__ import annotations

from ds4py.kernels.ops import Array, Dtype, Ops

FIRST_CAPACITY = 256
"""Rows allocated at first, a multiple of every tile; then doubled, so appending never copies."""


class RowStore:
    """[layers, capacity, width]; unused rows are zero or stale."""

    def __init__(self, ops: Ops, n_layers: int, width: int, dtype: Dtype):
        self._ops = ops
        self.data: Array = ops.zeros((n_layers, 0, width), dtype)

    def write(self, start: int, rows: Array) -> None:
        """Place rows [layers, n, width] at start, growing when needed."""
        end = start + rows.shape[1]
        self._reserve(end)
        self.data[:, start:end] = rows

    def _reserve(self, n_rows: int) -> None:
        n_layers, capacity, width = self.data.shape
        if n_rows <= capacity:
            return
        grown = max(capacity, FIRST_CAPACITY)
        while grown < n_rows:
            grown *= 2
        room = self._ops.zeros((n_layers, grown - capacity, width), self.data.dtype)
        self.data = self._ops.concatenate([self.data, room], axis=1)
