"""The training loop: schedule by the clock, losses, checkpoints, curve."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .config import CONFIG
from .data import Coder, Packer
from .layers import Mode, MoE
from .model import Model
from .optim import optimizers
from .score import report


@dataclass
class Plan:
    """What changes over a run, as fractions of its time; read again while it runs."""

    minutes: float = 84.0
    lr: float = 0.02
    warmup: float = 0.01
    decay_from: float = 0.64
    lengths: dict[str, float] = field(
        default_factory=lambda: {"256": 0.0, "512": 0.15, "1024": 0.5}
    )
    """Sequence length -> from when."""
    tokens: int = 4096
    """Per step."""
    micro: int = 4096
    """Per forward pass."""
    index_loss_from: float = 0.54
    select_from: float = 0.74
    rounding_from: float = 0.64
    mtp_weight: float = 0.3
    mtp_from: float = 0.56
    balance: float = 0.002
    """Step of the router bias."""
    reach: int = 8
    """What of the window layers with compressed rows see in some steps, at first."""
    reach_share: float = 0.6
    """The share of such steps."""
    reach_until: float = 0.5
    source_weight: float = 0.5
    source_until: float = 0.75
    recall_weight: float = 3.0
    """How much more the digits of recalled numbers weigh while `source_weight` acts."""
    dense: float = 0.3
    """Least share of fact turns in recall conversations."""
    mix: dict[str, float] = field(
        default_factory=lambda: {
            "facts": 0.2, "recall": 0.2, "short": 0.19, "tools": 0.28, "story": 0.05,
            "drill": 0.08,
        }
    )
    score_every: float = 10.0
    """Minutes."""

    def length(self, progress: float) -> int:
        return max(int(k) for k, start in self.lengths.items() if progress >= start)

    def factor(self, progress: float) -> float:
        """Learning rate relative to its peak."""
        if progress < self.warmup:
            return progress / self.warmup + 0.02
        if progress < self.decay_from:
            return 1.0
        return max(0.02, (1 - progress) / (1 - self.decay_from))

    def mode(self, progress: float) -> Mode:
        rounding = progress >= self.rounding_from
        return Mode(
            torch.bfloat16, rounding, rounding, progress >= self.select_from,
            progress >= self.index_loss_from, fused=True,
        )



def losses(
    model: Model, ids: Tensor, weights: Tensor, mode: Mode, draft: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of the main and the draft loss, and the index loss."""
    out = model(ids[:, :-1], mode, draft)
    main = _weighted(model, out.hidden, ids[:, 1:], weights[:, 1:], mode)
    if out.draft is None:
        return main, torch.zeros(()), out.index_loss
    drafted = _weighted(model, out.draft[:, :-1], ids[:, 2:], weights[:, 2:], mode)
    return main, drafted, out.index_loss


def _weighted(model: Model, hidden: Tensor, target: Tensor, weights: Tensor, mode: Mode) -> Tensor:
    """Only positions with a weight meet the vocabulary matrix."""
    keep = weights.flatten().nonzero()[:, 0]
    logits = model.logits(hidden.flatten(0, 1)[keep], mode)
    ce = F.cross_entropy(logits, target.flatten()[keep], reduction="none")
    return (ce * weights.flatten()[keep]).sum()


