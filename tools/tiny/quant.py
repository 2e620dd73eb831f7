"""Rounding to the checkpoint's storage formats and to the cache formats (deepseek-v4.md 2.3, 3.7).

Every function returns float32 values that the format can hold exactly; `ste` lets gradients pass
as if nothing had been rounded. Exponents are taken from the float's bits, so powers of two are
exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXPONENT = 0x7F800000


def floor_pow2(x: Tensor) -> Tensor:
    """2^floor(log2 x) for positive normal x."""
    return (x.view(torch.int32) & _EXPONENT).view(torch.float32)


def ceil_pow2(x: Tensor) -> Tensor:
    """2^ceil(log2 x) for positive normal x."""
    low = floor_pow2(x)
    return torch.where(x > low, low * 2, low)


def e4m3(x: Tensor) -> Tensor:
    """Round to float8 e4m3 (ties to even), |x| <= 448."""
    step = floor_pow2(x.abs().clamp(2.0**-6, 448.0)) * 0.125
    return (x / step).round() * step


def e2m1(x: Tensor) -> Tensor:
    """Round to FP4 (0, .5, 1, 1.5, 2, 3, 4, 6), ties to even code, |x| <= 6."""
    step = floor_pow2(x.abs().clamp(1.0, 6.0)) * 0.5
    return (x / step).round() * step


def ste(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def fp8sim(x: Tensor, block: int = 64) -> Tensor:
    """The round trip of key/value rows: blocks of the last axis, power-of-two scales."""
    b = x.unflatten(-1, (-1, block))
    scale = ceil_pow2(b.abs().amax(-1, keepdim=True).clamp_min(1e-4) * (1 / 448))
    return (e4m3((b / scale).clamp(-448, 448)) * scale).flatten(-2)


def fp4sim(x: Tensor, block: int = 32) -> Tensor:
    """The round trip of index rows and queries."""
    b = x.unflatten(-1, (-1, block))
    scale = ceil_pow2(b.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-100) / 6)
    return (e2m1((b / scale).clamp(-6, 6)) * scale).flatten(-2)


def fp8_scale(w: Tensor) -> Tensor:
    """Scales [out/128, in/128] of an FP8 weight [out, in] (sides may be short of 128)."""
    blocks = _pad128(w).unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    return ceil_pow2(blocks.abs().amax((1, 3)).clamp_min(1e-20) / 448)


def fp8_weight(w: Tensor) -> Tensor:
    """An FP8 weight as it will be read back."""
    scale = spread(fp8_scale(w), w)
    return e4m3(w / scale) * scale


def spread(scale: Tensor, w: Tensor) -> Tensor:
    """Block scales repeated to the shape of `w`."""
    full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return full[: w.shape[0], : w.shape[1]]


def _pad128(w: Tensor) -> Tensor:
    rows, columns = -w.shape[0] % 128, -w.shape[1] % 128
    return torch.nn.functional.pad(w, (0, columns, 0, rows)) if rows or columns else w


def fp4_scale(w: Tensor) -> Tensor:
    """Scales [..., in/32, 1] of an FP4 weight [..., in].

    Of the two powers of two around amax/6 the one with the smaller squared error.
    """
    b = w.unflatten(-1, (-1, 32))
    high = ceil_pow2(b.abs().amax(-1, keepdim=True).clamp_min(1e-20) / 6)
    low = high * 0.5
    worse = _fp4_error(b, low) > _fp4_error(b, high)
    return torch.where(worse, high, low)


def _fp4_error(b: Tensor, scale: Tensor) -> Tensor:
    rounded = e2m1((b / scale).clamp(-6, 6)) * scale
    return ((rounded - b) ** 2).sum(-1, keepdim=True)


def fp4_weight(w: Tensor) -> Tensor:
    """An FP4 weight as it will be read back."""
    b = w.unflatten(-1, (-1, 32))
    scale = fp4_scale(w)
    return (e2m1((b / scale).clamp(-6, 6)) * scale).flatten(-2)
