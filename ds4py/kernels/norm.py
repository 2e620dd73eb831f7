"""Root-mean-square normalisation over the last axis."""

from __future__ import annotations

import mlx.core as mx


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x * rsqrt(mean(x^2) + eps) * weight in float32, one cast back to x.dtype; any [..., D]."""
    x32 = x.astype(mx.float32)
    y = x32 * mx.rsqrt(mx.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (y if weight is None else y * weight).astype(x.dtype)