class Run:
    """One training run in a folder: `state.pt`, `curve.jsonl`, `plan.json`."""

    def __init__(self, folder: Path, coder: Coder, seed: int, plan: Plan) -> None:
        torch.manual_seed(seed)
        self.folder, self.coder, self.plan = folder, coder, plan
        self.model = Model(CONFIG)
        self.optimizers = optimizers(self.model, plan.lr)
        self.packer = Packer(coder, seed)
        self.rng = np.random.default_rng(seed)
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        (folder / "plan.json").write_text(json.dumps(asdict(plan), indent=1))

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "optim": [o.state_dict() for o in self.optimizers],
            "step": self.step, "tokens": self.tokens, "elapsed": self.elapsed,
        }
        torch.save(state, self.folder / "state.tmp")
        (self.folder / "state.tmp").rename(self.folder / "state.pt")

    def load(self, path: Path, restart: bool = False) -> None:
        """Continue; with `restart` only the weights and optimiser are taken, the clock is not."""
        state = torch.load(path, weights_only=False)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optim"], strict=True):
            bases = [g["base"] for g in optimizer.param_groups]
            optimizer.load_state_dict(saved)
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["base"] = base
        self.step, self.tokens = state["step"], state["tokens"]
        self.elapsed = 0.0 if restart else state["elapsed"]
        self.packer.rng.seed(self.step + 1)

    def train(self) -> None:
        last_score = last_save = self.elapsed
        while self.elapsed < self.plan.minutes:
            begin = time.perf_counter()
            row = self.one_step()
            self.elapsed += (time.perf_counter() - begin) / 60
            if self.step % 10 == 0:
                self.log(row)
                self.reread()
            if self.elapsed - last_save > 2:
                self.save()
                last_save = self.elapsed
            if self.elapsed - last_score > self.plan.score_every:
                self.score(24)
                last_score = self.elapsed
        self.save()
        self.score(100)

    def one_step(self) -> dict[str, Any]:
        plan, progress = self.plan, self.elapsed / self.plan.minutes
        length, mode = plan.length(progress), plan.mode(progress)
        if progress < plan.reach_until and self.rng.random() < plan.reach_share:
            mode.reach = plan.reach
        ids, weights = self.packer.batch(plan.tokens // length, length, plan.mix, plan.dense)
        where = None
        if progress < plan.source_until:
            nearest = (mode.reach or CONFIG["sliding_window"]) + 4
            where = torch.from_numpy(self.packer.sources(ids, weights, nearest)[:, :, :-1])
            mode.source_weight = plan.source_weight
            weights[:, 1:][where[:, 0].numpy() >= 0] *= plan.recall_weight
        weights = self.thin(weights)
        total, rows = float(weights[:, 1:].sum()), max(1, plan.micro // length)
        sums = np.zeros(3)
        for at in range(0, len(ids), rows):
            part = torch.from_numpy(ids[at : at + rows]), torch.from_numpy(weights[at : at + rows])
            mode.sources = None if where is None else where[at : at + rows]
            main, draft, index = losses(self.model, *part, mode, progress >= plan.mtp_from)
            share = len(part[0]) / len(ids)
            loss = (main + plan.mtp_weight * draft) / total + share * index
            loss.backward()
            sums += (main.item() / total, draft.item() / total, index.item() * share)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1e9)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * plan.factor(progress)
            optimizer.step()
            optimizer.zero_grad()
        self.balance()
        self.step += 1
        self.tokens += plan.tokens
        return {"loss": sums[0], "mtp": sums[1], "index": sums[2], "norm": float(norm),
                "length": length}

    def thin(self, weights: np.ndarray) -> np.ndarray:
        """Prompt tokens (light) count for a random quarter of them, four times as much."""
        light = (weights > 0) & (weights < 0.5)
        keep = self.rng.random(weights.shape) < 0.25
        return np.where(light, np.where(keep, weights * 4, 0), weights).astype(np.float32)

    def balance(self) -> None:
        """Raise the bias of experts that got less than their share (noaux_tc)."""
        for module in self.model.modules():
            if isinstance(module, MoE):
                if not module.hashed:
                    module.bias += self.plan.balance * (module.counts.mean() - module.counts).sign()
                module.counts.zero_()

    def log(self, row: dict[str, Any]) -> None:
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        row = {"minutes": round(self.elapsed, 2), "step": self.step, "tokens": self.tokens, **row}
        self.write(row)

    def write(self, row: dict[str, Any]) -> None:
        line = json.dumps(row)
        print(line, flush=True)
        with (self.folder / "curve.jsonl").open("a") as f:
            f.write(line + "\n")

    def reread(self) -> None:
        """The plan may be changed while the run goes on."""
        try:
            self.plan = Plan(**json.loads((self.folder / "plan.json").read_text()))
        except (ValueError, TypeError) as exc:
            print(f"plan.json ignored: {exc}", flush=True)
        if not math.isfinite(self.plan.minutes):
            raise ValueError("minutes must be a number")

    def score(self, n: int) -> None:
        mode = replace(self.plan.mode(self.elapsed / self.plan.minutes), fused=False)
        scores = report(self.model, mode, self.coder, n)
        self.write({"minutes": round(self.elapsed, 2), "score": scores})
