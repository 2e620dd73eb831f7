"""Append-only compressed rows of all layers of one kind, in one growing array.

The array may hold rows beyond a state's count (after a rewind, or an interrupted append): counts
live in the state, rows below a count are never rewritten while that state can be used.
"""

from __future__ import annotations

import mlx.core as mx

FIRST_CAPACITY = 256
"""Rows allocated at first, a multiple of every tile; then doubled, so appending never copies."""


class RowStore:
    """[layers, capacity, width]; unused rows are zero or stale."""

    def __init__(self, n_layers: int, width: int, dtype: mx.Dtype):
        self.data = mx.zeros((n_layers, 0, width), dtype)

    def write(self, start: int, rows: mx.array) -> None:
        """Place rows [layers, n, width] at start, growing when needed."""
        end = start + rows.shape[1]
        self.reserve(end)
        self.data[:, start:end] = rows

    def reserve(self, n_rows: int) -> None:
        n_layers, capacity, width = self.data.shape
        if n_rows <= capacity:
            return
        grown = max(capacity, FIRST_CAPACITY)
        while grown < n_rows:
            grown *= 2
        room = mx.zeros((n_layers, grown - capacity, width), self.data.dtype)
        self.data = mx.concatenate([self.data, room], axis=1)

    def copy(self) -> RowStore:
        """An independent store that shares the array until either writes."""
        other = RowStore.__new__(RowStore)
        other.data = self.data[:]
        return other
