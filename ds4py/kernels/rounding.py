"""The round trips the model was trained with: FP8 on KV rows, Hadamard + FP4 on index rows.

They are discontinuous: one value on a rounding boundary moves logits visibly, so two evaluation
orders agree only where no value sits on a boundary. Source: DeepSeek's inference/kernel.py.
"""

from __future__ import annotations

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
    blocks = x.astype(ops.wide).reshape(*x.shape[:-1], -1, block)
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
    turned = ops.hadamard(x.astype(ops.wide)).astype(x.dtype)
    blocks, scale = _blocks(ops, turned, FP4_ROW_BLOCK, FP4_MAX * 2.0**-126, FP4_MAX)
    return (_nearest(ops, blocks, 0, 1) * scale).reshape(x.shape).astype(x.dtype)
