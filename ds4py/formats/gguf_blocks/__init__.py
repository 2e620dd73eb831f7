"""GGUF's block formats: what a block holds, and decoders in numpy and MLX.

A row of a tensor is a run of blocks. Each decoder is written once, for both array libraries, so
that they cannot drift apart; every product is rounded where the `gguf` package rounds it, which
makes the values equal bit for bit. A scale that is NaN or infinite decodes to what arithmetic
makes of it: whoever opens a file decides whether that is an error.

Source: ggml's formats (MIT licence), as docs and the `gguf` package describe them; MXFP4 from the
OCP MX specification 1.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.errors import WeightsError
from ds4py.formats.gguf_blocks.tables import IQ2XXS_GRID

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

Array = Any
"""A numpy array or an `mx.array`."""
Library = Any
"""The module `numpy` or `mlx.core`."""


@dataclass(frozen=True)
class BlockFormat:
    """One format. The public name is GGUF's."""

    name: str
    gguf_type: int
    """Number of the type in a GGUF file."""
    block_values: int
    """Consecutive values of a row that a block holds."""
    block_bytes: int
    blocks: Callable[[Library, Array], Array]
    """Decoder: uint8 [n, block_bytes] -> float32 [n, block_values]."""

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block_values

    def row_bytes(self, values: int) -> int:
        """Bytes of a row of `values`. WeightsError when no whole number of blocks fits."""
        if values % self.block_values:
            raise WeightsError(
                f"a row of {values} values cannot be stored as {self.name}, whose blocks hold "
                f"{self.block_values}; choose another format for this tensor"
            )
        return values // self.block_values * self.block_bytes

    def row_values(self, n_bytes: int) -> int:
        """Values of a row of `n_bytes`. WeightsError when it is no whole number of blocks."""
        if n_bytes % self.block_bytes:
            raise WeightsError(
                f"a row of {n_bytes} bytes is not {self.name}, whose blocks have "
                f"{self.block_bytes} bytes; the tensor's type or shape is wrong"
            )
        return n_bytes // self.block_bytes * self.block_values


def _floats(xp: Library, half: Array) -> Array:
    """The bytes of one float16 [n, 2] -> float32 [n, 1]."""
    return half.view(xp.float16).astype(xp.float32)


def _shifts(xp: Library, *shifts: int) -> Array:
    """Shift counts along the last axis but one, as uint8."""
    return xp.array(shifts, dtype=xp.uint8).reshape(-1, 1)


def _q8_0(xp: Library, b: Array) -> Array:
    """f16 d; i8 q[32]. Value d q."""
    return b[:, 2:].view(xp.int8).astype(xp.float32) * _floats(xp, b[:, :2])


def _q2_k(xp: Library, b: Array) -> Array:
    """u8 scales[16] (scale low, minimum high); u8 q[64]; f16 d; f16 dmin. Value d s q - dmin m.

    16 runs of 16 values. Half h of the block has bytes 32h..32h+31 of q, two bits a value.
    """
    d, dmin = _floats(xp, b[:, 80:82]), _floats(xp, b[:, 82:84])
    scale = d * (b[:, :16] & 15).astype(xp.float32)
    least = dmin * (b[:, :16] >> 4).astype(xp.float32)
    q = (b[:, 16:80].reshape(-1, 2, 1, 32) >> _shifts(xp, 0, 2, 4, 6)) & 3
    runs = q.reshape(-1, 16, 16).astype(xp.float32)
    return (scale[..., None] * runs - least[..., None]).reshape(-1, 256)


def _q4_k(xp: Library, b: Array) -> Array:
    """f16 d; f16 dmin; 8 pairs of 6-bit scale and minimum; u8 q[128]. Value d s q - dmin m.

    8 runs of 32 values; 32 bytes hold the low nibbles of one run and the high ones of the next.
    The pairs: bytes 0-3 scales, 4-7 minima of runs 0-3; bytes 8-11 the low four bits of runs 4-7
    (scale low, minimum high), whose upper two bits top bytes 0-3 and 4-7.
    """
    d, dmin = _floats(xp, b[:, 0:2]), _floats(xp, b[:, 2:4])
    first, second, low = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    s = xp.concatenate([first & 63, (low & 15) | ((first >> 2) & 48)], axis=1)
    m = xp.concatenate([second & 63, (low >> 4) | ((second >> 2) & 48)], axis=1)
    scale, least = d * s.astype(xp.float32), dmin * m.astype(xp.float32)
    q = (b[:, 16:].reshape(-1, 4, 1, 32) >> _shifts(xp, 0, 4)) & 15
    runs = q.reshape(-1, 8, 32).astype(xp.float32)
    return (scale[..., None] * runs - least[..., None]).reshape(-1, 256)


def _q6_k(xp: Library, b: Array) -> Array:
    """u8 low[128]; u8 high[64]; i8 scales[16]; f16 d. Value d s (q - 32), 16 runs of 16.

    Half h: values 0-31, 32-63 from the low nibbles of 64 bytes, 64-127 from their high nibbles;
    the upper two bits of value 32j + i are bits 2j, 2j+1 of byte i of the half's 32.
    """
    d = _floats(xp, b[:, 208:210])
    scale = d * b[:, 192:208].view(xp.int8).astype(xp.float32)
    low = (b[:, :128].reshape(-1, 2, 1, 64) >> _shifts(xp, 0, 4)) & 15
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> _shifts(xp, 0, 2, 4, 6)) & 3
    q = low.reshape(-1, 2, 4, 32) | (high << 4)
    runs = q.reshape(-1, 16, 16).astype(xp.float32) - 32
    return (scale[..., None] * runs).reshape(-1, 256)


