"""Matrix products, the place where the CPU and the GPU are served differently.

`MlxDense` is plain MLX. `BlasDense` computes the same products with numpy's BLAS: MLX 0.32's CPU
matmul reaches about 3 GFLOP/s on two cores, the BLAS over 100. Chosen once, when a model is opened.
Kernels with a `_host` form use it when `dense.host` says that the numbers are on the host anyway:
one numpy call costs about 1 us there, one MLX operation 4 us, one evaluation 40 us.

A row's result must not depend on how many rows are computed with it (decode = prefill = chunks,
bit for bit). BLAS libraries switch kernels with the shape, so `BlasDense` keeps to shapes where
OpenBLAS accumulates every output element in the same order: at least two rows, weights stored
[in, out], out a multiple of 32, and at most 256 inputs per call, partial sums added in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]

K_BLOCK = 256
"""Inputs per BLAS call: below OpenBLAS's own split of the inner dimension on every x86 kernel."""
N_MULTIPLE = 32
"""Outputs are padded to whole register tiles, so that no edge kernel is used."""


@dataclass(frozen=True)
class Weight:
    """One or several linear maps that share an input.

    `arrays`: MLX weights [out_i, in] (or [E, out_i, in]), or one host array [in, padded out]
    (or [E, in, padded out]). `widths`: out_i. `dtypes`: of each result.
    """

    arrays: tuple[Any, ...]
    widths: tuple[int, ...]
    dtypes: tuple[mx.Dtype, ...]

    @property
    def n_bytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays)


class Dense(Protocol):
    """The matrix products a model needs. All accumulate in float32."""

    name: str
    host: bool
    """Whether products are computed by the host's BLAS, so that host kernels save evaluations."""

    def pack(self, parts: Sequence[tuple[F32, mx.Dtype]]) -> Weight:
        """float32 maps [out_i, in] that share an input, and the dtype of each result."""
        ...

    def pack_experts(self, n_experts: int, out: int, n_in: int, dtype: mx.Dtype) -> ExpertBuilder:
        """Room for `n_experts` maps [out, in], to be filled one expert at a time."""
        ...

    def project(self, x: mx.array, weight: Weight) -> tuple[mx.array, ...]:
        """x [..., in] -> one [..., out_i] per part."""
        ...

    def grouped(self, x: mx.array, weight: Weight) -> mx.array:
        """x [S, G, in] through G maps [G, out, in] -> [S, G, out]."""
        ...

    def experts(self, x: mx.array, ids: mx.array, weight: Weight) -> mx.array:
        """x [R, in], ids [R] ascending -> [R, out], row r through expert ids[r]."""
        ...

    def batched(self, a: mx.array, b: mx.array) -> mx.array:
        """a [..., M, K] @ b [..., K, N] with broadcast batch axes -> float32 [..., M, N]."""
        ...


class ExpertBuilder(Protocol):
    """Fills one stacked weight expert by expert, so that loading never holds two copies."""

    def put(self, expert: int, row: int, weight: F32) -> None:
        """Place `weight` [n, in] at output rows row..row+n of one expert."""
        ...

    def done(self) -> Weight: ...


def to_numpy(x: mx.array) -> npt.NDArray[Any]:
    """A float32 host view of `x` (evaluates it); integers keep their dtype."""
    if x.dtype == mx.bfloat16 or x.dtype == mx.float16:
        x = x.astype(mx.float32)
    return np.array(x, copy=False)


class MlxDense:
    """Plain MLX: the reference on a GPU, and the slow cross-check on a CPU."""

    name = "mlx"
    host = False

    def pack(self, parts: Sequence[tuple[F32, mx.Dtype]]) -> Weight:
        arrays = tuple(mx.array(w).astype(dtype) for w, dtype in parts)
        return Weight(arrays, tuple(w.shape[-2] for w, _ in parts), tuple(d for _, d in parts))

    def pack_experts(self, n_experts: int, out: int, n_in: int, dtype: mx.Dtype) -> ExpertBuilder:
        return _MlxExperts(n_experts, out, n_in, dtype)

    def project(self, x: mx.array, weight: Weight) -> tuple[mx.array, ...]:
        return tuple(x.astype(w.dtype) @ w.T for w in weight.arrays)

    def grouped(self, x: mx.array, weight: Weight) -> mx.array:
        w = weight.arrays[0]  # [G, out, in]
        y = x.astype(w.dtype).swapaxes(0, 1) @ w.swapaxes(1, 2)
        return y.swapaxes(0, 1)

    def experts(self, x: mx.array, ids: mx.array, weight: Weight) -> mx.array:
        w = weight.arrays[0]  # [E, out, in]
        y = mx.gather_mm(
            x.astype(w.dtype)[:, None, :], w.swapaxes(1, 2), rhs_indices=ids, sorted_indices=True
        )
        return y[:, 0, :]

    def batched(self, a: mx.array, b: mx.array) -> mx.array:
        return a.astype(mx.float32) @ b.astype(mx.float32)


