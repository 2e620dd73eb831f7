"""The linear maps of a checkpoint in the form a set of operations takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.kernels.formats import PackedMatrix, row_values
from ds4py.kernels.ops import F32, Array, Dtype, LinearMaps, Ops, Weight
from ds4py.weights.source import Source


@dataclass(frozen=True)
class Part:
    """Maps that lie one above the other and give results of one type."""

    names: tuple[str, ...]
    wide: bool = False
    """Results in the type of sums, not of activations."""


class Maps(Protocol):
    """What the loader asks for; names as in `Source.matrix`."""

    def array(self, host: npt.NDArray[Any]) -> Array:
        """Bytes and numbers as they are."""
        ...

    def pack(self, parts: Sequence[Part]) -> LinearMaps:
        """Maps that share an input."""
        ...

    def grouped(self, name: str, n_groups: int) -> LinearMaps:
        """One map per group of inputs, stored one above the other."""
        ...

    def table(self, name: str) -> Array | PackedMatrix:
        """Rows to look up, [n, width]."""
        ...

    def mix(self, name: str) -> Weight:
        """A hyper-connection's fn, exactly; `name` is the tensor's."""
        ...

    def vector(self, name: str) -> Array:
        """A norm's weights that a product reads, exactly; `name` is the tensor's."""
        ...


@dataclass(frozen=True)
class FloatMaps:
    """`Maps` for `Ops`."""

    source: Source
    ops: Ops
    dtype: Dtype

    def array(self, host: npt.NDArray[Any]) -> Array:
        return self.ops.array(host)

    def pack(self, parts: Sequence[Part]) -> Weight:
        return self.ops.pack([(self._read(p), self._dtype(p)) for p in parts])

    def grouped(self, name: str, n_groups: int) -> Weight:
        w = self.source.matrix(name)
        return self.ops.pack([(w.reshape(n_groups, -1, w.shape[1]), self.dtype)])

    def table(self, name: str) -> Array:
        return self.ops.array(self.source.matrix(name)).astype(self.dtype)

    def mix(self, name: str) -> Weight:
        return self.ops.pack([(self.source.floats(name), self.ops.wide)])

    def vector(self, name: str) -> Array:
        return self.array(self.source.floats(name))

    def _read(self, part: Part) -> F32:
        maps = [self.source.matrix(name) for name in part.names]
        return maps[0] if len(maps) == 1 else np.concatenate(maps)

    def _dtype(self, part: Part) -> Dtype:
        return self.ops.wide if part.wide else self.dtype


@dataclass(frozen=True)
class PackedMaps:
    """`Maps` for the Metal kernels: every matrix in the bytes it is stored in."""

    source: Source
    dtype: Dtype
    adopt: Callable[[npt.NDArray[Any]], mx.array]
    """Host memory -> a device array."""

    def array(self, host: npt.NDArray[Any]) -> Array:
        return self.adopt(host)

    def pack(self, parts: Sequence[Part]) -> LinearMaps:
        return tuple(self._matrix(name) for part in parts for name in part.names)

    def grouped(self, name: str, n_groups: int) -> LinearMaps:
        return (self._matrix(name),)  # groups lie one above the other in the file, too

    def table(self, name: str) -> PackedMatrix:
        return self._matrix(name)

    def mix(self, name: str) -> Weight:
        fn = self.source.floats(name)
        return Weight((self._narrowed(fn),), (fn.shape[0],))

    def vector(self, name: str) -> Array:
        return self._narrowed(self.source.floats(name))

    def _narrowed(self, values: F32) -> mx.array:
        """In the two bytes a number that the file has, where those say the same."""
        bits = values.view(np.uint32)
        if not (bits & 0xFFFF).any():
            return self.adopt((bits >> 16).astype(np.uint16)).view(mx.bfloat16)
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        return self.adopt(half if np.array_equal(half, values) else values)

    def _matrix(self, name: str) -> PackedMatrix:
        stored = self.source.stored(name)
        n_in = row_values(stored.format, stored.rows.shape[1])
        return PackedMatrix(stored.format, self.adopt(stored.rows), n_in)
