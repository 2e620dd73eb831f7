"""Bytes that a decoded token must read, by class: each weight once, each row once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ds4py.cache.state import SequenceState
from ds4py.kernels.formats import PackedMatrix
from ds4py.kernels.ops import PackedWeight
from ds4py.model.attention import Attention
from ds4py.model.moe import ResidentExperts
from ds4py.model.transformer import Transformer


def bytes_per_token(
    model: Transformer, experts: ResidentExperts, state: SequenceState
) -> dict[str, int]:
    """What the step after `state` must read; a model of packed weights."""
    n: Counter[str] = Counter()
    for block in model.blocks:
        attn, ffn = block.attn, block.ffn
        own, more = attn.w_in[:2], attn.w_in[2:]
        n["attention"] += _bytes((*own, attn.w_q[0], *attn.wo_a, *attn.wo_b))
        n["compressors, indexers"] += _bytes((*more, *attn.w_q[1:]))
        for name, size in _rows(attn, state).items():
            n[name] += size
        n["router"] += _bytes(ffn.w_in[:1])
        n["shared expert"] += _bytes((*ffn.w_in[1:], *ffn.shared_w2))
        n["routed experts"] += model.config.num_experts_per_tok * sum(
            where.stop - where.start
            for weight in experts.weights[ffn.index]
            if isinstance(weight, PackedWeight)
            for where, _ in weight.parts
        )
    readers = [reader for block in model.blocks for reader in (block.hc_attn, block.hc_ffn)]
    n["hyper-connections"] = sum(r.fn.arrays[0].nbytes for r in (*readers, model.hc_head))
    n["head"] = _bytes(model.head)
    n["frontier"] = _frontier(state)
    return dict(n)


def _bytes(matrices: Sequence[PackedMatrix]) -> int:
    return sum(matrix.rows.nbytes for matrix in matrices)


def _frontier(state: SequenceState) -> int:
    """What a commit writes anew: windows, and compressors' values that later rows need. Where the
    token completes rows, all values before it are pooled, too."""
    frontier, end = state.frontier, state.position + 1
    n_bytes = frontier.window.nbytes
    for s in state.series:
        completes = s.count(end) > s.count(state.position)
        n_values = max(s.needed(end) - 1, 0) + (s.history if completes else 0)
        n_bytes += frontier.values[s.name].nbytes // s.history * n_values
    return int(n_bytes)


def _rows(attn: Attention, state: SequenceState) -> dict[str, int]:
    """Rows of one layer that its query attends to, and those its indexer scores."""
    width = state.frontier.window.shape[2]
    n_window = min(state.position, state.frontier.window.shape[1])
    if attn.compressor is None:
        return {"rows attended": n_window * width}
    n_pooled = attn.compressor.series.count(state.position)
    if attn.indexer is None or n_pooled <= attn.n_chosen:
        return {"rows attended": (n_window + n_pooled) * width}
    scored = n_pooled * state.rows[attn.indexer.series.name].row_bytes
    return {"rows attended": (n_window + attn.n_chosen) * width, "rows scored": scored}
