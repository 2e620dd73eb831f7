"""From a layer's projections to what its attention reads: heads, rows and compressors' values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from ds4py.kernels.build import Launcher, Template
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops
from ds4py.kernels.rope import rotate, unfold

VALUES_PER_JOB = 128
"""Of the compressors' values, per simdgroup of heads_prepare."""


@dataclass(frozen=True)
class LayerShape:
    """One layer's widths, as the attention kernels' templates take them."""

    n_heads: int
    """0: rows are wanted without queries."""
    head_dim: int
    rope: int
    latent: int
    """Width of wq_a's output."""
    row_width: int
    """Of a stored attention row: bytes, or channels where rows are floats."""
    native: bool
    """Rows are bytes of the trained formats; else activations as they are."""
    ratio: int = 0
    """0: no compressor."""
    overlap: int = 1
    index_heads: int = 0
    """0: no indexer."""
    index_dim: int = 0
    index_row_width: int = 0

    def __post_init__(self) -> None:
        assert self.head_dim % 64 == self.rope % 64 == self.index_dim % 64 == 0
        assert self.index_dim & (self.index_dim - 1) == 0, "the Hadamard transform's width"

    @property
    def values(self) -> int:
        """Columns of the compressor: values, then scores."""
        return 2 * self.overlap * self.head_dim if self.ratio else 0

    @property
    def index_values(self) -> int:
        return 2 * self.overlap * self.index_dim

    @property
    def n_projected(self) -> int:
        """Columns of the first projections: wq_a, wkv, both compressors, index weights."""
        own = self.latent + self.head_dim
        return own + self.values + self.index_values + self.index_heads

    @property
    def n_queries(self) -> int:
        """Columns of wq_b and the indexer's wq_b."""
        return self.n_heads * self.head_dim + self.index_heads * self.index_dim

    def row_dtype(self, dtype: Dtype) -> Dtype:
        """Of stored rows, for activations of `dtype`."""
        return mx.uint8 if self.native else dtype

    @property
    def row_template(self) -> Template:
        """What every kernel that touches rows is told."""
        return (("HD", self.head_dim), ("ROPE", self.rope), ("PLAIN", not self.native))


@dataclass(frozen=True)
class Prepared:
    """What `prepare` makes for S new tokens; None where the layer has no such part."""

    q: Array | None
    """[S, heads, hd], normed and rotated."""
    row: Array
    """[S, row_width], as stored."""
    values: Array | None
    """float32 [S, 2*c*hd]: the compressor's values and scores, with their bias."""
    index_values: Array | None
    index_query: Array | None
    """[S, index_heads, index_row_width], rotated, as rows are stored."""
    index_weights: Array | None
    """float32 [S, index_heads], scaled."""


def prepare(
    launcher: Launcher,
    shape: LayerShape,
    projected: Array,
    queries: Array | None,
    table: Array,
    kv_norm: Array,
    ape: Array | None,
    index_ape: Array | None,
    step: Array,
    constants: Array,
    dtype: Dtype,
) -> Prepared:
    """projected float32 [S, n_projected] and queries float32 [S, n_queries] -> `Prepared`.
    queries: None where there are no heads.

    table: `rope.table` of the tokens' positions. kv_norm [hd], ape [r, values], index_ape
    [r, index_values], float32. step int32: [the first position, ...]. constants float32:
    [the norms' epsilon, (index_dim * index_heads)^-0.5].
    """
    n = projected.shape[0]
    assert projected.shape == (n, shape.n_projected) and (queries is None) == (not shape.n_queries)
    assert queries is None or queries.shape == (n, shape.n_queries)
    assert table.shape == (n, shape.rope // 2, 2)
    assert shape.latent % 2 == shape.index_heads % 2 == 0, "columns are read in pairs"
    n_values = shape.values + shape.index_values
    jobs = shape.n_heads + 1 + -(-n_values // VALUES_PER_JOB)
    jobs += shape.index_heads + 1 if shape.index_heads else 0
    template = (
        ("T", dtype),
        *shape.row_template,
        ("NH", shape.n_heads),
        ("LATENT", shape.latent),
        ("RATIO", shape.ratio),
        ("VALUES", shape.values),
        ("INDEX_VALUES", shape.index_values),
        ("INDEX_DIM", shape.index_dim),
        ("INDEX_HEADS", shape.index_heads),
    )
    outputs = [
        ((n, shape.n_heads, shape.head_dim) if shape.n_heads else (1,), dtype),
        ((n, shape.row_width), shape.row_dtype(dtype)),
        ((n, shape.values) if shape.values else (1,), mx.float32),
        ((n, shape.index_values) if shape.index_values else (1,), mx.float32),
        (
            (n, shape.index_heads, shape.index_row_width) if shape.index_heads else (1,),
            shape.row_dtype(dtype),
        ),
        ((n, shape.index_heads) if shape.index_heads else (1,), mx.float32),
    ]
    unused = projected  # any array the kernel may be bound to
    inputs = (
        *(projected, unused if queries is None else queries, table, kv_norm),
        *(unused if bias is None else bias for bias in (ape, index_ape)),
        *(step, constants),
    )
    made = launcher.launch(
        "heads_prepare", inputs, template, (32 * jobs, n, 1), (256, 1, 1), outputs
    )
    return Prepared(*(x if x.ndim > 1 else None for x in made))


def prepare_ref(
    ops: Ops,
    shape: LayerShape,
    projected: Array,
    queries: Array | None,
    table: Array,
    kv_norm: Array,
    ape: Array | None,
    index_ape: Array | None,
    start: int,
    eps: float,
    dtype: Dtype,
    pack: Callable[[Array], Array],
    pack_index: Callable[[Array], Array],
) -> Prepared:
    """What `prepare` computes; pack: rows as computed -> as stored, of attention and indexer."""
    s, n = shape, projected.shape[0]
    turn = unfold(ops, table, s.head_dim)
    q = None
    if queries is not None:
        q = queries[:, : s.n_heads * s.head_dim].astype(dtype).reshape(n, s.n_heads, s.head_dim)
        q = rotate(ops, rms_norm(ops, q, None, eps), turn)
    at = s.latent + s.head_dim
    row = rms_norm(ops, projected[:, s.latent : at].astype(dtype), kv_norm, eps)
    row = pack(rotate(ops, row, turn))
    values = index_values = index_query = index_weights = None
    if s.ratio:
        phase = (ops.arange(n) + start) % s.ratio
        assert ape is not None
        values = projected[:, at : at + s.values] + ape[phase]
    if s.index_heads:
        assert index_ape is not None and queries is not None
        at += s.values
        index_values = projected[:, at : at + s.index_values] + index_ape[phase]
        index_query = queries[:, s.n_heads * s.head_dim :].astype(dtype)
        index_query = index_query.reshape(n, s.index_heads, s.index_dim)
        index_query = pack_index(rotate(ops, index_query, unfold(ops, table, s.index_dim)))
        weights = projected[:, at + s.index_values :].astype(dtype).astype(ops.wide)
        index_weights = weights * (s.index_dim * s.index_heads) ** -0.5
    return Prepared(q, row, values, index_values, index_query, index_weights)
