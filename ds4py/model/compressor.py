"""Compressed rows: a learned pooling of r tokens into one row, normed, rotated, rounded."""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.cache.rows import RowFormat
from ds4py.cache.state import Series
from ds4py.kernels import compress
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops
from ds4py.kernels.rope import rotate
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Compressor:
    """One layer's compressor of one series. The projections live with the layer's others."""

    ops: Ops
    series: Series
    ape: Array
    """Score bias by position in the window, with zeros for the value half: [r, 2*c*d] float32."""
    norm: Array
    """[d] float32."""
    eps: float
    format: RowFormat

    def values(self, projected: Array, plan: StepPlan) -> Array:
        """Raw [value | score] [S, 2*c*d] float32 -> the same with APE on the scores."""
        phase = self.ops.array(plan.positions % self.series.ratio)
        return projected + self.ape[phase]

    def rows(self, values: Array, history: Array, plan: StepPlan, dtype: Dtype) -> Array | None:
        """The rows the new tokens complete, packed, [n, width], or None.

        values [S, 2*c*d], history [c*r - 1, 2*c*d]: the tokens just before.
        """
        ops, s, closing = self.ops, self.series, plan.closing[self.series.name]
        if not closing.n_new:
            return None
        first_token = s.ratio * (closing.n_old - s.overlap + 1)  # of the oldest window needed
        begin = first_token - (plan.start - s.history)
        n_tokens = s.ratio * (closing.n_new + s.overlap - 1)
        needed = ops.concatenate([history, values])[begin : begin + n_tokens]
        half = needed.shape[1] // 2
        row = compress.pool(ops, needed[:, :half], needed[:, half:], s.ratio, s.overlap)
        row = rms_norm(ops, row.astype(dtype), self.norm, self.eps)
        assert closing.rotation is not None
        return self.format.pack(rotate(ops, row, closing.rotation))
