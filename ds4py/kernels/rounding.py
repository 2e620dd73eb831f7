"""The round trips the model was trained with: FP8 on KV rows, Hadamard + FP4 on index rows.

They are discontinuous: one value on a rounding boundary moves logits visibly, so two evaluation
orders agree only where no value sits on a boundary. Source: DeepSeek's inference/kernel.py.
"""

from __future__ import annotations

import mlx.core as mx

FP8_ROW_BLOCK = 64
"""Channels of a KV row that share one scale."""
FP4_ROW_BLOCK = 32
"""Channels of an index row that share one scale."""
FP8_MAX, FP4_MAX = 448.0, 6.0


def _power_of_two_at_least(x: mx.array) -> mx.array:
    """2^ceil(log2(x)) for positive normal float32, exact: from the exponent bits."""
    bits = x.view(mx.uint32)
    exponent = (bits + 0x7FFFFF) >> 23  # a non-zero mantissa carries into the exponent
    return (exponent << 23).view(mx.float32)


def _e4m3(x: mx.array) -> mx.array:
    """Round float32 |x| <= 448 to the nearest E4M3 value, ties to even."""
    bits = mx.abs(x).view(mx.uint32) >> 23
    step = (mx.maximum(bits, 127 - 6) - 3) << 23  # spacing: 2^(e-3), never below 2^-9
    step = step.view(mx.float32)
    return mx.round(x / step) * step


def _e2m1(x: mx.array) -> mx.array:
    """Round float32 |x| <= 6 to the nearest E2M1 value, ties to even."""
    bits = mx.abs(x).view(mx.uint32) >> 23
    step = ((mx.maximum(bits, 127) - 1) << 23).view(mx.float32)  # 0.5 below 2, then 1, 2
    return mx.round(x / step) * step


def fp8_round(x: mx.array, n_channels: int) -> mx.array:
    """Round the first `n_channels` of x [..., D] to E4M3 in blocks of 64 with E8M0 scales.

    The rotated tail stays as it is. Computed in float32, returned in x.dtype.
    """
    head = x[..., :n_channels].astype(mx.float32)
    blocks = head.reshape(*head.shape[:-1], -1, FP8_ROW_BLOCK)
    amax = mx.maximum(mx.max(mx.abs(blocks), axis=-1, keepdims=True), 1e-4)
    scale = _power_of_two_at_least(amax * (1 / FP8_MAX))
    rounded = _e4m3(mx.clip(blocks / scale, -FP8_MAX, FP8_MAX)) * scale
    return mx.concatenate(
        [rounded.reshape(head.shape).astype(x.dtype), x[..., n_channels:]], axis=-1
    )


def fp4_round(x: mx.array) -> mx.array:
    """Hadamard transform, then E2M1 in blocks of 32 with E8M0 scales, over all of [..., d]."""
    d = x.shape[-1]
    turned = mx.hadamard_transform(x.astype(mx.float32), scale=d**-0.5).astype(x.dtype)
    blocks = turned.astype(mx.float32).reshape(*x.shape[:-1], -1, FP4_ROW_BLOCK)
    amax = mx.maximum(mx.max(mx.abs(blocks), axis=-1, keepdims=True), FP4_MAX * 2.0**-126)
    scale = _power_of_two_at_least(amax / FP4_MAX)
    rounded = _e2m1(mx.clip(blocks / scale, -FP4_MAX, FP4_MAX)) * scale
    return rounded.reshape(x.shape).astype(x.dtype)
