"""GGUF's block formats: what a block holds, and decoders in numpy and MLX.

A row of a tensor is a run of blocks, and a block is runs of small integers, each with a scale and,
in some formats, a minimum. Each decoder is written once, for both array libraries, so that they
cannot drift apart; every product is rounded where the `gguf` package rounds it, which makes the
values equal bit for bit.

Decoders work on blocks side by side, byte k of all blocks in row k. So the values come as a linear
map needs them, [in, out], and the innermost axis is long: an operation of numpy costs as much for
8 values as for 100. A scale that is NaN or infinite decodes to what arithmetic
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
Runs = tuple[Array, Array, Array | None]
"""Scale [runs, n], integers [runs, length, n], minimum [runs, n]: scale * integer - minimum."""


@dataclass(frozen=True)
class BlockFormat:
    """One format. The public name is GGUF's."""

    name: str
    gguf_type: int
    """Number of the type in a GGUF file."""
    block_values: int
    """Consecutive values of a row that a block holds."""
    block_bytes: int
    runs: Callable[[Library, Array], Runs]
    """Decoder: uint8 [block_bytes, n] -> the runs of n blocks."""

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


def _half(xp: Library, low: Array, high: Array) -> Array:
    """The two bytes of float16 numbers -> float32."""
    return (low | high.astype(xp.uint16) << 8).view(xp.float16).astype(xp.float32)


def _shifted(xp: Library, x: Array, *shifts: int) -> Array:
    """x [..., k, n] shifted right by each count: [..., counts, k, n]."""
    return x[..., None, :, :] >> xp.array(shifts, dtype=xp.uint8).reshape(-1, 1, 1)


def _q8_0(xp: Library, b: Array) -> Runs:
    """f16 d; i8 q[32]. Value d q."""
    return _half(xp, b[:1], b[1:2]), b[None, 2:].view(xp.int8), None


def _q2_k(xp: Library, b: Array) -> Runs:
    """u8 scales[16] (scale low, minimum high); u8 q[64]; f16 d; f16 dmin. Value d s q - dmin m.

    16 runs of 16 values. Half h of the block has bytes 32h..32h+31 of q, two bits a value.
    """
    scale = _half(xp, b[80], b[81]) * (b[:16] & 15).astype(xp.float32)
    least = _half(xp, b[82], b[83]) * (b[:16] >> 4).astype(xp.float32)
    q = _shifted(xp, b[16:80].reshape(2, 32, -1), 0, 2, 4, 6) & 3
    return scale, q.reshape(16, 16, -1), least


def _q4_k(xp: Library, b: Array) -> Runs:
    """f16 d; f16 dmin; 8 pairs of 6-bit scale and minimum; u8 q[128]. Value d s q - dmin m.

    8 runs of 32 values; 32 bytes hold the low nibbles of one run and the high ones of the next.
    The pairs: bytes 0-3 scales, 4-7 minima of runs 0-3; bytes 8-11 the low four bits of runs 4-7
    (scale low, minimum high), whose upper two bits top bytes 0-3 and 4-7.
    """
    first, second, low = b[4:8], b[8:12], b[12:16]
    s = xp.concatenate([first & 63, (low & 15) | ((first >> 2) & 48)])
    m = xp.concatenate([second & 63, (low >> 4) | ((second >> 2) & 48)])
    scale = _half(xp, b[0], b[1]) * s.astype(xp.float32)
    least = _half(xp, b[2], b[3]) * m.astype(xp.float32)
    q = _shifted(xp, b[16:].reshape(4, 32, -1), 0, 4) & 15
    return scale, q.reshape(8, 32, -1), least


def _q6_k(xp: Library, b: Array) -> Runs:
    """u8 low[128]; u8 high[64]; i8 scales[16]; f16 d. Value d s (q - 32), 16 runs of 16.

    Half h: values 0-31, 32-63 from the low nibbles of 64 bytes, 64-127 from their high nibbles;
    the upper two bits of value 32j + i are bits 2j, 2j+1 of byte i of the half's 32.
    """
    scale = _half(xp, b[208], b[209]) * b[192:208].view(xp.int8).astype(xp.float32)
    low = _shifted(xp, b[:128].reshape(2, 64, -1), 0, 4) & 15
    high = _shifted(xp, b[128:192].reshape(2, 32, -1), 0, 2, 4, 6) & 3
    q = low.reshape(2, 4, 32, -1) | (high << 4)
    return scale, q.reshape(16, 16, -1).astype(xp.int8) - 32, None


