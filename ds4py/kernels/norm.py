"""Root-mean-square normalisation over the last axis."""

from __future__ import annotations

from ds4py.kernels.ops import Array, Ops


def rms_norm(ops: Ops, x: Array, weight: Array | None, eps: float) -> Array:
    """x * rsqrt(mean(x^2) + eps) * weight in float32, one cast back to x.dtype; any [..., D]."""
    x32 = ops.cast(x, ops.wide)
    mean = ops.sum(x32 * x32, -1, keepdims=True) / x.shape[-1]
    y = x32 / ops.sqrt(mean + eps)
    return ops.cast(y if weight is None else y * weight, x.dtype)
