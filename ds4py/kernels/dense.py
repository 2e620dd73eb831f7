"""Products with packed matrices. A step of decoding is bound by their bytes: each is read once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import mlx.core as mx

from ds4py.kernels import matvec
from ds4py.kernels.build import Launcher
from ds4py.kernels.formats import PackedMatrix, unpack
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import Array, Dtype, Ops

MAX_MATRICES = 8
"""Of one launch."""


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
    plan = matvec.tiling(s, n_in, dtype, groups * sum(outs))
    unused = MAX_MATRICES - len(matrices)
    codes = [m.code for m in matrices] + [matrices[0].code] * unused
    template = [
        *(("T", dtype), ("TX", x.dtype), ("TN", x.dtype if norm is None else norm.dtype)),
        *(("S", s), ("K", n_in), ("GROUPS", groups), ("NORM", norm is not None)),
        *(("XOFF", offset), ("XSTRIDE", x.shape[1])),
        *plan.template,
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
