"""Muon for the hidden matrices, AdamW for the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .model import Model


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix; g [batch, rows, columns]."""
    x = g / (g.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = (x.transpose(1, 2) if tall else x).bfloat16()
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return (x.transpose(1, 2) if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal; 3-d parameters are stacks of matrices."""

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._step([p for p in group["params"] if p.grad is not None], group)

    def _step(self, params: list[nn.Parameter], group: dict[str, float]) -> None:
        for p in params:
            state = self.state[p]
            if "m" not in state:
                state["m"] = torch.zeros_like(p)
            m: Tensor = state["m"]
            m.lerp_(p.grad, 1 - group["momentum"])
            g = torch.lerp(p.grad, m, group["momentum"])
            update = orthogonal(g if g.dim() == 3 else g[None])
            scale = max(1.0, g.shape[-2] / g.shape[-1]) ** 0.5
            p.mul_(1 - group["lr"] * group["decay"])
            p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def split(model: Model) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Hidden matrices, the two vocabulary matrices, everything else."""
    small = ("fn", "gate", "ape", "weights_proj", "hc_head_fn")
    hidden, vocab, rest = [], [], []
    for name, p in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last in ("embed", "head_weight"):
            vocab.append(p)
        elif p.dim() >= 2 and last not in small:
            hidden.append(p)
        else:
            rest.append(p)
    return hidden, vocab, rest


def optimizers(model: Model, lr: float) -> list[torch.optim.Optimizer]:
    """`lr` is Muon's; the others keep a fixed proportion to it."""
    hidden, vocab, rest = split(model)
    groups = [{"params": vocab, "lr": lr * 0.25}, {"params": rest, "lr": lr * 0.15}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0, fused=True)
    both: list[torch.optim.Optimizer] = [Muon(hidden, lr), adam]
    for optimizer in both:
        for group in optimizer.param_groups:
            group["base"] = group["lr"]
    return both
