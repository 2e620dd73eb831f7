"""A model of the released dimensions without weights, to count what a step would do.

No matrix has memory behind it: its array is never computed. What is built from it is the graph of
a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.kernels.formats import row_bytes
from ds4py.weights import names
from ds4py.weights.bundle import layout_of
from ds4py.weights.source import Entry, PackedLayer, StoredMatrix

FormatOf = Callable[[str], str]
"""Name of a tensor -> the format it is stored in."""


class Blank:
    """A `Source` of zeros: all rows are views of one byte."""

    has_draft = False
    entries: Mapping[str, Entry] = {}
    files: Sequence[Path] = ()

    def __init__(self, config: ModelConfig, format_of: FormatOf):
        self.config, self._format_of = config, format_of
        self._shapes = names.expected(config)

    def stored(self, name: str) -> StoredMatrix:
        fmt = self._format_of(f"{name}.weight")
        n_out, n_in = self._shapes[f"{name}.weight"]
        return StoredMatrix(fmt, _zeros((n_out, row_bytes(fmt, n_in)), np.uint8))

    def packed(self, layer: int, mapped: bool = False) -> PackedLayer:
        expert = "layers.0.ffn.experts.0"
        gate, up, down = (self._format_of(f"{expert}.{w}.weight") for w in ("w1", "w3", "w2"))
        layout = layout_of(self.config, (gate, up, down))
        records = _zeros((self.config.n_routed_experts, layout.record_bytes), np.uint8)
        return PackedLayer(records, layout, (gate, up, down))

    def records(self) -> None:
        """Nothing lies on a disk."""
        return

    def matrix(self, name: str) -> npt.NDArray[np.float32]:
        return self.floats(f"{name}.weight")

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        return _zeros(self._shapes[name], np.float32)

    def integers(self, name: str) -> npt.NDArray[np.int32]:
        return _zeros(self._shapes[name], np.int32)


def _zeros(shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    return np.broadcast_to(np.zeros((), dtype), shape)


def unallocated(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An evaluated array of that shape: views of one zero."""
    array = mx.broadcast_to(mx.array(0, dtype), shape)
    mx.eval(array)
    return array
