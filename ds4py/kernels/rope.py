"""Rotary embedding of the last channels of a row, in interleaved pairs (2i, 2i+1).

Tables are built on the host from Python positions, one per step and row width: the angle is the
float32 product of position and frequency, as in DeepSeek's code, its cosine taken in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.kernels.ops import Array, Ops

F32 = npt.NDArray[np.float32]


def frequencies(config: ModelConfig, compressed: bool) -> F32:
    """Radians per position, [qk_rope_head_dim / 2].

    Sliding layers: rope_theta. Compressed layers, for everything in them: compress_rope_theta
    with YaRN's blend (always on; no attention factor).
    """
    dim = config.qk_rope_head_dim
    base = config.compress_rope_theta if compressed else config.rope_theta
    f = (1.0 / base ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))).astype(
        np.float32
    )
    if not compressed:
        return f
    yarn = config.rope_scaling

    def pair_of(rotations: float) -> float:
        """The pair that turns `rotations` times over the original context."""
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    pairs = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((pairs - low) / max(high - low, 0.001), 0, 1).astype(np.float32)
    return (f / np.float32(yarn.factor) * ramp + f * (1 - ramp)).astype(np.float32)


@dataclass(frozen=True)
class Rotation:
    """cos and signed sin per position and channel, [S, width]; 1 and 0 before the tail."""

    cos: Array
    sin: Array
    swap: Array
    """Index of each channel's partner in its pair, [width]."""


def rotation(ops: Ops, positions: npt.NDArray[np.int64], freqs: F32, width: int) -> Rotation:
    """Tables for rows of `width` channels at `positions` [S] (absolute, 0-based)."""
    angle = (positions.astype(np.float32)[:, None] * freqs[None]).astype(np.float64)
    n_rotated = 2 * len(freqs)
    cos, sin = np.ones((len(positions), width)), np.zeros((len(positions), width))
    cos[:, width - n_rotated :] = np.repeat(np.cos(angle), 2, axis=1)
    sin[:, width - n_rotated :] = np.repeat(np.sin(angle), 2, axis=1)
    sin[:, width - n_rotated :: 2] *= -1  # even channel: a cos - b sin; odd: b cos + a sin
    return Rotation(ops.array(cos), ops.array(sin), ops.array(np.arange(width) ^ 1))


def table(ops: Ops, positions: npt.NDArray[np.int64], freqs: F32) -> Array:
    """(cos, sin) of every pair, as the kernels read them: float32 [S, len(freqs), 2]."""
    angle = (positions.astype(np.float32)[:, None] * freqs[None]).astype(np.float64)
    return ops.array(np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32))


def unfold(ops: Ops, table: Array, width: int) -> Rotation:
    """What a `table` says, for rows of `width` channels."""
    n, pairs = table.shape[:2]
    still = ops.zeros((n, width - 2 * pairs), ops.wide)
    cos, sin = table[..., :1], table[..., 1:]
    tail = ops.concatenate([cos, cos], axis=2).reshape(n, -1)
    signed = ops.concatenate([-sin, sin], axis=2).reshape(n, -1)
    return Rotation(
        ops.concatenate([still + 1, tail], axis=1),
        ops.concatenate([still, signed], axis=1),
        ops.array(np.arange(width) ^ 1),
    )


def rotate(ops: Ops, x: Array, r: Rotation, inverse: bool = False) -> Array:
    """Rotate x [S, width] or [S, heads, width]; computed in float32, returned in x.dtype."""
    cos, sin = (r.cos, r.sin) if x.ndim == 2 else (r.cos[:, None], r.sin[:, None])
    x32 = ops.cast(x, ops.wide)
    turned = x32[..., r.swap] * sin
    return ops.cast(x32 * cos - turned if inverse else x32 * cos + turned, x.dtype)
