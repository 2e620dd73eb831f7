"""Products with packed matrices. A step of decoding is bound by their bytes: each is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx

from ds4py.kernels import hyper, matvec
from ds4py.kernels.build import Grid, Launcher, Output, Template
from ds4py.kernels.formats import CODES, PackedMatrix, unpack
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops

MAX_MATRICES = 8
"""Of one launch."""
MATMUL_ROWS, MATMUL_COLUMNS, MATMUL_THREADS = 32, 64, 128
"""A tile of a matrix product: positions (or twice as many), outputs, and who computes it."""
ADD_THREADS = 256
PART = 32
"""Channels of a partial sum with fn, whatever the launch."""


def expand_rows(n_x: int) -> int:
    """Channels of a simdgroup of what adds to the streams; four or more make whole parts. A
    threadgroup reads all activations: with 32 channels those were a tenth of the weights' bytes."""
    return PART // 2 if n_x <= 2 else PART // 4


@dataclass(frozen=True)
class Residual:
    """Where a sublayer's output goes, and what reads the result."""

    streams: Array
    """[S, H, D]"""
    gates: Array
    """float32 [S, H + H*H]: post | comb, comb[j, k] carrying stream j into stream k."""
    fn: Array
    """[R, H*D]: the next hyper-connection's, of any floating-point type."""

    @property
    def template(self) -> Template:
        """The sizes expand.h is written in."""
        _, h, d = self.streams.shape
        return (("H", h), ("D", d), ("R", self.fn.shape[0]))

    @property
    def outputs(self) -> list[Output]:
        """The new streams, and their products with fn and themselves, part by part."""
        s, _, d = self.streams.shape
        partials = (-(-d // PART), s, self.fn.shape[0] + 1)
        return [(self.streams.shape, self.streams.dtype), (partials, mx.float32)]


@cache
def scalar(value: float) -> mx.array:
    """A number as the kernels take it: one float32 element in `constant` memory."""
    return mx.array([value], mx.float32)


@lru_cache(64)
def count(value: int) -> mx.array:
    """A number of positions, which kernels for prompts take as an argument: one int32 element."""
    return mx.array([value], mx.int32)


@dataclass(frozen=True)
class _Plan:
    """What a launch over several matrices is compiled for. Making it costs more than launching, so
    it is made once for each kind of launch."""

    template: Template
    n_out: int
    """Columns of the result."""
    grid: Grid
    threads: Grid


class _Shape(NamedTuple):
    """All that tells two kinds of launches apart; `kinds` are the matrices'."""

    kinds: tuple[tuple[int, int, int], ...]
    x: tuple[int, int]
    x_dtype: Dtype
    dtype: Dtype
    norm_dtype: Dtype | None
    groups: int
    offset: int
    result: Dtype

    @property
    def outs(self) -> list[int]:
        """Rows of each matrix that one group takes."""
        return [out // self.groups for _, out, _ in self.kinds]

    @property
    def n_in(self) -> int:
        return self.kinds[0][2]

    @property
    def template(self) -> Template:
        """What parts.h is written in."""
        stride, unused = self.x[1], MAX_MATRICES - len(self.kinds)
        assert unused >= 0 and all(n_in == self.n_in for _, _, n_in in self.kinds)
        assert self.groups == 1 or len(self.kinds) == 1
        assert self.offset + self.groups * self.n_in <= stride
        assert self.offset % 4 == stride % 4 == 0, "activations are read four at a time"
        codes = [code for code, _, _ in self.kinds] + [self.kinds[0][0]] * unused
        norm = self.norm_dtype is not None
        return (
            *(("T", self.dtype), ("TX", self.x_dtype), ("TY", self.result)),
            *(("TN", self.norm_dtype if norm else self.x_dtype), ("NORM", norm)),
            *(("K", self.n_in), ("GROUPS", self.groups)),
            *(("XOFF", self.offset), ("XSTRIDE", stride)),
            *((f"F{i}", code) for i, code in enumerate(codes)),
            *((f"N{i}", n) for i, n in enumerate(self.outs + [0] * unused)),
        )


@lru_cache(1024)
def _project(shape: _Shape) -> _Plan:
    s, n_out = shape.x[0], shape.groups * sum(shape.outs)
    assert s <= matvec.MAX_ROWS
    plan = matvec.tiling(s, shape.n_in, shape.dtype, n_out, floats=s)
    staged = plan.staged(s, shape.n_in, shape.dtype)
    tiles = shape.groups * sum(plan.tiles(n) for n in shape.outs)
    template = (*shape.template, ("S", s), ("KC", staged), *plan.template)
    return _Plan(template, n_out, (tiles * plan.threads, 1, 1), (plan.threads, 1, 1))


@lru_cache(1024)
def _matmul(shape: _Shape) -> _Plan:
    s = shape.x[0]
    large = s > MATMUL_ROWS and CODES["Q6_K"] not in [code for code, _, _ in shape.kinds]
    rows = 2 * MATMUL_ROWS if large else MATMUL_ROWS  # Q6_K's blocks leave no room for more
    tiles = shape.groups * sum(-(-n // MATMUL_COLUMNS) for n in shape.outs)
    grid = (MATMUL_THREADS * -(-s // rows), tiles, 1)
    n_out = shape.groups * sum(shape.outs)
    return _Plan((*shape.template, ("BM", rows)), n_out, grid, (MATMUL_THREADS, 1, 1))


def project(
    launcher: Launcher,
    x: Array,
    matrices: Sequence[PackedMatrix],
    dtype: Dtype,
    norm: Array | None = None,
    eps: float = 0.0,
    groups: int = 1,
    offset: int = 0,
    result: Dtype = mx.float32,
) -> Array:
    """x [S, stride] through up to eight matrices -> [S, sum of out] of type `result`, side by side.

    S <= 8. The input is columns offset.. of x, rounded to `dtype`; norm [in]: rms-normed first.
    groups > 1: one matrix [groups*out, in]; columns g*in.. of x go through rows g*out.., so the
    result is [S, groups*out]. A row's result does not depend on S.
    """
    plan = _project(_shape(x, matrices, dtype, norm, groups, offset, result))
    (y,) = launcher.launch(
        "dense_project",
        [x, x if norm is None else norm, scalar(eps), *_eight(matrices)],
        plan.template,
        plan.grid,
        plan.threads,
        [((x.shape[0], plan.n_out), result)],
    )
    return y


def matmul(
    launcher: Launcher,
    x: Array,
    matrices: Sequence[PackedMatrix],
    dtype: Dtype,
    norm: Array | None = None,
    eps: float = 0.0,
    groups: int = 1,
    offset: int = 0,
    result: Dtype = mx.float32,
) -> Array:
    """`project` for any S: for prompts, where its matrix instructions pay.

    Sums are taken in another order than `project`'s, so results differ from its as float32 sums
    do; they too do not depend on S.
    """
    plan, s = _matmul(_shape(x, matrices, dtype, norm, groups, offset, result)), x.shape[0]
    (y,) = launcher.launch(
        "dense_matmul",
        [x, x if norm is None else norm, scalar(eps), count(s), *_eight(matrices)],
        plan.template,
        plan.grid,
        plan.threads,
        [((s, plan.n_out), result)],
    )
    return y


def _eight(matrices: Sequence[PackedMatrix]) -> list[Array]:
    """The launch's weights: the first stands where there is none."""
    return [m.rows for m in matrices] + [matrices[0].rows] * (MAX_MATRICES - len(matrices))


def _shape(
    x: Array,
    matrices: Sequence[PackedMatrix],
    dtype: Dtype,
    norm: Array | None,
    groups: int,
    offset: int,
    result: Dtype,
) -> _Shape:
    kinds = tuple([m.kind for m in matrices])
    norm_dtype = None if norm is None else norm.dtype
    return _Shape(kinds, tuple(x.shape), x.dtype, dtype, norm_dtype, groups, offset, result)


def project_ref(
    ops: Ops,
    x: Array,
    matrices: Sequence[PackedMatrix],
    dtype: Dtype,
    norm: Array | None = None,
    eps: float = 0.0,
    groups: int = 1,
    offset: int = 0,
) -> Array:
    """What `project` and `matmul` compute."""
    s, n_in = x.shape[0], matrices[0].n_in
    x = x[:, offset : offset + groups * n_in].astype(ops.wide)
    if norm is not None:
        x = rms_norm(ops, x, norm.astype(ops.wide), eps)
    x = x.astype(dtype).astype(ops.wide).reshape(s, groups, 1, n_in)
    parts = []
    for m in matrices:
        w = unpack(m.format, m.rows, n_in).astype(ops.wide).reshape(groups, -1, n_in)
        parts.append((x @ w.swapaxes(1, 2)).reshape(s, -1))
    return ops.concatenate(parts, axis=1)


def expand(
    launcher: Launcher, x: Array, matrix: PackedMatrix, residual: Residual
) -> tuple[Array, Array]:
    """x [S, in] through the matrix that ends a sublayer, into the streams.

    -> streams [S, H, D] and float32 partials [P, S, R + 1], whose sum over P holds fn's products
    with the new streams and, last, their sum of squares. S <= 8; a row's result does not depend
    on S. The product is not rounded before it is added.
    """
    (s, n_in), dtype = x.shape, residual.streams.dtype
    d = residual.streams.shape[2]
    assert s <= matvec.MAX_ROWS and matrix.n_in == n_in and matrix.rows.shape[0] == d
    points = matrix.code == CODES["IQ2_XXS"]
    plan = matvec.tiling(s, n_in, dtype, d, floats=s, rows=expand_rows(s), points=points)
    template = [
        *(("T", dtype), ("TX", x.dtype), ("S", s), ("K", n_in), ("F", matrix.code)),
        *(("KC", plan.staged(s, n_in, dtype)), *plan.template, *residual.template),
    ]
    streams, partials = launcher.launch(
        "dense_expand",
        [x, matrix.rows, residual.streams, residual.gates, residual.fn],
        template,
        (plan.tiles(d) * plan.threads, 1, 1),
        (plan.threads, 1, 1),
        residual.outputs,
    )
    return streams, partials


def add(launcher: Launcher, terms: Array, residual: Residual) -> tuple[Array, Array]:
    """Float32 terms [S, n, D], summed in order, into the streams: what `expand` returns.

    Any S; the end of a sublayer for prompts. A row's result does not depend on S.
    """
    s, n_terms, d = terms.shape
    tiles = -(-d // PART)
    streams, partials = launcher.launch(
        "dense_add",
        [terms, residual.streams, residual.gates, residual.fn, count(s)],
        (
            *(("T", residual.streams.dtype), ("TERMS", n_terms), ("TILE", PART)),
            *(("NSG", ADD_THREADS // 32), *residual.template),
        ),
        (ADD_THREADS * tiles, -(-s // matvec.MAX_ROWS), 1),
        (ADD_THREADS, 1, 1),
        residual.outputs,
    )
    return streams, partials


def expand_ref(ops: Ops, x: Array, matrix: PackedMatrix, residual: Residual) -> tuple[Array, Array]:
    """What `expand` computes."""
    x = x.astype(residual.streams.dtype)
    return add_ref(ops, project_ref(ops, x, [matrix], x.dtype), residual)


def add_ref(ops: Ops, y: Array, residual: Residual) -> tuple[Array, Array]:
    """y [S, D] into the streams, and the partial sums for their reader."""
    s, h, d = residual.streams.shape
    gates, fn = residual.gates.astype(ops.wide), residual.fn.astype(ops.wide)
    post, comb = gates[:, :h], gates[:, h:].reshape(s, h, h)
    streams = hyper.expand(ops, y, residual.streams, post, comb)
    x, partials = streams.astype(ops.wide), []
    for first in range(0, d, PART):
        part = x[:, :, first : first + PART].reshape(s, -1)
        rows = fn.reshape(-1, h, d)[:, :, first : first + PART].reshape(-1, part.shape[1])
        square = (part * part).sum(1, keepdims=True)
        partials.append(ops.concatenate([part @ rows.swapaxes(0, 1), square], axis=1))
    return streams, ops.stack(partials)
