"""Hyper-connections around a sublayer, and the head's collapse of the streams."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.config import ModelConfig
from ds4py.kernels import hyper
from ds4py.kernels.dense import Dense, Weight


def project_streams(dense: Dense, streams: mx.array, fn: Weight, eps: float) -> mx.array:
    """Flattened streams through fn, over their root mean square: [S, H, D] -> float32 [S, out]."""
    flat = streams.reshape(streams.shape[0], -1).astype(mx.float32)
    scale = mx.rsqrt(mx.mean(flat * flat, axis=-1, keepdims=True) + eps)
    return dense.project(flat, fn)[0] * scale


@dataclass(frozen=True)
class HyperConnection:
    """hc_attn_* or hc_ffn_* of one layer."""

    config: ModelConfig
    dense: Dense
    fn: Weight
    base: mx.array
    scale: mx.array

    def mix(self, streams: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """streams [S, H, D] -> the sublayer's input [S, D], post [S, H], comb [S, H, H]."""
        c = self.config
        m = project_streams(self.dense, streams, self.fn, c.rms_norm_eps)
        pre, post, comb = hyper.split_mix(
            m, self.scale, self.base, c.hc_mult, c.hc_sinkhorn_iters, c.hc_eps
        )
        return hyper.collapse(streams, pre), post, comb


@dataclass(frozen=True)
class HyperHead:
    """hc_head_*: the collapse before the output norm. No Sinkhorn here."""

    config: ModelConfig
    dense: Dense
    fn: Weight
    base: mx.array
    scale: mx.array

    def __call__(self, streams: mx.array) -> mx.array:
        """[S, H, D] -> [S, D]."""
        m = project_streams(self.dense, streams, self.fn, self.config.rms_norm_eps)
        pre = mx.sigmoid(m * self.scale + self.base) + self.config.hc_eps
        return hyper.collapse(streams, pre)
