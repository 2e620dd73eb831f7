"""Small random DeepSeek V4 models: their config.json, their tensors, their tokens.

Everything is drawn with numpy, so a set can be made again anywhere from its preset and seed. The
scales are chosen so that every selection (router, indexer) and every mixing weight is spread out:
a random model with small weights would pass with half of its parts missing. Knows nothing of
how a model computes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Config = dict[str, Any]
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Preset:
    """One schedule and its sizes. `ratios` has one entry per main layer, without the MTP's 0."""

    ratios: tuple[int, ...]
    tokens: int
    window: int = 24
    topk: int = 8
    hidden: int = 64
    inner: int = 48
    experts: int = 12
    experts_used: int = 3
    heads: int = 4
    groups: int = 2
    lora: int = 32
    vocab: int = 512
    scaling: float = 1.5
    head_dim: int = 128


PRESETS = {
    # the schedule and the ratios of V4-Flash's first layers
    "flashlike": Preset((0, 0, 4, 128, 4, 128, 4), 420, window=128, topk=16),
    # small ratios: a short sequence closes many blocks and wraps the window many times
    "fast": Preset((0, 0, 4, 16, 4, 16, 4), 150),
    # as V4-Pro: no sliding-only layer, the first two are of the high ratio
    "prolike": Preset((16, 16, 4, 16, 4, 16), 150, scaling=2.5),
    # two high ratios, neither a power of two, with a sliding layer in between
    "mixed": Preset((24, 4, 7, 0, 4, 24, 7), 130, window=20, topk=5),
}
SMALL: dict[str, Any] = {
    "hidden": 32,
    "inner": 32,
    "experts": 5,
    "experts_used": 2,
    "lora": 8,
    "vocab": 96,
}
# The same schedules at sizes that fit in a repository; heads as wide as the released models'.
PRESETS |= {
    "wide": Preset((4, 0, 16, 4), 70, 20, 5, head_dim=512, **SMALL | {"vocab": 512}),
    "flashlike-small": replace(PRESETS["flashlike"], tokens=280, **SMALL),
    "fast-small": replace(PRESETS["fast"], **SMALL),
    "prolike-small": replace(PRESETS["prolike"], **{**SMALL, "heads": 6, "groups": 3}),
}


def config(preset: Preset) -> Config:
    """config.json with exactly the keys of DeepSeek's own."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": preset.head_dim,
        "qk_rope_head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": preset.hidden,
        # 16 heads, so that a score of exactly zero (every relu closed) is rare
        "index_head_dim": 128,
        "index_n_heads": 16,
        "index_topk": preset.topk,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": preset.inner,
        "n_routed_experts": preset.experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": preset.heads,
        "num_experts_per_tok": preset.experts_used,
        "num_hidden_layers": len(preset.ratios),
        "num_hash_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": preset.groups,
        "o_lora_rank": preset.lora,
        "q_lora_rank": preset.lora,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": preset.scaling,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": preset.window,
        "swiglu_limit": 2.0,  # small, so that the clamp acts
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": preset.vocab,
        "compress_rope_theta": 160000,
        "compress_ratios": [*preset.ratios, 0],
    }


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, under DeepSeek's names."""
    hidden, streams = c["hidden_size"], c["hc_mult"]
    head: dict[str, tuple[int, ...]] = {
        "hc_head_fn": (streams, streams * hidden),
        "hc_head_base": (streams,),
        "hc_head_scale": (1,),
        "norm.weight": (hidden,),
    }
    found = {"embed.weight": (c["vocab_size"], hidden), "head.weight": (c["vocab_size"], hidden)}
    found |= head
    for number, ratio in enumerate(c["compress_ratios"][: c["num_hidden_layers"]]):
        layer = block_shapes(c, ratio, number < c["num_hash_layers"])
        found |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    mtp = block_shapes(c, 0, hashed=False) | head
    mtp |= {"e_proj.weight": (hidden, hidden), "h_proj.weight": (hidden, hidden)}
    mtp |= {"enorm.weight": (hidden,), "hnorm.weight": (hidden,)}
    return found | {f"mtp.0.{name}": shape for name, shape in mtp.items()}


