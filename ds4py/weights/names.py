"""The checkpoint's tensor names, with the shape each must have for a config.

Glossary: wq_a, wq_b low-rank query; wkv the shared row; wo_a, wo_b grouped output; ape score bias
by position in a compressor's window; hc_*_fn, _base, _scale hyper-connections; tid2eid token id ->
expert ids; w1 gate, w3 up, w2 down. Source: DeepSeek's inference/model.py, the released headers.
"""

from __future__ import annotations

from ds4py.config import LayerPlan, ModelConfig

Shapes = dict[str, tuple[int, ...]]


def expected(config: ModelConfig) -> Shapes:
    """Every tensor of the main model, by name; `.scale` tensors are not listed."""
    c = config
    shapes: Shapes = {
        "embed.weight": (c.vocab_size, c.hidden_size),
        "head.weight": (c.vocab_size, c.hidden_size),
        "norm.weight": (c.hidden_size,),
        **_hyper_head("hc_head", c),
    }
    for plan in c.layers:
        shapes.update(_block(f"layers.{plan.index}", plan, c))
    return shapes


def expected_draft(config: ModelConfig) -> Shapes:
    """Every tensor of the MTP layers."""
    d, shapes = config.hidden_size, Shapes()
    for i, plan in enumerate(config.mtp_layers):
        prefix = f"mtp.{i}"
        shapes.update(_block(prefix, plan, config))
        shapes.update(_hyper_head(f"{prefix}.hc_head", config))
        shapes.update({f"{prefix}.{n}.weight": (d, d) for n in ("e_proj", "h_proj")})
        shapes.update({f"{prefix}.{n}.weight": (d,) for n in ("enorm", "hnorm", "norm")})
    return shapes


def is_set_aside(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is DSpark's: recognised, not loaded."""
    return config.dspark and name.startswith(("mtp.", "dspark"))


def _hyper_head(prefix: str, c: ModelConfig) -> Shapes:
    h = c.hc_mult
    return {
        f"{prefix}_fn": (h, h * c.hidden_size),
        f"{prefix}_base": (h,),
        f"{prefix}_scale": (1,),
    }


def _hyper(prefix: str, c: ModelConfig) -> Shapes:
    h = c.hc_mult
    out = 2 * h + h * h
    return {
        f"{prefix}_fn": (out, h * c.hidden_size),
        f"{prefix}_base": (out,),
        f"{prefix}_scale": (3,),
    }


def _block(prefix: str, plan: LayerPlan, c: ModelConfig) -> Shapes:
    d = c.hidden_size
    return {
        f"{prefix}.attn_norm.weight": (d,),
        f"{prefix}.ffn_norm.weight": (d,),
        **_hyper(f"{prefix}.hc_attn", c),
        **_hyper(f"{prefix}.hc_ffn", c),
        **_attention(f"{prefix}.attn", plan, c),
        **_feed_forward(f"{prefix}.ffn", plan, c),
    }


def _attention(prefix: str, plan: LayerPlan, c: ModelConfig) -> Shapes:
    d, heads, hd = c.hidden_size, c.num_attention_heads, c.head_dim
    shapes: Shapes = {
        "wq_a.weight": (c.q_lora_rank, d),
        "q_norm.weight": (c.q_lora_rank,),
        "wq_b.weight": (heads * hd, c.q_lora_rank),
        "wkv.weight": (hd, d),
        "kv_norm.weight": (hd,),
        "attn_sink": (heads,),
        "wo_a.weight": (c.o_groups * c.o_lora_rank, heads * hd // c.o_groups),
        "wo_b.weight": (d, c.o_groups * c.o_lora_rank),
    }
    if plan.compressed:
        shapes.update(_compressor("compressor", plan, hd, d))
    if plan.indexed:
        di, hi = c.index_head_dim, c.index_n_heads
        shapes["indexer.wq_b.weight"] = (hi * di, c.q_lora_rank)
        shapes["indexer.weights_proj.weight"] = (hi, d)
        shapes.update(_compressor("indexer.compressor", plan, di, d))
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _compressor(prefix: str, plan: LayerPlan, width: int, d: int) -> Shapes:
    return {
        f"{prefix}.wkv.weight": (plan.overlap * width, d),
        f"{prefix}.wgate.weight": (plan.overlap * width, d),
        f"{prefix}.ape": (plan.ratio, plan.overlap * width),
        f"{prefix}.norm.weight": (width,),
    }


def _feed_forward(prefix: str, plan: LayerPlan, c: ModelConfig) -> Shapes:
    d, n_inner, n_experts = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    shapes: Shapes = {f"{prefix}.gate.weight": (n_experts, d)}
    if plan.hash_routed:
        shapes[f"{prefix}.gate.tid2eid"] = (c.vocab_size, c.num_experts_per_tok)
    else:
        shapes[f"{prefix}.gate.bias"] = (n_experts,)
    for expert in [f"experts.{e}" for e in range(n_experts)] + ["shared_experts"]:
        shapes[f"{prefix}.{expert}.w1.weight"] = (n_inner, d)
        shapes[f"{prefix}.{expert}.w3.weight"] = (n_inner, d)
        shapes[f"{prefix}.{expert}.w2.weight"] = (d, n_inner)
    return shapes