class _MlxExperts:
    def __init__(self, n_experts: int, out: int, n_in: int, dtype: mx.Dtype):
        self.rows: list[list[mx.array]] = [[] for _ in range(n_experts)]
        self.out, self.n_in, self.dtype = out, n_in, dtype

    def put(self, expert: int, row: int, weight: F32) -> None:
        assert sum(w.shape[0] for w in self.rows[expert]) == row, "experts fill in row order"
        self.rows[expert].append(mx.array(weight).astype(self.dtype))

    def done(self) -> Weight:
        stacked = mx.stack([mx.concatenate(rows) for rows in self.rows])
        return Weight((stacked,), (self.out,), (self.dtype,))


class BlasDense:
    """numpy's BLAS over host arrays. Each call evaluates its inputs and copies its result."""

    name = "blas"
    host = True

    def pack(self, parts: Sequence[tuple[F32, mx.Dtype]]) -> Weight:
        widths = tuple(w.shape[-2] for w, _ in parts)
        *lead, _, n_in = parts[0][0].shape
        host = np.zeros((*lead, n_in, _padded(sum(widths))), np.float32)
        column = 0
        for (w, _), width in zip(parts, widths, strict=True):
            host[..., column : column + width] = np.swapaxes(w, -1, -2)
            column += width
        return Weight((host,), widths, tuple(d for _, d in parts))

    def pack_experts(self, n_experts: int, out: int, n_in: int, dtype: mx.Dtype) -> ExpertBuilder:
        return _BlasExperts(n_experts, out, n_in, dtype)

    def project(self, x: mx.array, weight: Weight) -> tuple[mx.array, ...]:
        parts = host_project(to_numpy(x), weight)
        return tuple(to_mlx(y, dtype) for y, dtype in zip(parts, weight.dtypes, strict=True))

    def grouped(self, x: mx.array, weight: Weight) -> mx.array:
        host, w, width = to_numpy(x), weight.arrays[0], weight.widths[0]
        y = np.stack([gemm(host[:, g], w[g])[:, :width] for g in range(w.shape[0])], axis=1)
        return to_mlx(y, weight.dtypes[0])

    def experts(self, x: mx.array, ids: mx.array, weight: Weight) -> mx.array:
        return to_mlx(host_experts(to_numpy(x), to_numpy(ids), weight), weight.dtypes[0])

    def batched(self, a: mx.array, b: mx.array) -> mx.array:
        return mx.array(np.matmul(to_numpy(a), to_numpy(b)))


class _BlasExperts:
    def __init__(self, n_experts: int, out: int, n_in: int, dtype: mx.Dtype):
        self.host = np.zeros((n_experts, n_in, _padded(out)), np.float32)
        self.out, self.dtype = out, dtype

    def put(self, expert: int, row: int, weight: F32) -> None:
        self.host[expert, :, row : row + weight.shape[0]] = weight.T

    def done(self) -> Weight:
        return Weight((self.host,), (self.out,), (self.dtype,))


def _padded(n: int) -> int:
    return -(-n // N_MULTIPLE) * N_MULTIPLE


def to_mlx(x: npt.NDArray[Any], dtype: mx.Dtype) -> mx.array:
    """A copy of a host array in `dtype`."""
    y = mx.array(x)
    return y if dtype == mx.float32 else y.astype(dtype)


def host_project(x: F32, weight: Weight) -> list[F32]:
    """`BlasDense.project` on host arrays: x [..., in] -> views [..., out_i], float32."""
    y = gemm(x.reshape(-1, x.shape[-1]), weight.arrays[0])
    parts, column = [], 0
    for width in weight.widths:
        parts.append(y[:, column : column + width].reshape(*x.shape[:-1], width))
        column += width
    return parts


def host_experts(x: F32, ids: npt.NDArray[Any], weight: Weight) -> F32:
    """`BlasDense.experts` on host arrays: x [R, in], ids [R] ascending -> [R, out]."""
    w, width = weight.arrays[0], weight.widths[0]
    y = np.empty((x.shape[0], width), np.float32)
    starts = [0, *(np.flatnonzero(ids[1:] != ids[:-1]) + 1), len(ids)]
    for start, end in pairwise(starts):
        y[start:end] = gemm(x[start:end], w[ids[start]])[:, :width]
    return y


def gemm(x: F32, w: F32) -> F32:
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
