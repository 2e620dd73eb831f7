"""The array operations a model is written in, and their MLX form.

There are two sets with the same names. `MlxOps` is MLX: lazy, on the GPU where there is one.
`host.HostOps` is numpy: MLX's CPU back end spends about 4 us on an operation (a decode step of a
small model has 2,500) and its matmul reaches 3 GFLOP/s; numpy spends 1 us, and its BLAS reaches
100. A model gets one of them when it is opened and does not ask which.

The rule both keep: a row's result never depends on the rows computed with it, so that decode,
prefill and chunks of any size agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.formats.gguf_blocks import block_format, decode_mlx
from ds4py.kernels.decoded import DecodedMaps

Array: TypeAlias = Any
"""An `mx.array` or a numpy array, as the model's `Ops` makes them."""
Dtype: TypeAlias = Any
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Weight:
    """One or several linear maps that share an input, as one `Ops` stores them.

    `arrays`: MLX weights [out_i, in] (or [E, out_i, in]), or one host array [in, padded out]
    (or [E, in, padded out]). `widths`: out_i.
    """

    arrays: tuple[Array, ...]
    widths: tuple[int, ...]


LinearMaps: TypeAlias = Any
"""Linear maps that share an input, as a set of fused operations stores them: a `Weight`, or on
Metal a tuple of `formats.PackedMatrix`."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Expert maps in block formats, one record per expert, decoded only where they are used."""

    records: Array
    """uint8 [E, record_bytes]"""
    parts: tuple[tuple[slice, str], ...]
    """Bytes of a record and their format, stacked on the output axis."""
    n_in: int
    decoded: DecodedMaps | None = None
    """Where the host keeps maps it decoded; None: records change, nothing is kept."""

    @cached_property
    def n_out(self) -> int:
        """Outputs of all parts."""
        return sum(len(self.rows(self.records[:1], part)) for part in self.parts)

    def rows(self, records: Array, part: tuple[slice, str]) -> Array:
        """One part of some records [n, record_bytes] as rows of blocks [n * out_i, row_bytes]."""
        where, name = part
        return records[:, where].reshape(-1, block_format(name).row_bytes(self.n_in))


class ExpertBuilder(Protocol):
    """Fills one stacked weight expert by expert, so that loading never holds two copies."""

    def put(self, expert: int, row: int, weight: F32) -> None:
        """Place `weight` [n, in] at output rows row..row+n of one expert."""
        ...

    def done(self) -> Weight: ...


