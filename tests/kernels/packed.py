"""Random weights in every format, for the tests of the kernels that read them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ds4py.formats.gguf_blocks import FORMATS
from ds4py.formats.gguf_blocks.scales import HALVES
from ds4py.kernels.formats import FP8, PackedMatrix, row_bytes


def random_rows(name: str, n: int, n_in: int, rng: np.random.Generator) -> Any:
    """uint8 [n, bytes of a row]: any bytes, but scales that make values of about 1."""
    if name in ("F32", "F16"):
        kind = np.float32 if name == "F32" else np.float16
        return rng.standard_normal((n, n_in)).astype(kind).view(np.uint8)
    if name == "BF16":
        bits = rng.standard_normal((n, n_in)).astype(np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16).view(np.uint8)
    data = rng.integers(0, 256, (n, row_bytes(name, n_in)), dtype=np.uint8)
    if name == FP8:
        data[(data & 127) == 127] = 0  # NaN, which no weight is
        data[:, ::129] = rng.integers(118, 122, data[:, ::129].shape)
        return data
    fmt = FORMATS[name]
    blocks = data.reshape(n, -1, fmt.block_bytes)
    if name == "MXFP4":
        blocks[..., 0] = rng.integers(124, 129, blocks.shape[:2])
        return data
    size = {"Q8_0": 0.01, "Q2_K": 0.05, "Q4_K": 0.003, "Q6_K": 0.0005, "IQ2_XXS": 0.01}[name]
    for at in HALVES[name]:
        scale = rng.uniform(size / 2, size, blocks.shape[:2])
        scale *= rng.choice((-1, 1), blocks.shape[:2])
        blocks[..., at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return data


def random_matrix(name: str, n: int, n_in: int, rng: np.random.Generator) -> PackedMatrix:
    """A matrix [n, n_in] of random bytes."""
    return PackedMatrix(name, random_rows(name, n, n_in, rng), n_in)
