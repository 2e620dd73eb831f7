"""Products with packed matrices. A step of decoding is bound by their bytes: each is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ds4py.kernels import hyper, matvec
from ds4py.kernels.build import Launcher, Output, Template
from ds4py.kernels.formats import PackedMatrix, unpack
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops

MAX_MATRICES = 8
"""Of one launch."""


EXPAND_TILE = 32
"""Channels of a threadgroup that adds to the streams: one line of a row of fn."""


@dataclass(frozen=True)
class Residual:
    """Where a sublayer's output goes, and what reads the result."""

    streams: Array
    """[S, H, D]"""
    gates: Array
    """float32 [S, H + H*H]: post | comb, comb[j, k] carrying stream j into stream k."""
    fn: Array
    """float32 [R, H*D]: the next hyper-connection's."""

    @property
    def template(self) -> Template:
        """The sizes expand.h is written in."""
        _, h, d = self.streams.shape
        return (("H", h), ("D", d), ("R", self.fn.shape[0]))

    def outputs(self, tile: int) -> list[Output]:
        """The new streams, and their products with fn and themselves, tile by tile."""
        s, _, d = self.streams.shape
        partials = (-(-d // tile), s, self.fn.shape[0] + 1)
        return [(self.streams.shape, self.streams.dtype), (partials, mx.float32)]


@cache
def scalar(value: float) -> mx.array:
    """A number as the kernels take it: one float32 element in `constant` memory."""
    return mx.array([value], mx.float32)


def project(
    launcher: Launcher,
    x: Array,
    matrices: Sequence[PackedMatrix],
    dtype: Dtype,
    norm: Array | None = None,
    eps: float = 0.0,
    groups: int = 1,
    offset: int = 0,
) -> Array:
    """x [S, stride] through up to eight matrices -> float32 [S, sum of out], side by side.

    S <= 8. The input is columns offset.. of x, rounded to `dtype`; norm [in]: rms-normed first.
    groups > 1: one matrix [groups*out, in]; columns g*in.. of x go through rows g*out.., so the
    result is [S, groups*out]. A row's result does not depend on S.
    """
    s, n_in = x.shape[0], matrices[0].n_in
    assert s <= matvec.MAX_ROWS and len(matrices) <= MAX_MATRICES
    assert all(m.n_in == n_in for m in matrices) and (groups == 1 or len(matrices) == 1)
    assert x.ndim == 2 and offset + groups * n_in <= x.shape[1]
    assert offset % 4 == 0 and x.shape[1] % 4 == 0, "activations are read four at a time"
    outs = [m.rows.shape[0] // groups for m in matrices]
    plan = matvec.tiling(s, n_in, dtype, groups * sum(outs), floats=s)
    unused = MAX_MATRICES - len(matrices)
    codes = [m.code for m in matrices] + [matrices[0].code] * unused
    template = [
        *(("T", dtype), ("TX", x.dtype), ("TN", x.dtype if norm is None else norm.dtype)),
        *(("S", s), ("K", n_in), ("GROUPS", groups), ("NORM", norm is not None)),
        *(("XOFF", offset), ("XSTRIDE", x.shape[1])),
        *(("KC", plan.staged(s, n_in, dtype)), *plan.template),
        *((f"F{i}", code) for i, code in enumerate(codes)),
        *((f"N{i}", n) for i, n in enumerate(outs + [0] * unused)),
    ]
    rows = [m.rows for m in matrices] + [matrices[0].rows] * unused
    tiles = groups * sum(plan.tiles(n) for n in outs)
    (y,) = launcher.launch(
        "dense_project",
        [x, x if norm is None else norm, scalar(eps), *rows],
        template,
        (tiles * plan.threads, 1, 1),
        (plan.threads, 1, 1),
        [((s, groups * sum(outs)), mx.float32)],
    )
    return y


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
    """What `project` computes."""
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
    floats = s * (1 + residual.streams.shape[1])
    plan = matvec.tiling(s, n_in, dtype, d, floats, EXPAND_TILE)
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
        residual.outputs(plan.tile),
    )
    return streams, partials


def expand_ref(
    ops: Ops, x: Array, matrix: PackedMatrix, residual: Residual, tile: int = EXPAND_TILE
) -> tuple[Array, Array]:
    """What `expand` computes."""
    x = x.astype(residual.streams.dtype)
    return add_ref(ops, project_ref(ops, x, [matrix], x.dtype), residual, tile)


def add_ref(
    ops: Ops, y: Array, residual: Residual, tile: int = EXPAND_TILE
) -> tuple[Array, Array]:
    """y [S, D] into the streams, and the partial sums for their reader."""
    s, h, d = residual.streams.shape
    gates, fn = residual.gates.astype(ops.wide), residual.fn.astype(ops.wide)
    post, comb = gates[:, :h], gates[:, h:].reshape(s, h, h)
    streams = hyper.expand(ops, y, residual.streams, post, comb)
    x, partials = streams.astype(ops.wide), []
    for first in range(0, d, tile):
        part = x[:, :, first : first + tile].reshape(s, -1)
        rows = fn.reshape(-1, h, d)[:, :, first : first + tile].reshape(-1, part.shape[1])
        square = (part * part).sum(1, keepdims=True)
        partials.append(ops.concatenate([part @ rows.swapaxes(0, 1), square], axis=1))
    return streams, ops.stack(partials)