class Ops(Protocol):
    """What both sets offer. Functions without a docstring are the array libraries' own."""

    name: str
    lazy: bool
    """Whether arrays are graphs until evaluated."""
    wide: Dtype
    """Type of sums, norms and mixes: float32, or float64 in exact host arithmetic."""
    int32: Dtype
    uint8: Dtype
    uint16: Dtype
    uint32: Dtype
    float32: Dtype

    def array(self, x: npt.NDArray[Any]) -> Array:
        """Floats in the wide type, integers as they are."""
        ...

    def to_mlx(self, x: Array) -> mx.array: ...
    def cast(self, x: Array, dtype: Dtype) -> Array:
        """x in that type; x itself where it has it."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: Dtype) -> Array: ...
    def arange(self, n: int) -> Array: ...
    def exp(self, x: Array) -> Array: ...
    def sqrt(self, x: Array) -> Array: ...
    def abs(self, x: Array) -> Array: ...
    def round(self, x: Array) -> Array: ...
    def sigmoid(self, x: Array) -> Array: ...
    def softplus(self, x: Array) -> Array: ...
    def maximum(self, a: Array, b: Array) -> Array: ...
    def minimum(self, a: Array, b: Array) -> Array: ...
    def where(self, condition: Array, a: Array, b: Array) -> Array: ...
    def concatenate(self, parts: Sequence[Array], axis: int = 0) -> Array: ...
    def stack(self, parts: Sequence[Array], axis: int = 0) -> Array: ...
    def broadcast_to(self, x: Array, shape: tuple[int, ...]) -> Array: ...
    def sort(self, x: Array, axis: int) -> Array: ...
    def sum(self, x: Array, axis: int, keepdims: bool = False) -> Array: ...

    def argsort(self, x: Array, axis: int) -> Array:
        """Stable: equal values keep their order."""
        ...

    def take_along_axis(self, x: Array, ids: Array, axis: int) -> Array: ...

    def copy(self, x: Array) -> Array:
        """In memory of its own, so that x can be freed."""
        ...

    def append_zeros(self, x: Array, n: int) -> Array:
        """x with n zero rows after its first axis."""
        ...

    def windows(self, x: Array, n: int, width: int) -> Array:
        """Overlapping view of x [n + width - 1, d]: [n, 1, width, d], row i from x[i]."""
        ...

    def hadamard(self, x: Array) -> Array:
        """Sylvester-order Hadamard transform of the last axis, orthonormal."""
        ...

    def float_bits(self, x: Array) -> Array:
        """float32 bits of the values as uint32."""
        ...

    def bits_float(self, x: Array) -> Array:
        """uint32 bits -> float32."""
        ...

    def pack(self, parts: Sequence[tuple[F32, Dtype]]) -> Weight:
        """float32 maps [out_i, in] that share an input, and the dtype of each result."""
        ...

    def pack_experts(self, n_experts: int, out: int, n_in: int, dtype: Dtype) -> ExpertBuilder:
        """Room for `n_experts` maps [out, in], to be filled one expert at a time."""
        ...

    def project(self, x: Array, weight: Weight) -> tuple[Array, ...]:
        """x [..., in] -> one [..., out_i] per part."""
        ...

    def grouped(self, x: Array, weight: Weight) -> Array:
        """x [S, G, in] through G maps [G, out, in] -> [S, G, out]."""
        ...

    def experts(self, x: Array, ids: Array, weight: Weight | PackedWeight) -> Array:
        """x [R, in], ids [R] -> [R, out], row r through map ids[r]; rows of one map adjoin."""
        ...


class MlxOps:
    """MLX arrays: the reference on a GPU, and on a CPU the slow cross-check of `HostOps`."""

    name = "mlx"
    lazy = True
    wide: Dtype = mx.float32
    int32: Dtype = mx.int32
    uint8: Dtype = mx.uint8
    uint16: Dtype = mx.uint16
    uint32: Dtype = mx.uint32
    float32: Dtype = mx.float32

    def __init__(self, gather_dtype: Dtype | None = None):
        """gather_dtype: what expert weights are stored in where MLX gathers no other type."""
        self._gather_dtype = gather_dtype

    zeros = staticmethod(mx.zeros)
    arange = staticmethod(mx.arange)
    exp = staticmethod(mx.exp)
    sqrt = staticmethod(mx.sqrt)
    abs = staticmethod(mx.abs)
    round = staticmethod(mx.round)
    sigmoid = staticmethod(mx.sigmoid)
    maximum = staticmethod(mx.maximum)
    minimum = staticmethod(mx.minimum)
    where = staticmethod(mx.where)
    concatenate = staticmethod(mx.concatenate)
    stack = staticmethod(mx.stack)
    broadcast_to = staticmethod(mx.broadcast_to)
    sort = staticmethod(mx.sort)
    sum = staticmethod(mx.sum)
    argsort = staticmethod(mx.argsort)
    take_along_axis = staticmethod(mx.take_along_axis)

    def array(self, x: npt.NDArray[Any] | mx.array) -> mx.array:
        if isinstance(x, mx.array):  # of it mx.array would make a copy
            return x
        return mx.array(x, mx.float32) if x.dtype == np.float64 else mx.array(x)

    def to_mlx(self, x: mx.array) -> mx.array:
        return x

    def cast(self, x: mx.array, dtype: Dtype) -> mx.array:
        return x.astype(dtype)

    def softplus(self, x: mx.array) -> mx.array:
        return mx.logaddexp(x, mx.array(0.0))

    def copy(self, x: mx.array) -> mx.array:
        return mx.contiguous(x)  # shares memory only where x is nearly all of its buffer

    def append_zeros(self, x: mx.array, n: int) -> mx.array:
        return mx.pad(x, [(0, n)] + [(0, 0)] * (x.ndim - 1)) if n else x

    def windows(self, x: mx.array, n: int, width: int) -> mx.array:
        d = x.shape[1]
        return mx.as_strided(x, (n, 1, width, d), (d, 0, d, 1))

    def hadamard(self, x: mx.array) -> mx.array:
        return mx.hadamard_transform(x, scale=x.shape[-1] ** -0.5)

    def float_bits(self, x: mx.array) -> mx.array:
        return x.view(mx.uint32)

    def bits_float(self, x: mx.array) -> mx.array:
        return x.view(mx.float32)

    def pack(self, parts: Sequence[tuple[F32, Dtype]]) -> Weight:
        arrays = tuple(mx.array(w).astype(dtype) for w, dtype in parts)
        return Weight(arrays, tuple(w.shape[-2] for w, _ in parts))

    def pack_experts(self, n_experts: int, out: int, n_in: int, dtype: Dtype) -> ExpertBuilder:
        return _MlxExperts(n_experts, self._gather_dtype or dtype)

    def project(self, x: mx.array, weight: Weight) -> tuple[mx.array, ...]:
        return tuple(x.astype(w.dtype) @ w.T for w in weight.arrays)

    def grouped(self, x: mx.array, weight: Weight) -> mx.array:
        w = weight.arrays[0]  # [G, out, in]
        y = x.astype(w.dtype).swapaxes(0, 1) @ w.swapaxes(1, 2)
        return y.swapaxes(0, 1)

    def experts(self, x: mx.array, ids: mx.array, weight: Weight | PackedWeight) -> mx.array:
        w = _unpacked(weight) if isinstance(weight, PackedWeight) else weight.arrays[0]
        y = mx.gather_mm(x.astype(w.dtype)[:, None, :], w.swapaxes(1, 2), rhs_indices=ids)
        return y[:, 0, :]


def _unpacked(weight: PackedWeight) -> mx.array:
    """All experts of one layer, float32 [E, out, in], for this one use."""
    n_experts = weight.records.shape[0]
    maps = [
        decode_mlx(part[1], weight.rows(weight.records, part)).reshape(n_experts, -1, weight.n_in)
        for part in weight.parts
    ]
    return mx.concatenate(maps, axis=1)


class _MlxExperts:
    def __init__(self, n_experts: int, dtype: Dtype):
        self.rows: list[list[mx.array]] = [[] for _ in range(n_experts)]
        self.dtype = dtype

    def put(self, expert: int, row: int, weight: F32) -> None:
        assert sum(w.shape[0] for w in self.rows[expert]) == row, "experts fill in row order"
        self.rows[expert].append(mx.array(weight).astype(self.dtype))

    def done(self) -> Weight:
        stacked = mx.stack([mx.concatenate(rows) for rows in self.rows])
        return Weight((stacked,), (stacked.shape[1],))