def block_shapes(c: Config, ratio: int, hashed: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer, names without its prefix."""
    hidden, streams, rank = c["hidden_size"], c["hc_mult"], c["q_lora_rank"]
    mixes = (2 + streams) * streams
    heads_dim, groups = c["num_attention_heads"] * c["head_dim"], c["o_groups"]
    found: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attn.wq_a.weight": (rank, hidden),
        "attn.q_norm.weight": (rank,),
        "attn.wq_b.weight": (heads_dim, rank),
        "attn.wkv.weight": (c["head_dim"], hidden),
        "attn.kv_norm.weight": (c["head_dim"],),
        "attn.attn_sink": (c["num_attention_heads"],),
        "attn.wo_a.weight": (groups * c["o_lora_rank"], heads_dim // groups),
        "attn.wo_b.weight": (hidden, groups * c["o_lora_rank"]),
        "ffn.gate.weight": (c["n_routed_experts"], hidden),
    }
    for site in ("attn", "ffn"):
        found[f"hc_{site}_fn"] = (mixes, streams * hidden)
        found[f"hc_{site}_base"] = (mixes,)
        found[f"hc_{site}_scale"] = (3,)
    if ratio:
        found |= compressor_shapes("attn.compressor", ratio, c["head_dim"], hidden)
    if ratio == 4:
        index = c["index_head_dim"]
        found |= compressor_shapes("attn.indexer.compressor", ratio, index, hidden)
        found["attn.indexer.wq_b.weight"] = (c["index_n_heads"] * index, rank)
        found["attn.indexer.weights_proj.weight"] = (c["index_n_heads"], hidden)
    if hashed:
        found["ffn.gate.tid2eid"] = (c["vocab_size"], c["num_experts_per_tok"])
    else:
        found["ffn.gate.bias"] = (c["n_routed_experts"],)
    for expert in [f"experts.{e}" for e in range(c["n_routed_experts"])] + ["shared_experts"]:
        found[f"ffn.{expert}.w1.weight"] = (c["moe_intermediate_size"], hidden)
        found[f"ffn.{expert}.w2.weight"] = (hidden, c["moe_intermediate_size"])
        found[f"ffn.{expert}.w3.weight"] = (c["moe_intermediate_size"], hidden)
    return found


def compressor_shapes(prefix: str, ratio: int, dim: int, hidden: int) -> dict[str, tuple[int, ...]]:
    width = 2 * dim if ratio == 4 else dim  # ratio 4 pools two overlapping series
    return {
        f"{prefix}.wkv.weight": (width, hidden),
        f"{prefix}.wgate.weight": (width, hidden),
        f"{prefix}.ape": (ratio, width),
        f"{prefix}.norm.weight": (dim,),
    }


# Name pattern -> (standard deviation, mean); None: divide 1.2 by the square root of the inputs.
SCALES: tuple[tuple[str, float | None, float], ...] = (
    (r"norm\.weight$", 0.15, 1.0),
    (r"^embed\.weight$", 1.0, 0.0),
    (r"gate\.bias$", 0.3, 0.0),
    (r"attn_sink$", 1.0, 0.0),
    (r"\.ape$", 0.7, 0.0),
    (r"_base$", 0.6, 0.0),
    (r"_scale$", 0.2, 1.0),
    (r"", None, 0.0),
)
# Selections need a wider spread than the plain projections.
GAINS = ((r"^head\.weight$", 2.0), (r"ffn\.gate\.weight$", 1.5), (r"experts\.\d+\.w[13]", 1.4))


def draw(c: Config, seed: int) -> Iterator[tuple[str, NDArray[Any]]]:
    """Name and values of every tensor: float32, the token-to-expert tables int64."""
    random = np.random.default_rng(seed)
    for name, shape in shapes(c).items():
        if name.endswith("tid2eid"):
            rows = [random.permutation(c["n_routed_experts"])[: shape[1]] for _ in range(shape[0])]
            yield name, np.array(rows, np.int64)
            continue
        _, spread, mean = next(row for row in SCALES if re.search(row[0], name))
        if spread is None:
            gain = next((g for pattern, g in GAINS if re.search(pattern, name)), 1.2)
            spread = gain / math.sqrt(shape[-1])
        values = random.standard_normal(shape) * spread + mean
        if name.endswith(("hc_attn_base", "hc_ffn_base")):
            # some preference for the own stream, as after training
            values[2 * c["hc_mult"] :] += 1.5 * np.eye(c["hc_mult"]).ravel()
        yield name, values.astype(np.float32)


def tokens(c: Config, count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 1]).integers(0, c["vocab_size"], count)
