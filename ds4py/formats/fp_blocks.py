"""DeepSeek's storage formats: E4M3 with 128x128 scales, packed E2M1 with 32-wide E8M0 scales.

Decoders return float32, exact: every stored value is a float32 number. Source: the OCP MX
specification 1.0 (E8M0, E2M1), the FP8 paper (E4M3), DeepSeek's inference/convert.py (packing).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FP8_BLOCK = 128
"""Side of the square a single FP8 scale covers."""
FP4_BLOCK = 32
"""Values of a row that share one FP4 scale."""

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]


TOP_E8M0 = 252
"""The largest E8M0 scale under which every E2M1 value is a finite float32; 255 is NaN."""
TOPS: dict[str, tuple[int, type[np.unsignedinteger[Any]]]] = {
    "F8_E4M3": (0x7F, np.uint8),
    "F16": (0x7C00, np.uint16),
    "BF16": (0x7F80, np.uint16),
    "F32": (0x7F800000, np.uint32),
}
"""Magnitude bits from which on a number is infinite or NaN, and how its bits are held."""


def _e4m3_table() -> F32:
    byte = np.arange(256)
    sign = np.where(byte & 0x80, -1.0, 1.0)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    normal = (1 + mantissa / 8) * np.exp2(exponent - 7.0)
    value = sign * np.where(exponent == 0, mantissa * 2.0**-9, normal)
    value[(byte & 0x7F) == 0x7F] = np.nan  # e4m3fn has no infinities
    return value.astype(np.float32)


def _e8m0_table() -> F32:
    value = np.exp2(np.arange(256) - 127.0)  # byte 0 is 2^-127, a float32 subnormal
    value[255] = np.nan
    return value.astype(np.float32)


E4M3 = _e4m3_table()
"""float32 value of each E4M3 byte, [256]."""
E8M0 = _e8m0_table()
"""float32 value of each E8M0 byte, [256]."""
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""float32 value of each 4-bit code, [16]."""


def decode_bf16(bits: npt.NDArray[np.uint16]) -> F32:
    """bfloat16 bit patterns -> float32, any shape."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def decode_scale(scale: npt.NDArray[np.generic]) -> F32:
    """E8M0 bytes or float32 scales -> float32. Base checkpoints store float32 scales."""
    return E8M0[scale] if scale.dtype == np.uint8 else scale.astype(np.float32)


def decode_fp8(codes: U8, scale: F32) -> F32:
    """E4M3 [rows, cols] with scale [ceil(rows/128), ceil(cols/128)] -> float32 [rows, cols].

    The scale multiplies, whatever other programs call it.
    """
    rows, cols = codes.shape
    out = E4M3[codes]
    for i in range(scale.shape[0]):  # one band at a time: no second full-size temporary
        band = out[i * FP8_BLOCK : (i + 1) * FP8_BLOCK]
        band *= np.repeat(scale[i], FP8_BLOCK)[None, :cols]
    assert out.shape == (rows, cols)
    return out


def decode_fp4(packed: U8, scale: F32) -> F32:
    """Packed E2M1 [rows, cols/2] (low nibble first) with scale [rows, cols/32] -> [rows, cols]."""
    rows, half = packed.shape
    codes = np.empty((rows, half, 2), np.uint8)
    codes[..., 0], codes[..., 1] = packed & 15, packed >> 4
    values = E2M1[codes].reshape(rows, -1, FP4_BLOCK)
    values *= scale[..., None]
    return values.reshape(rows, 2 * half)


def e8m0(scale: npt.NDArray[np.generic]) -> U8 | None:
    """Scales as E8M0 bytes: as they are, or float32 powers of two; None when some are neither."""
    if scale.dtype == np.uint8:
        return scale.astype(np.uint8, copy=False)
    bits = np.ascontiguousarray(scale, np.float32).view(np.uint32)
    exponents = bits >> 23  # a set sign is beyond a byte
    exact = (bits & 0x7FFFFF == 0) & (exponents > 0) & (exponents < 255)
    return exponents.astype(np.uint8) if exact.all() else None


def are_finite(dtype: str, bits: npt.NDArray[Any]) -> bool:
    """Whether stored numbers of that safetensors dtype are neither NaN nor infinite.

    A scale under which the largest E2M1 value is no float32 counts as infinite.
    """
    if not bits.size:
        return True
    if dtype == "F8_E8M0":
        return int(bits.max()) <= TOP_E8M0
    if dtype in TOPS:
        top, storage = TOPS[dtype]
        magnitude = np.iinfo(storage).max >> 1
        return int((bits.view(storage) & storage(magnitude)).max()) < top
    return True


def fp8_rows(codes: U8, scale: U8) -> U8:
    """E4M3 [rows, cols] with its E8M0 scales -> [rows, cols + ceil(cols/128)].

    Each 128 codes of a row follow their scale, so that a row is read from one end to the other.
    """
    n_rows, n_cols = codes.shape
    rows = np.empty((n_rows, n_cols + -(-n_cols // FP8_BLOCK)), np.uint8)
    for block, first in enumerate(range(0, n_cols, FP8_BLOCK)):
        part = codes[:, first : first + FP8_BLOCK]
        at = first + block
        rows[:, at] = np.repeat(scale[:, block], FP8_BLOCK)[:n_rows]
        rows[:, at + 1 : at + 1 + part.shape[1]] = part
    return rows


def scale_shape(dtype: str, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale tensor for a weight of logical `shape` stored as F8_E4M3 or I8 (FP4)."""
    rows, cols = shape
    if dtype == "I8":
        return rows, -(-cols // FP4_BLOCK)
    return -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)