def _iq2_xxs_signs() -> F32:
    """The eight signs of each 7-bit index, [128, 8]: the eighth makes the count of minuses even."""
    bits = (np.arange(128)[:, None] >> np.arange(7)) & 1
    return (1 - 2 * np.column_stack([bits, bits.sum(1) & 1])).astype(np.float32)


IQ2XXS_SIGNS = _iq2_xxs_signs()


def _iq2_xxs(xp: Library, b: Array) -> Array:
    """f16 d; 8 groups of 32 values: u8 point[4]; u32 with 4 sign indices of 7 bits and scale s.

    Value d (s + 1/2) / 4 times the coordinate of the point, with its sign.
    """
    d = _floats(xp, b[:, :2])
    points = xp.concatenate([b[:, 2 + 8 * g : 6 + 8 * g] for g in range(8)], axis=1)
    words = xp.concatenate([b[:, 6 + 8 * g : 10 + 8 * g] for g in range(8)], axis=1).view(xp.uint32)
    scale = d * ((words >> 28).astype(xp.float32) + 0.5) * 0.25
    index = (words[..., None] >> xp.array([0, 7, 14, 21], dtype=xp.uint32)) & 127
    grid = xp.array(IQ2XXS_GRID)[points].reshape(-1, 8, 32)
    signs = xp.array(IQ2XXS_SIGNS)[index].reshape(-1, 8, 32)
    return (scale[..., None] * grid * signs).reshape(-1, 256)


# Twice E2M1, because the scale below is halved; minus zero is not told from zero.
_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
_HALF_E8M0 = np.exp2(np.arange(256) - 128.0).astype(np.float32)


def _mxfp4(xp: Library, b: Array) -> Array:
    """E8M0 scale; u8 q[16], value i in the low nibble of byte i, value 16 + i in its high one."""
    q = (b[:, 1:].reshape(-1, 1, 16) >> _shifts(xp, 0, 4)) & 15
    return xp.array(_HALF_E8M0)[b[:, :1]] * xp.array(_MXFP4)[q.reshape(-1, 32)]


FORMATS = {
    f.name: f
    for f in (
        BlockFormat("Q8_0", 8, 32, 34, _q8_0),
        BlockFormat("Q2_K", 10, 256, 84, _q2_k),
        BlockFormat("Q4_K", 12, 256, 144, _q4_k),
        BlockFormat("Q6_K", 14, 256, 210, _q6_k),
        BlockFormat("IQ2_XXS", 16, 256, 66, _iq2_xxs),
        BlockFormat("MXFP4", 39, 32, 17, _mxfp4),
    )
}
"""The formats by name."""
BY_GGUF_TYPE = {f.gguf_type: f for f in FORMATS.values()}
"""The formats by their number in a GGUF file."""


_CHUNK = 1 << 16
"""Values decoded at a time: the steps between stay in the cache and need no memory to speak of."""


def block_format(name: str) -> BlockFormat:
    """The format of that name. WeightsError for an unknown one."""
    if name not in FORMATS:
        raise WeightsError(f"{name!r} is no block format; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def decode(name: str, data: U8) -> F32:
    """Blocks uint8 [..., bytes of a row] -> float32 [..., values of a row]."""
    fmt = block_format(name)
    shape = (*data.shape[:-1], fmt.row_values(data.shape[-1]))
    blocks = np.ascontiguousarray(data).reshape(-1, fmt.block_bytes)
    values = np.empty((len(blocks), fmt.block_values), np.float32)
    step = _CHUNK // fmt.block_values
    with np.errstate(invalid="ignore", over="ignore"):  # scales that are NaN or infinite
        for start in range(0, len(blocks), step):
            values[start : start + step] = fmt.blocks(np, blocks[start : start + step])
    return values.reshape(shape)


def decode_mlx(name: str, data: mx.array) -> mx.array:
    """`decode` on MLX arrays, lazily."""
    fmt = block_format(name)
    shape = (*data.shape[:-1], fmt.row_values(data.shape[-1]))
    return fmt.blocks(mx, data.reshape(-1, fmt.block_bytes)).reshape(shape)


def mxfp4_from_fp4(packed: U8, scale: U8) -> U8:
    """DeepSeek's FP4 -> MXFP4, the same codes and scales in another order: nothing is lost.

    packed: E2M1 [rows, cols/2], low nibble first. scale: E8M0 [rows, cols/32]. Returns uint8
    [rows, cols/32 * 17]. WeightsError for a scale that is NaN, which GGUF would read as 2^128.
    """
    if (scale == 255).any():
        raise WeightsError(
            f"{int((scale == 255).sum())} of {scale.size} FP4 scales are NaN (byte 255); the file "
            "is damaged, download it again"
        )
    pairs = packed.reshape(*scale.shape, 16)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*scale.shape, 2, 16)
    blocks = np.empty((*scale.shape, 17), np.uint8)
    blocks[..., 0] = scale
    blocks[..., 1:] = codes[..., 0, :] | codes[..., 1, :] << 4
    return blocks.reshape(scale.shape[0], -1)


def fp4_from_mxfp4(data: U8) -> tuple[U8, U8]:
    """MXFP4 uint8 [rows, bytes] -> DeepSeek's packed FP4 and its scale: `mxfp4_from_fp4` undone."""
    rows, values = data.shape[0], FORMATS["MXFP4"].row_values(data.shape[1])
    blocks = data.reshape(rows, values // 32, 17)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed.reshape(rows, values // 2), blocks[..., 0].copy()
