"""float32 weights -> GGUF's block formats, with an importance for every input channel.

What is minimised is the sum over a row of importance * (value - decoded value)^2. With the mean
square of each input channel as importance that is, up to correlations between channels, the
expected squared error of the layer's output.

Measured against ggml's quantisers (llama.cpp b10605) on the data of tools/make_encode_figures.py,
our error as a share of theirs, gaussian to heavy-tailed weights; and, on one core of an AMD EPYC
with AVX2, 10^6 weights a second without and with an importance:

    format     no importance   importance    10^6/s
    Q8_0        0.85 - 0.92    0.77 - 0.88   109   109
    Q6_K        0.97 - 0.97    0.95 - 0.97    54    51
    Q4_K        0.95 - 0.97    0.92 - 0.94    24    24
    Q2_K        0.89 - 0.94    0.84 - 0.91    17    16
    IQ2_XXS     0.66 - 0.91    0.64 - 0.84    12     9
    MXFP4       0.94 - 0.96    0.93 - 0.96   117   119

ggml multiplies the importance by a root of the value's own square and so prefers large values. With
that as the weight ours stays below theirs as well: 0.68 - 0.98 for IQ2_XXS, Q2_K and Q4_K.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.errors import WeightsError
from ds4py.formats.gguf_blocks import F32, U8, block_format
from ds4py.quant import encode_affine, encode_iq2, encode_symmetric

_KERNELS: dict[str, Callable[[Any, Any, Any], None]] = {
    "Q8_0": encode_symmetric.q8_0,
    "Q6_K": encode_symmetric.q6_k,
    "MXFP4": encode_symmetric.mxfp4,
    "Q4_K": encode_affine.q4_k,
    "Q2_K": encode_affine.q2_k,
    "IQ2_XXS": encode_iq2.iq2_xxs,
}
LEAST_IMPORTANCE = 1e-4
"""Of the mean. A channel that a corpus never used is not proof that it never will be."""
MOST = 1e15
"""The largest magnitude taken; its square is far from the limits of float32."""
_SLICE = 1 << 16
"""Values a thread encodes at a time: short enough that threads end together."""


def encode(
    name: str, x: F32, importance: npt.ArrayLike | None = None, threads: int | None = None
) -> U8:
    """Rows x [rows, cols] -> uint8 [rows, bytes of a row] in the format `name`.

    importance: [cols], >= 0; None weighs all channels alike. threads: how many share the rows,
    None for all cores. The bytes do not depend on it. WeightsError for values that are NaN or
    beyond MOST and for rows the format cannot hold.
    """
    fmt = block_format(name)
    rows, cols = x.shape
    n_bytes = fmt.row_bytes(cols)
    if x.size and not (x.max() <= MOST and x.min() >= -MOST):
        raise WeightsError(
            f"{int((~(np.abs(x) <= MOST)).sum())} of {x.size} weights are not numbers or beyond "
            f"{MOST:g} and cannot be stored as {name}; the source is damaged"
        )
    blocks = cols // fmt.block_values
    x = np.ascontiguousarray(x, np.float32).reshape(rows, blocks, fmt.block_values)
    w = _weights(importance, cols).reshape(blocks, fmt.block_values)
    out = np.empty((rows, blocks, fmt.block_bytes), np.uint8)
    kernel, step = _KERNELS[name], max(1, _SLICE // max(cols, 1))

    def run(start: int) -> None:
        kernel(x[start : start + step], w, out[start : start + step])

    starts = range(0, rows, step)
    if threads == 1 or len(starts) < 2:
        for start in starts:
            run(start)
    else:
        with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
            list(pool.map(run, starts))
    return out.reshape(rows, n_bytes)


def _weights(importance: npt.ArrayLike | None, cols: int) -> F32:
    """Importance [cols] scaled to a mean of 1, with a least value; ones where it is all zero."""
    if importance is None:
        return np.ones(cols, np.float32)
    w = np.asarray(importance, np.float64)
    if w.shape != (cols,) or not np.isfinite(w).all() or (w < 0).any():
        raise WeightsError(
            f"an importance of shape {w.shape} for rows of {cols} values: one finite number >= 0 "
            "for each value is needed; collect it again"
        )
    mean = w.mean() if cols else 0.0
    if mean == 0:
        return np.ones(cols, np.float32)
    return np.maximum(w / mean, LEAST_IMPORTANCE).astype(np.float32)