def _iq2_xxs_signs() -> F32:
    """The eight signs of each 7-bit index, [128, 8]: the eighth makes the count of minuses even."""
    bits = (np.arange(128)[:, None] >> np.arange(7)) & 1
    return (1 - 2 * np.column_stack([bits, bits.sum(1) & 1])).astype(np.float32)


IQ2XXS_SIGNS = _iq2_xxs_signs()
# Every point with every choice of signs, [128 * 256, 8]: one look-up for eight values.
_SIGNED_POINTS = (IQ2XXS_SIGNS[:, None] * IQ2XXS_GRID).reshape(-1, 8).astype(np.int8)


def _iq2_xxs(xp: Library, b: Array) -> Runs:
    """f16 d; 8 groups of 32 values: u8 point[4]; u32 with 4 sign indices of 7 bits and scale s.

    Value d (s + 1/2) / 4 times the coordinate of the point, with its sign.
    """
    n = b.shape[1]
    groups = b[2:].reshape(8, 8, n)
    high = groups[:, 4:].astype(xp.uint32)
    word = high[:, 0] | high[:, 1] << 8 | high[:, 2] << 16 | high[:, 3] << 24
    scale = _half(xp, b[0], b[1]) * ((word >> 28).astype(xp.float32) + 0.5) * 0.25
    signs = (word[:, None] >> xp.array([0, 7, 14, 21], dtype=xp.uint32).reshape(4, 1)) & 127
    points = xp.take(xp.asarray(_SIGNED_POINTS), signs << 8 | groups[:, :4], axis=0)
    return scale, points.swapaxes(2, 3).reshape(8, 32, n), None


# Twice E2M1, because the scale below is halved; minus zero is not told from zero.
_MXFP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
_HALF_E8M0 = np.exp2(np.arange(256) - 128.0).astype(np.float32)


def _mxfp4(xp: Library, b: Array) -> Runs:
    """E8M0 scale; u8 q[16], value i in the low nibble of byte i, value 16 + i in its high one."""
    q = _shifted(xp, b[1:], 0, 4) & 15
    return xp.asarray(_HALF_E8M0)[b[:1]], xp.asarray(_MXFP4)[q.reshape(1, 32, -1)], None


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
"""Values decoded at a time: what lies between stays in the cache, and the allocator keeps it."""


def block_format(name: str) -> BlockFormat:
    """The format of that name. WeightsError for an unknown one."""
    if name not in FORMATS:
        raise WeightsError(f"{name!r} is no block format; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def decode(name: str, data: U8) -> F32:
    """Blocks uint8 [..., bytes of a row] -> float32 [..., values of a row]."""
    fmt = block_format(name)
    shape = (*data.shape[:-1], fmt.row_values(data.shape[-1]))
    blocks = data.reshape(-1, fmt.block_bytes)
    values = np.empty((len(blocks), fmt.block_values), np.float32)
    decode_columns(name, blocks, values.T)
    return values.reshape(shape)


def decode_columns(name: str, data: U8, out: npt.NDArray[np.floating[Any]]) -> None:
    """Rows uint8 [n, bytes of a row] -> out [values of a row, n], of any type and strides.

    The values are float32 numbers, whatever `out` is. Some times as fast as `decode`.
    """
    fmt = block_format(name)
    n, n_blocks = len(data), fmt.row_values(data.shape[1]) // fmt.block_values
    step = _CHUNK // fmt.block_values
    with np.errstate(invalid="ignore", over="ignore"):  # scales that are NaN or infinite
        for block in range(n_blocks):
            stored = data[:, block * fmt.block_bytes : (block + 1) * fmt.block_bytes]
            values = out[block * fmt.block_values : (block + 1) * fmt.block_values]
            for at in range(0, n, step):
                part = np.ascontiguousarray(stored[at : at + step].T)
                scale, codes, least = fmt.runs(np, part)
                place = values[:, at : at + step].reshape(codes.shape)
                np.multiply(codes, scale[:, None], out=place)
                if least is not None:
                    less = least[:, None]
                    np.subtract(place, less, out=place, dtype=np.float32, casting="same_kind")


def decode_mlx(name: str, data: mx.array) -> mx.array:
    """`decode` on MLX arrays, lazily."""
    fmt = block_format(name)
    shape = (*data.shape[:-1], fmt.row_values(data.shape[-1]))
    scale, codes, least = fmt.runs(mx, data.reshape(-1, fmt.block_bytes).T)
    values = scale[:, None] * codes
    if least is not None:
        values = values - least[:, None]
    return values.reshape(fmt.block_values, -1).T.reshape(shape)


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
