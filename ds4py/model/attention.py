"""One layer's attention: low-rank queries, one shared row per token, window and compressed rows.

The row is key and value at once; because it is rotated, the output is rotated back at the query's
position. The attention reads the state's rows plus the rows of its own delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds4py.cache.rows import RowFormat
from ds4py.cache.state import LayerDelta, Series
from ds4py.config import LayerPlan
from ds4py.kernels.ops import Array, LinearMaps
from ds4py.model.fused import Fused
from ds4py.model.plan import StepPlans


@dataclass(frozen=True)
class Compressor:
    """Weights of one series in one layer: a learned pooling of r tokens into one row, which is
    normed, rotated and packed. The projections live with the layer's others."""

    series: Series
    ape: Array
    """Score bias by position in the window, with zeros for the value half: [r, 2*c*d] float32."""
    norm: Array
    """[d] float32."""
    format: RowFormat


@dataclass(frozen=True)
class Attention:
    """Weights and parts of one layer's attention."""

    layer: LayerPlan
    slot: int
    """Index into the state's layers."""
    fused: Fused
    w_in: LinearMaps
    """wq_a | wkv | compressor wkv,wgate | indexer's wkv,wgate | weights_proj, as present."""
    w_q: LinearMaps
    """wq_b | indexer wq_b, as present."""
    wo_a: LinearMaps
    """[o_groups, o_lora_rank, heads*head_dim/o_groups]"""
    wo_b: LinearMaps
    q_norm: Array
    kv_norm: Array
    sink: Array
    compressor: Compressor | None
    indexer: Compressor | None
    """The compressor of the rows by which small heads choose what a query attends to (ratio 4)."""
    n_chosen: int
    """How many those are at most: index_topk."""
    rows: RowFormat

    def __call__(self, x: Array, plans: StepPlans) -> tuple[Any, list[LayerDelta]]:
        """x [S, D], normed, of all sequences -> what `Fused.leave` takes, and what the layer adds
        to each state."""
        return self.fused.attend(self.fused.project(x, self, plans), self, plans)
