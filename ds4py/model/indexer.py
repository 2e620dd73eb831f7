"""The indexer: small heads that choose which compressed rows a query attends to (ratio 4)."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ds4py.kernels import index, rounding
from ds4py.kernels.dense import Dense
from ds4py.kernels.rope import rotate
from ds4py.model.compressor import Compressor
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Indexer:
    """Scores the rows of its own compressor. Its projections live with the layer's others."""

    dense: Dense
    compressor: Compressor
    n_heads: int
    n_selected: int
    layer: int

    def select(
        self, query: mx.array, weights: mx.array, new_rows: mx.array | None, plan: StepPlan
    ) -> tuple[mx.array, mx.array]:
        """query [S, Hi*d] and weights [S, Hi] as projected -> ids, valid [S, index_topk].

        While every visible row fits, no scores are needed.
        """
        closing = plan.closing[self.compressor.series.name]
        if closing.n_old + closing.n_new <= self.n_selected:
            return index.first(closing.visible, self.n_selected)
        width = self.compressor.series.width
        q = rotate(query.reshape(-1, self.n_heads, width), plan.indexer)
        if self.compressor.rounding is not None:  # else Hadamard cancels between query and row
            q = rounding.fp4_round(q)
        weights = weights.astype(mx.float32) * (width * self.n_heads) ** -0.5
        score = self._scores(q, weights, new_rows, plan)
        return index.select(score, closing.visible, self.n_selected)

    def _scores(
        self, q: mx.array, weights: mx.array, new_rows: mx.array | None, plan: StepPlan
    ) -> mx.array:
        """[S, n_old + n_new]: committed rows where they lie, new rows in tiles of their own."""
        name = self.compressor.series.name
        closing, parts = plan.closing[name], []
        if closing.n_old:
            n_tiles = -(-closing.n_old // index.TILE)
            rows = plan.state.committed_rows(name, self.layer)[: n_tiles * index.TILE]
            parts.append(index.scores(self.dense, q, weights, rows)[:, : closing.n_old])
        if new_rows is not None:
            padding = -closing.n_new % index.TILE
            rows = mx.pad(new_rows, ((0, padding), (0, 0)))
            parts.append(index.scores(self.dense, q, weights, rows)[:, : closing.n_new])
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
