"""One layer's attention: low-rank queries, one shared row per token, window and compressed rows.

The row is key and value at once; because it is rotated, the output is rotated back at the query's
position. The attention reads the state's rows plus the rows of its own delta.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.cache.rows import RowFormat
from ds4py.cache.state import LayerDelta
from ds4py.config import LayerPlan, ModelConfig
from ds4py.kernels import attend
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops, Weight
from ds4py.kernels.rope import rotate
from ds4py.model.compressor import Compressor
from ds4py.model.indexer import Indexer
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Attention:
    """Weights and parts of one layer's attention."""

    config: ModelConfig
    layer: LayerPlan
    slot: int
    """Index into the state's layers."""
    ops: Ops
    w_in: Weight
    """wq_a | wkv | compressor wkv,wgate | indexer's wkv,wgate | weights_proj, as present."""
    w_q: Weight
    """wq_b | indexer wq_b, as present."""
    wo_a: Weight
    """[o_groups, o_lora_rank, heads*head_dim/o_groups]"""
    wo_b: Weight
    q_norm: Array
    kv_norm: Array
    sink: Array
    compressor: Compressor | None
    indexer: Indexer | None
    rows: RowFormat

    def __call__(self, x: Array, plan: StepPlan) -> tuple[Array, LayerDelta]:
        """x [S, D], normed -> wo_b's input [S, G*o_lora] and what the layer adds to the state."""
        c, ops, eps = self.config, self.ops, self.config.rms_norm_eps
        turn = plan.compressed if self.layer.compressed else plan.sliding
        latent, row, *compressor_inputs = ops.project(x, self.w_in)
        latent = rms_norm(ops, latent, self.q_norm, eps)  # [S, q_lora_rank]
        query, *index_query = ops.project(latent, self.w_q)
        q = query.reshape(-1, c.num_attention_heads, c.head_dim)
        q = rotate(ops, rms_norm(ops, q, None, eps), turn)  # [S, heads, head_dim]
        row = rotate(ops, rms_norm(ops, row, self.kv_norm, eps), turn)  # [S, head_dim]
        delta = LayerDelta(window=self.rows.pack(row))
        blocks = [self._window_block(self.rows.unpack(delta.window), plan)]
        if self.compressor is not None:
            self._compress(self.compressor, compressor_inputs[0], delta, plan, x.dtype)
            blocks += self._compressed_block(compressor_inputs, index_query, delta, plan, x.dtype)
        o = attend.attend(ops, q, blocks, self.sink)
        o = rotate(ops, o, turn, inverse=True).reshape(x.shape[0], c.o_groups, -1)
        return ops.grouped(o, self.wo_a).reshape(x.shape[0], -1), delta

    def _window_block(self, row: Array, plan: StepPlan) -> tuple[Array, Array]:
        """Each query's own W rows as an overlapping view: [S, 1, W, head_dim], valid [S, 1, W]."""
        recent = self.ops.concatenate([plan.state.window(self.slot), row])  # [W-1+S, head_dim]
        width = self.config.sliding_window
        return self.ops.windows(recent, plan.n_tokens, width), plan.window_valid

    def _compress(
        self,
        compressor: Compressor,
        projected: Array,
        delta: LayerDelta,
        plan: StepPlan,
        dtype: Dtype,
    ) -> None:
        """Run one compressor over the new tokens; its values and rows go into the delta."""
        name = compressor.series.name
        values = compressor.values(projected, plan)
        delta.values[name] = values
        rows = compressor.rows(values, plan.state.values(name, self.slot), plan, dtype)
        if rows is not None:
            delta.rows[name] = rows

    def _compressed_block(
        self,
        inputs: list[Array],
        index_query: list[Array],
        delta: LayerDelta,
        plan: StepPlan,
        dtype: Dtype,
    ) -> list[tuple[Array, Array]]:
        """The compressed rows the queries see; none while no row is complete."""
        assert self.compressor is not None
        name = self.compressor.series.name
        closing, new = plan.closing[name], delta.rows.get(name)
        if self.indexer is not None:
            self._compress(self.indexer.compressor, inputs[1], delta, plan, dtype)
        if closing.n_old + closing.n_new == 0:
            return []
        committed = plan.state.committed_rows(name, self.slot)
        if self.indexer is None:
            rows, valid = _all_rows(self.ops, committed, new, closing.n_old, closing.visible)
            return [(self.rows.unpack(rows), valid)]
        new_index_rows = delta.rows.get(self.indexer.compressor.series.name)
        ids, valid = self.indexer.select(index_query[0], inputs[2], new_index_rows, plan)
        rows = self._gather(committed, new, closing.n_old, ids)  # [S, k, head_dim]
        shape = (rows.shape[0], -1, self.indexer.tile)
        return [(rows.reshape(*shape, rows.shape[2]), valid.reshape(*shape))]

    def _gather(self, committed: Array, new: Array | None, n_old: int, ids: Array) -> Array:
        """Rows by number from the committed ones and the step's own: ids [S, k] -> [S, k, hd]."""
        stored = committed[:n_old]
        if new is not None:
            stored = self.ops.concatenate([stored, new])
        if ids.shape[0] * ids.shape[1] < stored.shape[0]:
            return self.rows.unpack(stored[ids])
        return self.rows.unpack(stored)[ids]  # many queries share rows: unpack each of them once


def _all_rows(
    ops: Ops, committed: Array, new: Array | None, n_old: int, visible: Array
) -> tuple[Array, Array]:
    """Every row, tiled by its absolute number: [1, n, ROW_TILE, hd], valid [S, n, ROW_TILE]."""
    if new is not None:
        committed = ops.concatenate([committed[:n_old], new])
        n_rows = committed.shape[0]
        committed = ops.append_zeros(committed, -n_rows % attend.ROW_TILE)
    else:
        n_rows = n_old
    n_tiles = -(-n_rows // attend.ROW_TILE)
    rows = committed[: n_tiles * attend.ROW_TILE].reshape(1, n_tiles, attend.ROW_TILE, -1)
    valid = ops.arange(n_tiles * attend.ROW_TILE)[None] < visible
    return rows, valid.reshape(-1, n_tiles, attend.ROW_TILE)
