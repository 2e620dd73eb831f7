"""Root-mean-square normalisation over the last axis."""

from __future__ import annotations

from ds4py.kernels.ops import Array, Ops


def rms_norm(ops: Ops, x: Array, weight: Array | None, eps: float) -> Array:
    """x * rsqrt(mean(x^2) + eps) * weight in float32, one cast back to x.dtype; any [..., D]."""
    x32 = x.astype(ops.wide)
    y = x32 / ops.sqrt((x32 * x32).mean(-1, keepdims=True) + eps)
    return (y if weight is None else y * weight).astype(x.dtype)
