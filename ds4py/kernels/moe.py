"""The experts' feed-forward: clamped SwiGLU, routed experts summed in ascending expert id.

`gate_up` and `down` are the two launches of a step of decoding, `group`, `matmul_gate_up` and
`matmul_down` those of a prompt; `routed` is the same over arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ds4py.kernels import dense, matvec
from ds4py.kernels.build import Launcher, Template
from ds4py.kernels.dense import Residual
from ds4py.kernels.formats import CODES, ExpertRecords, PackedMatrix, row_bytes
from ds4py.kernels.matvec import Tiling
from ds4py.kernels.ops import Array, Dtype, Ops, PackedWeight, Weight

GROUP_ROWS, GROUP_THREADS = 32, 256
"""Positions of one expert in a tile of a matrix product; threads that sort."""
Observer = Callable[[Array, Array, Array], None]
"""Sees expert ids [R], their inputs [R, D] and the inputs of their down maps [R, I]."""


def swiglu(ops: Ops, gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, limit)) * clip(up, +-limit), in float32."""
    gate = ops.minimum(ops.cast(gate, ops.wide), limit)
    up = ops.minimum(ops.maximum(ops.cast(up, ops.wide), -limit), limit)
    return gate * ops.sigmoid(gate) * up


@dataclass(frozen=True)
class Pairs:
    """The S*k (token, expert) pairs of a step, sorted by expert, so that each expert's weights
    are read once; an expert's pairs keep the order of their tokens."""

    n_chosen: int
    order: Array
    """[S*k]: where a sorted pair stood, counting each token's experts in ascending id."""
    experts: Array
    """[S*k] ids, ascending."""
    slots: Array
    """[S*k]: where the expert's weights lie."""
    weights: Array
    """[S*k]"""


def pairs(ops: Ops, ids: Array, weight: Array, slots: Array | None = None) -> Pairs:
    """ids, weight and slots [S, k]; without slots an expert's weights lie at its id."""
    by_id = ops.argsort(ids, axis=1)
    flat = ops.take_along_axis(ids, by_id, axis=1).reshape(-1)
    order = ops.argsort(flat, axis=0)
    experts = flat[order]
    if slots is not None:
        slots = ops.take_along_axis(slots, by_id, axis=1).reshape(-1)[order]
    pair_weight = ops.take_along_axis(weight, by_id, axis=1).reshape(-1)[order]
    return Pairs(ids.shape[1], order, experts, experts if slots is None else slots, pair_weight)


