"""The round trips the model was trained with: FP8 on KV rows, Hadamard + FP4 on index rows.

`fp8_round` and `fp4_round` give rounded floats; `fp8_codes` and `fp4_codes` give the same numbers
as the bytes they are stored in, and `fp8_values`, `fp4_values` read those. They are discontinuous:
one value on a rounding boundary moves logits visibly, so two evaluation orders agree only where no
value sits on a boundary. Source: DeepSeek's inference/kernel.py.
"""

from __future__ import annotations

import numpy as np

from ds4py.formats.fp_blocks import E2M1, E4M3, E8M0
from ds4py.kernels.ops import Array, Ops

FP8_ROW_BLOCK = 64
"""Channels of a KV row that share one scale."""
FP4_ROW_BLOCK = 32
"""Channels of an index row that share one scale."""
FP8_MAX, FP4_MAX = 448.0, 6.0


def _power_of_two_at_least(ops: Ops, x: Array) -> Array:
    """2^ceil(log2(x)) for positive normal float32, exact: from the exponent bits."""
    exponent = (ops.float_bits(x) + 0x7FFFFF) >> 23  # a non-zero mantissa carries over
    return ops.bits_float(exponent << 23)


def _nearest(ops: Ops, x: Array, lowest_exponent: int, n_mantissa: int) -> Array:
    """Round float32 to a small float format, ties to even; the range is the caller's to keep."""
    biased = ops.maximum(ops.float_bits(ops.abs(x)) >> 23, 127 + lowest_exponent)
    step = ops.bits_float((biased - n_mantissa) << 23)  # spacing of the format around x
    return ops.round(x / step) * step


def _blocks(ops: Ops, x: Array, block: int, lowest: float, most: float) -> tuple[Array, Array]:
    """x [..., D] as [..., D/block, block] over its power-of-two scales, clipped, and the scales."""
    blocks = ops.cast(x, ops.wide).reshape(*x.shape[:-1], -1, block)
    amax = ops.maximum(ops.abs(blocks).max(-1, keepdims=True), lowest)
    scale = _power_of_two_at_least(ops, amax / most)
    return ops.minimum(ops.maximum(blocks / scale, -most), most), scale


def fp8_round(ops: Ops, x: Array, n_channels: int) -> Array:
    """Round the first `n_channels` of x [..., D] to E4M3 in blocks of 64 with E8M0 scales.

    The rotated tail stays as it is. Computed in float32, returned in x.dtype.
    """
    head = x[..., :n_channels]
    blocks, scale = _blocks(ops, head, FP8_ROW_BLOCK, 1e-4, FP8_MAX)
    rounded = _nearest(ops, blocks, -6, 3) * scale
    rounded = rounded.reshape(head.shape).astype(x.dtype)
    return ops.concatenate([rounded, x[..., n_channels:]], axis=-1)


def fp4_round(ops: Ops, x: Array) -> Array:
    """Hadamard transform, then E2M1 in blocks of 32 with E8M0 scales, over all of [..., d]."""
    turned = ops.cast(ops.hadamard(ops.cast(x, ops.wide)), x.dtype)
    blocks, scale = _blocks(ops, turned, FP4_ROW_BLOCK, FP4_MAX * 2.0**-126, FP4_MAX)
    return (_nearest(ops, blocks, 0, 1) * scale).reshape(x.shape).astype(x.dtype)


def fp8_codes(ops: Ops, x: Array) -> tuple[Array, Array]:
    """`fp8_round` as bytes: x [..., D] -> E4M3 codes [..., D], E8M0 scales [..., D/64]."""
    blocks, scale = _blocks(ops, x, FP8_ROW_BLOCK, 1e-4, FP8_MAX)
    codes = _codes(ops, blocks, -6, 3).astype(ops.uint8)
    return codes.reshape(x.shape), _scale_byte(ops, scale)


def fp4_codes(ops: Ops, x: Array) -> tuple[Array, Array]:
    """`fp4_round` as bytes: x [..., d] -> E2M1 pairs [..., d/2], low nibble first, E8M0 scales."""
    turned = ops.cast(ops.hadamard(ops.cast(x, ops.wide)), x.dtype)
    blocks, scale = _blocks(ops, turned, FP4_ROW_BLOCK, FP4_MAX * 2.0**-126, FP4_MAX)
    codes = _codes(ops, blocks, 0, 1).reshape(*x.shape[:-1], -1, 2)
    packed = codes[..., 0] | (codes[..., 1] << 4)
    return packed.astype(ops.uint8), _scale_byte(ops, scale)


def fp8_values(ops: Ops, codes: Array, scales: Array) -> Array:
    """E4M3 codes [..., D] with E8M0 scales [..., D/64] -> float32 [..., D]."""
    values = ops.array(E4M3)[codes].reshape(*scales.shape, FP8_ROW_BLOCK)
    return (values * ops.array(E8M0)[scales][..., None]).reshape(codes.shape)


def fp4_values(ops: Ops, packed: Array, scales: Array) -> Array:
    """Packed E2M1 [..., d/2] with E8M0 scales [..., d/32] -> float32 [..., d]."""
    pairs = ops.array(_E2M1_PAIRS)[packed].view(ops.float32)  # one look-up for two channels
    values = pairs.reshape(*scales.shape, FP4_ROW_BLOCK) * ops.array(E8M0)[scales][..., None]
    return values.reshape(*packed.shape[:-1], -1)


_PAIR = np.arange(256)
_E2M1_PAIRS = np.stack([E2M1[_PAIR & 15], E2M1[_PAIR >> 4]], axis=1).view(np.uint64)[:, 0]
"""The two float32 values of each byte, low nibble first, as one word: [256]."""


def _codes(ops: Ops, x: Array, lowest_exponent: int, n_mantissa: int) -> Array:
    """Round to a small float format, ties to even -> sign | exponent | mantissa, uint32."""
    bits, size = ops.float_bits(x), ops.abs(x)
    drop = 23 - n_mantissa
    exponent_bits = {3: 4, 1: 2}[n_mantissa]
    rebias = (127 + lowest_exponent - 1) << n_mantissa
    normal = ops.float_bits(size)
    normal = ((normal + ((1 << (drop - 1)) - 1) + ((normal >> drop) & 1)) >> drop) - rebias
    # Below the lowest exponent the spacing is fixed: adding 2^k rounds to it in the low bits.
    anchor = 2.0 ** (lowest_exponent + drop)
    subnormal = ops.float_bits(size + anchor) - ((127 + lowest_exponent + drop) << 23)
    code = ops.where(size < 2.0**lowest_exponent, subnormal, normal)
    return code | ((bits >> 31) << (exponent_bits + n_mantissa))


def _scale_byte(ops: Ops, scale: Array) -> Array:
    return (ops.float_bits(scale) >> 23).astype(ops.uint8)[..., 0]
