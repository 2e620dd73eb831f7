"""Rotary positions (deepseek-v4.md 3.3): interleaved pairs of the last channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rope_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last 2 * cos.shape[-1] channels of x [..., d]; cos, sin broadcast."""
    n = 2 * cos.shape[-1]
    a, b = x[..., -n:].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((x[..., :-n], turned), -1)


def rope_tables(c: dict[str, Any], ratio: int, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin [length, rope/2] of a layer (deepseek-v4.md 3.3)."""
    dim = c["qk_rope_head_dim"]
    base = c["compress_rope_theta"] if ratio else c["rope_theta"]
    i = torch.arange(dim // 2, dtype=torch.float32)
    freq = 1.0 / (base ** (2 * i / dim))
    if ratio:
        y = c["rope_scaling"]

        def corr(n: float) -> float:
            original = y["original_max_position_embeddings"]
            return dim * math.log(original / (2 * math.pi * n)) / (2 * math.log(base))

        low, high = math.floor(corr(y["beta_fast"])), math.ceil(corr(y["beta_slow"]))
        ramp = ((i - low) / (high - low)).clamp(0, 1)
        freq = freq / y["factor"] * ramp + freq * (1 - ramp)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()
