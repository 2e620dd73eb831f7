"""Compressed rows: a learned pooling of r tokens into one row, normed, rotated, rounded."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4py.cache.state import Series
from ds4py.kernels import compress, rounding
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.rope import rotate
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Compressor:
    """One layer's compressor of one series. The projections live with the layer's others."""

    series: Series
    ape: mx.array
    """Score bias by position in the window, with zeros for the value half: [r, 2*c*d] float32."""
    norm: mx.array
    """[d] float32."""
    eps: float
    rounding: str | None
    """None, "fp8" (attention rows) or "fp4" (index rows)."""
    n_rounded: int
    """Channels before the rotated tail, for FP8."""

    def values(self, projected: mx.array, plan: StepPlan) -> mx.array:
        """Raw [value | score] [S, 2*c*d] float32 -> the same with APE on the scores."""
        phase = mx.array(plan.positions % self.series.ratio)
        return projected + self.ape[phase]

    def rows(
        self, values: mx.array, history: mx.array, plan: StepPlan, dtype: mx.Dtype
    ) -> mx.array | None:
        """The rows the new tokens complete, [n, d], or None.

        values [S, 2*c*d], history [c*r - 1, 2*c*d]: the tokens just before.
        """
        s, closing = self.series, plan.closing[self.series.name]
        if not closing.n_new:
            return None
        first_token = s.ratio * (closing.n_old - s.overlap + 1)  # of the oldest window needed
        begin = first_token - (plan.start - s.history)
        n_tokens = s.ratio * (closing.n_new + s.overlap - 1)
        needed = mx.concatenate([history, values])[begin : begin + n_tokens]
        half = needed.shape[1] // 2
        row = compress.pool(needed[:, :half], needed[:, half:], s.ratio, s.overlap).astype(dtype)
        row = rms_norm(row, self.norm, self.eps)
        assert closing.rotation is not None
        row = rotate(row, closing.rotation)
        if self.rounding == "fp8":
            return rounding.fp8_round(row, self.n_rounded)
        return rounding.fp4_round(row) if self.rounding == "fp4" else row


def padded_ape(ape: np.ndarray) -> mx.array:
    """The checkpoint's ape [r, c*d] -> [r, 2*c*d] with zeros for the values."""
    return mx.array(np.concatenate([np.zeros_like(ape), ape], axis=1))
