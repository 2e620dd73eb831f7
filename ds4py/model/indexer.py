"""The indexer: small heads that choose which compressed rows a query attends to (ratio 4)."""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.kernels import index, rounding
from ds4py.kernels.attend import ROW_TILE
from ds4py.kernels.ops import Array, Ops
from ds4py.kernels.rope import rotate
from ds4py.model.compressor import Compressor
from ds4py.model.plan import StepPlan


@dataclass(frozen=True)
class Indexer:
    """Scores the rows of its own compressor. Its projections live with the layer's others."""

    ops: Ops
    compressor: Compressor
    n_heads: int
    n_selected: int
    layer: int

    @property
    def tile(self) -> int:
        """Selected rows are attended in blocks of this many, a divisor of index_topk."""
        return ROW_TILE if self.n_selected % ROW_TILE == 0 else self.n_selected

    def select(
        self, query: Array, weights: Array, new_rows: Array | None, plan: StepPlan
    ) -> tuple[Array, Array]:
        """query [S, Hi*d] and weights [S, Hi] as projected -> ids, valid [S, k].

        k is index_topk, or as many whole tiles as there are rows: then every visible row fits and
        no scores are needed.
        """
        closing = plan.closing[self.compressor.series.name]
        n_rows = closing.n_old + closing.n_new
        if n_rows <= self.n_selected:
            n_tiles = -(-n_rows // self.tile)
            return index.first(self.ops, closing.visible, n_tiles * self.tile)
        width = self.compressor.series.width
        q = rotate(self.ops, query.reshape(-1, self.n_heads, width), plan.indexer)
        if self.compressor.format.rounded:  # else Hadamard cancels between query and row
            q = rounding.fp4_round(self.ops, q)
        weights = weights.astype(self.ops.wide) * (width * self.n_heads) ** -0.5
        score = self._scores(q, weights, new_rows, plan)
        return index.select(self.ops, score, closing.visible, self.n_selected)

    def _scores(self, q: Array, weights: Array, new_rows: Array | None, plan: StepPlan) -> Array:
        """[S, n_old + n_new]: committed rows where they lie, new rows in tiles of their own."""
        name = self.compressor.series.name
        closing, unpack, parts = plan.closing[name], self.compressor.format.unpack, []
        if closing.n_old:
            n_tiles = -(-closing.n_old // index.TILE)
            rows = plan.state.committed_rows(name, self.layer)[: n_tiles * index.TILE]
            parts.append(index.scores(self.ops, q, weights, unpack(rows))[:, : closing.n_old])
        if new_rows is not None:
            rows = self.ops.append_zeros(new_rows, -closing.n_new % index.TILE)
            parts.append(index.scores(self.ops, q, weights, unpack(rows))[:, : closing.n_new])
        return parts[0] if len(parts) == 1 else self.ops.concatenate(parts, axis=1)
