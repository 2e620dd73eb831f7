"""Write the bundle: weights in DeepSeek's storage formats under the original names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .config import CONFIG
from .model import Model
from .names import tensors
from .quant import e2m1, fp4_scale, fp8_scale, spread

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scale_bytes(scale: Tensor) -> Tensor:
    """Powers of two as E8M0."""
    return ((scale.contiguous().view(torch.int32) >> 23) & 255).to(torch.uint8).view(
        torch.float8_e8m0fnu
    )


def pack_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> E4M3 values and E8M0 scales per 128x128."""
    scale = fp8_scale(w)
    return (w / spread(scale, w)).to(torch.float8_e4m3fn), scale_bytes(scale)


def pack_fp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> two elements per byte (the first in the low nibble), E8M0 scales per 32."""
    scale = fp4_scale(w)
    v = e2m1((w.unflatten(-1, (-1, 32)) / scale).clamp(-6, 6)).flatten(-2)
    code = torch.searchsorted(torch.tensor(_E2M1), v.abs().contiguous())
    code = (code + 8 * (v < 0)).to(torch.uint8)
    packed = code[:, 0::2] | (code[:, 1::2] << 4)
    return packed.view(torch.int8), scale_bytes(scale[..., 0])


@torch.no_grad()
def state(model: Model) -> dict[str, Tensor]:
    """Checkpoint tensors by name."""
    out: dict[str, Tensor] = {}
    for name, (value, kind) in tensors(model).items():
        w = value.detach()
        if kind in ("fp8", "fp4"):
            packed = pack_fp8(w) if kind == "fp8" else pack_fp4(w)
            out[name], out[name.removesuffix("weight") + "scale"] = packed
        else:
            dtype = {"bf16": torch.bfloat16, "f32": torch.float32, "i64": torch.int64}[kind]
            out[name] = w.to(dtype)
    return {k: v.contiguous().clone() for k, v in out.items()}


def write(model: Model, tokenizer: bytes, folder: Path) -> int:
    """config.json, model.safetensors and tokenizer.model; returns the size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(CONFIG, indent=2)
    (folder / "config.json").write_text(text + "\n")
    save_file(state(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(tokenizer)
    (folder / "model.safetensors").chmod(0o644)
    return sum(f.stat().st_size for f in folder.iterdir())


COLUMNS = ("minutes", "tokens", "length", "loss", "mtp")
SCORES = ("recall", "addition", "addition_thinking", "tool_call", "tool_answer", "story_loss")


def curve(log: Path, every: int = 10) -> str:
    """A run's log as CSV: means of `every` rows, and the scores taken on the way.

    After an interruption a run writes some minutes again; the earlier rows are left out.
    """
    rows: list[dict[str, Any]] = []
    for line in log.read_text().splitlines():
        row = json.loads(line)
        while rows and rows[-1]["minutes"] > row["minutes"]:
            rows.pop()
        rows.append(row)
    lines, part = [",".join((*COLUMNS, *SCORES))], list[dict[str, Any]]()
    for row in rows:
        if "score" in row:
            scores = (str(row["score"].get(name, "")) for name in SCORES)
            lines.append(",".join((str(row["minutes"]), "", "", "", "", *scores)))
            continue
        part.append(row)
        if len(part) == every:
            loss, mtp = (sum(r[k] for r in part) / every for k in ("loss", "mtp"))
            head = (part[-1]["minutes"], part[-1]["tokens"], part[-1]["length"])
            lines.append(",".join((*map(str, head), f"{loss:.4f}", f"{mtp:.4f}", *[""] * 6)))
            part = []
    return "\n".join(lines) + "\n"


@torch.no_grad()
def read(folder: Path) -> Model:
    """The exported model, with the stored values, for scoring what is shipped."""
    from safetensors import safe_open

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = Model(config)
    with safe_open(folder / "model.safetensors", "pt") as f:
        for name, (value, kind) in tensors(model).items():
            stored = f.get_tensor(name)
            if kind == "fp8":
                scale = f.get_tensor(name.removesuffix("weight") + "scale").float()
                stored = stored.float() * spread(scale, stored)
            elif kind == "fp4":
                scale = f.get_tensor(name.removesuffix("weight") + "scale").float()
                stored = unpack_fp4(stored, scale)
            value.copy_(stored.view(value.shape))
    return model


def unpack_fp4(packed: Tensor, scale: Tensor) -> Tensor:
    table = torch.tensor((*_E2M1, *(-v for v in _E2M1)))
    code = packed.view(torch.uint8).long()
    values = torch.stack((table[code & 15], table[code >> 4]), -1).flatten(-2)
    return (values.unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2)