def through(
    ops: Ops,
    x: Array,
    pairs: Pairs,
    w13: Weight | PackedWeight,
    w2: Weight | PackedWeight,
    limit: float,
    observe: Observer | None = None,
) -> Array:
    """x [S, D] through the experts of some or all pairs -> their weighted results [R, D]."""
    x_of = x[pairs.order // pairs.n_chosen]
    gate_up = ops.experts(x_of, pairs.slots, w13)  # [R, 2I]
    n_inner = gate_up.shape[1] // 2
    h = swiglu(ops, gate_up[:, :n_inner], gate_up[:, n_inner:], limit) * pairs.weights[:, None]
    if observe is not None:
        observe(pairs.experts, x_of, h)
    return ops.cast(ops.experts(ops.cast(h, x.dtype), pairs.slots, w2), ops.wide)


def combine(ops: Ops, y: Array, pairs: Pairs) -> Array:
    """The sorted pairs' results [S*k, D] -> each token's sum in ascending expert id [S, D]."""
    y = y[ops.argsort(pairs.order, axis=0)]
    return ops.sum(y.reshape(-1, pairs.n_chosen, y.shape[1]), 1)


def routed(
    ops: Ops,
    x: Array,
    ids: Array,
    weight: Array,
    w13: Weight | PackedWeight,
    w2: Weight | PackedWeight,
    limit: float,
    observe: Observer | None = None,
    slots: Array | None = None,
) -> Array:
    """x [S, D], ids and weight [S, k]; w13 [n, 2I, D], w2 [n, D, I] -> float32 [S, D].

    slots [S, k] says which of the n maps is the chosen expert's; by default map e is expert e's.
    """
    chosen = pairs(ops, ids, weight, slots)
    return combine(ops, through(ops, x, chosen, w13, w2, limit, observe), chosen)


def gate_up(
    launcher: Launcher,
    x: Array,
    experts: ExpertRecords,
    slots: Array,
    weights: Array,
    shared: tuple[PackedMatrix, PackedMatrix],
    limit: float,
) -> Array:
    """x [S, D] through gate and up maps of the chosen experts and the shared one.

    S <= 8; slots int32 [S, k], distinct in a row; weights float32 [S, k]; shared: its gate and up.
    -> [S, k + 1, I] in x's dtype: weight * SwiGLU of each choice, the shared expert's last.
    """
    (s, n_in), k, n_inner = x.shape, slots.shape[1], experts.n_inner
    assert s <= matvec.MAX_ROWS and experts.n_in == n_in
    assert all(m.n_in == n_in and m.rows.shape[0] == n_inner for m in shared)
    assert shared[0].format == shared[1].format
    # Threadgroups of the shared expert get fewer rows where those are longer, so that they have not
    # much more to read than the others, nor much less to multiply.
    longer = shared[0].rows.shape[1] // row_bytes(experts.formats[0], n_in)
    times = matvec.power_of_two(round(longer**0.5))
    n_rows = (min(s * k, 7) + times) * n_inner
    plan = matvec.tiling(s, n_in, x.dtype, n_rows, floats=2 * s, power=True)
    shared_rows = max(plan.rows // times, matvec.least_rows(s))
    shared_tiles = -(-n_inner // (shared_rows * plan.simdgroups))
    template = [
        *(("T", x.dtype), ("S", s), ("KTOP", k), ("D", n_in), ("I", n_inner)),
        *(("GATE", experts.starts[0]), ("UP", experts.starts[1]), ("SHARED_ROWS", shared_rows)),
        *_expert_template(experts, 0, shared[0], plan, (s, n_in), x.dtype),
    ]
    (h,) = launcher.launch(
        "moe_gate_up",
        [x, experts.records, slots, weights, *(m.rows for m in shared), dense.scalar(limit)],
        template,
        ((shared_tiles + s * k * plan.tiles(n_inner)) * plan.threads, 1, 1),
        (plan.threads, 1, 1),
        [((s, k + 1, n_inner), x.dtype)],
    )
    return h


def _expert_template(
    experts: ExpertRecords,
    which: int,
    shared: PackedMatrix,
    plan: Tiling,
    shape: tuple[int, int],
    dtype: Dtype,
) -> Template:
    """What both launches are compiled for; shape: rows and inputs."""
    return (
        *(("FE", CODES[experts.formats[which]]), ("FS", shared.code)),
        *(("SLOTS", experts.records.shape[0]), ("RECORD", experts.records.shape[1])),
        *(("KC", plan.staged(*shape, dtype)), ("K1", plan.staged(1, shape[1], dtype))),
        *plan.template,
    )


def down(
    launcher: Launcher,
    h: Array,
    experts: ExpertRecords,
    slots: Array,
    shared: PackedMatrix,
    residual: Residual,
) -> tuple[Array, Array]:
    """h [S, k + 1, I] of `gate_up` through the down maps, summed in that order, into the streams.

    -> what `dense.expand` returns. S <= 8; a row's result does not depend on S.
    """
    s, places, n_inner = h.shape
    n_streams, d = residual.streams.shape[1:]
    assert s <= matvec.MAX_ROWS and slots.shape == (s, places - 1)
    assert h.dtype == residual.streams.dtype
    assert experts.n_inner == n_inner == shared.n_in and shared.rows.shape[0] == d == experts.n_in
    floats = s * (1 + max(places, n_streams))
    plan = matvec.tiling(s, n_inner, h.dtype, d, floats, rows=dense.expand_rows(s))
    template = [
        *(("T", h.dtype), ("S", s), ("KTOP", places - 1), ("I", n_inner)),
        *(("DOWN", experts.starts[2]), *residual.template),
        *_expert_template(experts, 1, shared, plan, (s, n_inner), h.dtype),
    ]
    streams, partials = launcher.launch(
        "moe_down",
        [
            *(h, experts.records, slots, shared.rows),
            *(residual.streams, residual.gates, residual.fn),
        ],
        template,
        (plan.tiles(d) * plan.threads, 1, 1),
        (plan.threads, 1, 1),
        residual.outputs,
    )
    return streams, partials


@dataclass(frozen=True)
class Grouping:
    """A prompt's (position, choice) pairs sorted by expert, cut into tiles for `matmul_*`."""

    ids: Array
    """int32 [S, k]"""
    n_experts: int
    order: Array
    """int32 [S*k]: the numbers of the pairs, sorted by expert, each expert's in their own order; -1
    behind them for those left out."""
    tiles: Array
    """int32 [most tiles, 3]: expert, first place in `order`, number of pairs; 0 pairs: unused."""
    shared: bool = True
    """Whether the shared expert is computed, too."""

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles there may be, the shared expert's with them, and positions."""
        s = self.ids.shape[0]
        return self.tiles.shape[0] + (-(-s // GROUP_ROWS) if self.shared else 0), s


def group(launcher: Launcher, ids: Array, n_experts: int, shared: bool = True) -> Grouping:
    """ids int32 [S, k], each below n_experts. The device does it: the host never sees the ids.

    Pairs with a negative id are left out: what the products write for them is not defined.
    """
    s, k = ids.shape
    most = -(-s * k // GROUP_ROWS) + n_experts
    threads = min(GROUP_THREADS, -(-n_experts // 32) * 32)
    order, tiles = launcher.launch(
        "moe_group",
        [ids, dense.count(s)],
        [("KTOP", k), ("E", n_experts), ("BM", GROUP_ROWS), ("THREADS", threads)],
        (threads, 1, 1),
        (threads, 1, 1),
        [((s * k,), mx.int32), ((most, 3), mx.int32)],
    )
    return Grouping(ids, n_experts, order, tiles, shared)


def group_ref(ids: Array, n_experts: int) -> tuple[Array, Array]:
    """`order` and `tiles` of `group`, on the host."""
    flat = np.array(ids).reshape(-1)
    order = np.argsort(flat, kind="stable").astype(np.int32)
    order = order[flat[order] >= 0]
    counts, tiles, first = np.bincount(flat[order], minlength=n_experts), [], 0
    for expert, n in enumerate(counts.tolist()):
        tiles += [(expert, first + i, min(GROUP_ROWS, n - i)) for i in range(0, n, GROUP_ROWS)]
        first += n
    most = -(-len(flat) // GROUP_ROWS) + n_experts
    order = np.pad(order, (0, len(flat) - len(order)), constant_values=-1)
    return order, np.array(tiles + [(0, 0, 0)] * (most - len(tiles)), np.int32)


def matmul_gate_up(
    launcher: Launcher,
    x: Array,
    experts: ExpertRecords,
    grouping: Grouping,
    slots: Array,
    weights: Array,
    shared: tuple[PackedMatrix, PackedMatrix],
    limit: float,
) -> Array:
    """`gate_up` for any S, an expert's positions together; slots [S, k] belong to the ids.

    Sums are taken in another order than `gate_up`'s; they too do not depend on S.
    """
    (s, n_in), k, n_inner = x.shape, slots.shape[1], experts.n_inner
    assert experts.n_in == n_in and grouping.ids.shape == slots.shape == (s, k)
    assert all(m.n_in == n_in and m.rows.shape[0] == n_inner for m in shared)
    assert shared[0].format == shared[1].format
    template = [
        *(("D", n_in), ("I", n_inner), ("GATE", experts.starts[0]), ("UP", experts.starts[1])),
        *_matmul_template(experts, 0, shared[0], grouping, x.dtype),
    ]
    (h,) = launcher.launch(
        "moe_matmul_gate_up",
        [
            *(x, experts.records, slots, weights, grouping.order, grouping.tiles),
            *(shared[0].rows, shared[1].rows, dense.scalar(limit), dense.count(s)),
        ],
        template,
        _matmul_grid(2 * n_inner, grouping),
        (dense.MATMUL_THREADS, 1, 1),
        [((s, k + 1, n_inner), x.dtype)],
    )
    return h


def matmul_down(
    launcher: Launcher,
    h: Array,
    experts: ExpertRecords,
    grouping: Grouping,
    slots: Array,
    shared: PackedMatrix,
) -> Array:
    """h [S, k + 1, I] through the down maps: float32 [S, k + 1, D], for `dense.add` to sum."""
    (s, places, n_inner), d = h.shape, shared.rows.shape[0]
    assert grouping.ids.shape == slots.shape == (s, places - 1)
    assert experts.n_inner == n_inner == shared.n_in and d == experts.n_in
    template = [
        *(("D", d), ("I", n_inner), ("DOWN", experts.starts[2])),
        *_matmul_template(experts, 1, shared, grouping, h.dtype),
    ]
    (terms,) = launcher.launch(
        "moe_matmul_down",
        [
            *(h, experts.records, slots, grouping.order, grouping.tiles),
            *(shared.rows, dense.count(s)),
        ],
        template,
        _matmul_grid(d, grouping),
        (dense.MATMUL_THREADS, 1, 1),
        [((s, places, d), mx.float32)],
    )
    return terms


def _matmul_template(
    experts: ExpertRecords, which: int, shared: PackedMatrix, grouping: Grouping, dtype: Dtype
) -> Template:
    """What both products are compiled for."""
    return (
        *(("T", dtype), ("KTOP", grouping.ids.shape[1]), ("E", grouping.n_experts)),
        *(("FE", CODES[experts.formats[which]]), ("FS", shared.code)),
        *(("RECORD", experts.records.shape[1]), ("BM", GROUP_ROWS)),
    )


def _matmul_grid(n_rows: int, grouping: Grouping) -> tuple[int, int, int]:
    """Threads for `n_rows` weight rows of every tile."""
    return (dense.MATMUL_THREADS * -(-n_rows // dense.MATMUL_COLUMNS), grouping.grid[0], 1)


def gate_up_ref(
    ops: Ops,
    x: Array,
    experts: ExpertRecords,
    slots: Array,
    weights: Array,
    shared: tuple[PackedMatrix, PackedMatrix],
    limit: float,
) -> Array:
    """What `gate_up` and `matmul_gate_up` compute, expert by expert: slots are read on the host."""
    rows = []
    for s, chosen in enumerate(np.array(slots)):
        places = [experts.matrices(slot)[:2] for slot in chosen.tolist()]
        row = []
        for j, (gate, up) in enumerate([*places, shared]):
            a, b = (dense.project_ref(ops, x[s : s + 1], [m], x.dtype) for m in (gate, up))
            weight = weights[s, j].astype(ops.wide) if j < len(places) else 1
            row.append((swiglu(ops, a, b, limit) * weight).astype(x.dtype))
        rows.append(ops.concatenate(row))
    return ops.stack(rows)


def down_ref(
    ops: Ops,
    h: Array,
    experts: ExpertRecords,
    slots: Array,
    shared: PackedMatrix,
    residual: Residual,
) -> tuple[Array, Array]:
    """What `down` computes, expert by expert: slots are read on the host."""
    terms = matmul_down_ref(ops, h, experts, slots, shared)
    return dense.add_ref(ops, terms.sum(1), residual)


def matmul_down_ref(
    ops: Ops, h: Array, experts: ExpertRecords, slots: Array, shared: PackedMatrix
) -> Array:
    """What `matmul_down` computes, expert by expert: slots are read on the host."""
    rows = []
    for s, chosen in enumerate(np.array(slots)):
        maps = [*(experts.matrices(slot)[2] for slot in chosen.tolist()), shared]
        row = [dense.project_ref(ops, h[s, j : j + 1], [m], h.dtype) for j, m in enumerate(maps)]
        rows.append(ops.concatenate(row))
    return ops.stack(rows)
