"""The training model's parameters under the checkpoint's names (deepseek-v4.md 2.1)."""

from __future__ import annotations

from torch import Tensor

from .layers import Compressor, HyperConnection
from .model import Block, Head, Model

Tensors = dict[str, tuple[Tensor, str]]
"""name -> (values, storage): "fp8", "fp4", "bf16", "f32" or "i64"."""


def tensors(model: Model) -> Tensors:
    """Every tensor of the checkpoint; the values are views of the model's parameters."""
    out: Tensors = {
        "embed.weight": (model.embed, "bf16"),
        "head.weight": (model.head_weight, "bf16"),
    }
    _head(out, "", model.head)
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        _block(out, f"layers.{i}.", layer)
    if model.mtp is not None:
        m = model.mtp
        _block(out, "mtp.0.", m.block)
        _head(out, "mtp.0.", m.head)
        for name, kind in (
            ("e_proj", "fp8"),
            ("h_proj", "fp8"),
            ("enorm", "bf16"),
            ("hnorm", "bf16"),
        ):
            out[f"mtp.0.{name}.weight"] = (getattr(m, name), kind)
    return out


def _head(out: Tensors, prefix: str, head: Head) -> None:
    for name in ("hc_head_fn", "hc_head_base", "hc_head_scale"):
        out[prefix + name] = (getattr(head, name), "f32")
    out[prefix + "norm.weight"] = (head.norm, "bf16")


def _hyper(out: Tensors, prefix: str, hc: HyperConnection) -> None:
    for name in ("fn", "base", "scale"):
        out[f"{prefix}_{name}"] = (getattr(hc, name), "f32")


def _compressor(out: Tensors, prefix: str, c: Compressor) -> None:
    out[prefix + "wkv.weight"] = (c.wkv, "bf16")
    out[prefix + "wgate.weight"] = (c.wgate, "bf16")
    out[prefix + "ape"] = (c.ape, "f32")
    out[prefix + "norm.weight"] = (c.norm, "bf16")


def _block(out: Tensors, prefix: str, block: Block) -> None:
    out[prefix + "attn_norm.weight"] = (block.attn_norm, "bf16")
    out[prefix + "ffn_norm.weight"] = (block.ffn_norm, "bf16")
    _hyper(out, prefix + "hc_attn", block.hc_attn)
    _hyper(out, prefix + "hc_ffn", block.hc_ffn)
    a, p = block.attn, prefix + "attn."
    for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
        out[f"{p}{name}.weight"] = (getattr(a, name), "fp8")
    out[p + "q_norm.weight"] = (a.q_norm, "bf16")
    out[p + "kv_norm.weight"] = (a.kv_norm, "bf16")
    out[p + "attn_sink"] = (a.attn_sink, "f32")
    if a.compressor is not None:
        _compressor(out, p + "compressor.", a.compressor)
    if a.indexer is not None:
        out[p + "indexer.wq_b.weight"] = (a.indexer.wq_b, "fp8")
        out[p + "indexer.weights_proj.weight"] = (a.indexer.weights_proj, "bf16")
        _compressor(out, p + "indexer.compressor.", a.indexer.compressor)
    f, p = block.ffn, prefix + "ffn."
    out[p + "gate.weight"] = (f.gate, "bf16")
    out[p + ("gate.tid2eid" if f.hashed else "gate.bias")] = (
        (f.tid2eid, "i64") if f.hashed else (f.bias, "f32")
    )
    for w in ("w1", "w2", "w3"):
        out[f"{p}shared_experts.{w}.weight"] = (getattr(f, "shared_" + w), "fp8")
        for e, value in enumerate(getattr(f, w)):
            out[f"{p}experts.{e}.{w}.weight"] = (value, "fp4")
