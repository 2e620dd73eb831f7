"""The array operations on numpy, for machines without a GPU: float32 for speed, float64 for proof.

A row's result must not depend on how many rows are computed with it. BLAS libraries switch kernels
with the shape, so products keep to shapes where OpenBLAS accumulates every output element in the
same order: at least two rows, weights stored [in, out], out a multiple of 32, and at most 256
inputs per call, partial sums added in order. tests/kernels/test_ops.py checks it on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.formats.gguf_blocks import decode_columns
from ds4py.kernels.decoded import DecodedMaps
from ds4py.kernels.ops import F32, Dtype, ExpertBuilder, PackedWeight, Weight

K_BLOCK = 256
"""Inputs per BLAS call: below OpenBLAS's own split of the inner dimension on every x86 kernel."""
N_MULTIPLE = 32
"""Outputs are padded to whole register tiles, so that no edge kernel is used."""

Host = npt.NDArray[Any]


class HostOps:
    """numpy arrays of one float type, which Python scalars keep (NEP 50)."""

    name = "host"
    lazy = False
    int32: Dtype = np.int32
    uint8: Dtype = np.uint8
    uint16: Dtype = np.uint16
    uint32: Dtype = np.uint32
    float32: Dtype = np.float32

    zeros = staticmethod(np.zeros)
    arange = staticmethod(np.arange)
    exp = staticmethod(np.exp)
    sqrt = staticmethod(np.sqrt)
    abs = staticmethod(np.abs)
    round = staticmethod(np.rint)
    maximum = staticmethod(np.maximum)
    minimum = staticmethod(np.minimum)
    where = staticmethod(np.where)
    concatenate = staticmethod(np.concatenate)
    stack = staticmethod(np.stack)
    broadcast_to = staticmethod(np.broadcast_to)
    sort = staticmethod(np.sort)
    sum = staticmethod(np.add.reduce)  # np.sum calls it, after 1 us of Python

    def __init__(self, wide: Dtype = np.float32) -> None:
        self.wide: Dtype = wide
        self._hadamard: dict[int, Host] = {}
        self._scratch = DecodedMaps()  # of weights whose maps are not kept

    def array(self, x: Host | mx.array) -> Host:
        """Host arrays in this set's type; a token id sampled on the device is fetched."""
        x = np.asarray(x)
        return x.astype(self.wide, copy=False) if x.dtype.kind == "f" else x

    def to_mlx(self, x: Host) -> mx.array:
        return mx.array(x.astype(np.float32, copy=False))

    def cast(self, x: Host, dtype: Dtype) -> Host:
        return x.astype(dtype, copy=False)

    def sigmoid(self, x: Host) -> Host:
        with np.errstate(over="ignore"):  # exp of a large -x is inf, and 1/inf the right 0
            return np.reciprocal(1 + np.exp(-x))

    def softplus(self, x: Host) -> Host:
        return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)

    def argsort(self, x: Host, axis: int) -> Host:
        return np.argsort(x, axis=axis, kind="stable")

    def take_along_axis(self, x: Host, ids: Host, axis: int) -> Host:
        assert axis == 1 and x.ndim == ids.ndim == 2
        return x[np.arange(len(x))[:, None], ids]  # np.take_along_axis takes 10 us to say the same

    def copy(self, x: Host) -> Host:
        return x.copy()

    def append_zeros(self, x: Host, n: int) -> Host:
        return np.concatenate([x, np.zeros((n, *x.shape[1:]), x.dtype)]) if n else x

    def windows(self, x: Host, n: int, width: int) -> Host:
        row, item = x.strides
        shape, strides = (n, 1, width, x.shape[1]), (row, 0, row, item)
        return np.ndarray(shape, x.dtype, x, 0, strides)

    def hadamard(self, x: Host) -> Host:
        d = x.shape[-1]
        if d not in self._hadamard:
            h = np.ones((1, 1), np.float32)
            while len(h) < d:
                h = np.block([[h, h], [h, -h]])
            self._hadamard[d] = h.astype(self.wide)
        y = gemm(x.reshape(-1, d), self._hadamard[d])
        return (y * d**-0.5).reshape(x.shape)

    def float_bits(self, x: Host) -> npt.NDArray[np.uint32]:
        return x.astype(np.float32, copy=False).view(np.uint32)

    def bits_float(self, x: npt.NDArray[np.uint32]) -> Host:
        return x.view(np.float32)

    def pack(self, parts: Sequence[tuple[F32, Dtype]]) -> Weight:
        widths = tuple(w.shape[-2] for w, _ in parts)
        *lead, _, n_in = parts[0][0].shape
        host = np.zeros((*lead, n_in, _padded(sum(widths))), self.wide)
        column = 0
        for (w, _), width in zip(parts, widths, strict=True):
            host[..., column : column + width] = np.swapaxes(w, -1, -2)
            column += width
        return Weight((host,), widths)

    def pack_experts(self, n_experts: int, out: int, n_in: int, dtype: Dtype) -> ExpertBuilder:
        return _HostExperts(n_experts, out, n_in, self.wide)

    def project(self, x: Host, weight: Weight) -> tuple[Host, ...]:
        y = gemm(x.reshape(-1, x.shape[-1]), weight.arrays[0])
        parts, column = [], 0
        for width in weight.widths:
            part = y[:, column : column + width]
            parts.append(part if x.ndim == 2 else part.reshape(*x.shape[:-1], width))
            column += width
        return tuple(parts)

    def grouped(self, x: Host, weight: Weight) -> Host:
        w, width = weight.arrays[0], weight.widths[0]
        return np.stack([gemm(x[:, g], w[g])[:, :width] for g in range(w.shape[0])], axis=1)

    def experts(self, x: Host, ids: Host, weight: Weight | PackedWeight) -> Host:
        starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
        parts = []
        for start, end in pairwise(starts):
            w, width = self._expert(weight, ids[start])
            parts.append(gemm(x[start:end], w)[:, :width])
        return np.concatenate(parts)

    def _expert(self, weight: Weight | PackedWeight, expert: int) -> tuple[Host, int]:
        """One expert's map as [in, padded out], and out."""
        if isinstance(weight, Weight):
            return weight.arrays[0][expert], weight.widths[0]
        width, key = weight.n_out, (weight, int(expert))
        shape = weight.n_in, _padded(width)
        if weight.decoded is not None and (w := weight.decoded.find(shape, key)) is not None:
            return w, width
        maps, column = weight.decoded or self._scratch, 0
        w = maps.room(shape, self.wide)
        for part in weight.parts:
            blocks = weight.rows(weight.records[expert : expert + 1], part)
            decode_columns(part[1], blocks, w[:, column : column + len(blocks)])
            column += len(blocks)
        maps.keep(key, w)
        return w, width


class _HostExperts:
    def __init__(self, n_experts: int, out: int, n_in: int, dtype: Dtype):
        self.host = np.zeros((n_experts, n_in, _padded(out)), dtype)
        self.out = out

    def put(self, expert: int, row: int, weight: F32) -> None:
        self.host[expert, :, row : row + weight.shape[0]] = weight.T

    def done(self) -> Weight:
        return Weight((self.host,), (self.out,))


def _padded(n: int) -> int:
    return -(-n // N_MULTIPLE) * N_MULTIPLE


def gemm(x: Host, w: Host) -> Host:
    """x [M, K] @ w [K, N], each row independent of M."""
    n_rows = x.shape[0]
    if n_rows == 1:  # a one-row product would go to a matrix-vector kernel with another order
        x = np.concatenate([x, x])
    if x.shape[1] <= K_BLOCK:
        return (x @ w)[:n_rows]
    y = x[:, :K_BLOCK] @ w[:K_BLOCK]
    for k in range(K_BLOCK, x.shape[1], K_BLOCK):
        y += x[:, k : k + K_BLOCK] @ w[k : k + K_BLOCK]
    return y[:n_rows]
