"""Products of consecutive row groups with one matrix each, without intermediate copies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class GroupedLinear(torch.autograd.Function):
    """x [N, in] sorted by group, w [E, out, in], sizes (rows per group) -> [N, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, sizes: list[int], mm: torch.dtype) -> Tensor:
        x, w = x.to(mm), w.to(mm)
        out = x.new_empty(x.shape[0], w.shape[1])
        for e, rows in _groups(sizes):
            torch.mm(x[rows], w[e].T, out=out[rows])
        ctx.save_for_backward(x, w)
        ctx.sizes = sizes
        return out.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, w = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        dx, dw = torch.empty_like(x), torch.zeros_like(w)
        for e, rows in _groups(ctx.sizes):
            torch.mm(grad[rows], w[e], out=dx[rows])
            torch.mm(grad[rows].T, x[rows], out=dw[e])
        return dx.float(), dw.float(), None, None


def _groups(sizes: list[int]) -> list[tuple[int, slice]]:
    groups, start = [], 0
    for e, n in enumerate(sizes):
        if n:
            groups.append((e, slice(start, start + n)))
        start += n
    return groups
