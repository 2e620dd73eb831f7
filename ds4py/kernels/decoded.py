"""Packed experts' maps kept as floats. Decoding one costs a CPU several times its product with a
token, so where memory is to spare, those used last stay decoded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

Host = npt.NDArray[Any]


class DecodedMaps:
    """Maps of any number of weights, within a bound. What is decoded anew takes the memory of the
    map of its shape that was used least lately."""

    def __init__(self, most_bytes: int = 0):
        """most_bytes: of all maps kept. One map of each shape is there whatever the bound."""
        self.most_bytes, self.n_bytes = most_bytes, 0
        self._kept: dict[tuple[int, ...], OrderedDict[Hashable, Host]] = {}

    def find(self, shape: tuple[int, ...], key: Hashable) -> Host | None:
        """The map kept under that key."""
        kept = self._kept.get(shape)
        if kept is None or key not in kept:
            return None
        kept.move_to_end(key)
        return kept[key]

    def room(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Host:
        """Memory for a map to be decoded, then to be kept; it held zeros or a map of the shape."""
        kept = self._kept.setdefault(shape, OrderedDict())
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if kept and self.n_bytes + size > self.most_bytes:
            _, oldest = kept.popitem(last=False)
            self.n_bytes -= size
            return oldest
        return np.zeros(shape, dtype)

    def keep(self, key: Hashable, array: Host) -> None:
        """The map is decoded, and found from now on."""
        self._kept[array.shape][key] = array
        self.n_bytes += array.nbytes
