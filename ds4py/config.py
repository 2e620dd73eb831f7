"""What a DeepSeek V4 checkpoint says about itself: config.json, checked, and the layer schedule.

Attribute names are the keys of config.json. A key that could change the mathematics and is not
understood is an error; keys that cannot are listed in `HARMLESS`. Knows nothing of machines.
Source: config.json of DeepSeek-V4-Flash and -Pro, and their inference/model.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds4py.errors import ConfigError

OVERLAP_RATIO = 4
"""The one ratio whose compressor overlaps two windows and whose layer has an indexer."""

FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v4",),
    "attention_bias": (False,),
    "hidden_act": ("silu",),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "tie_word_embeddings": (False,),
    "topk_method": ("noaux_tc",),
    "expert_dtype": ("fp4", "fp8"),
}
"""Keys with the only values this engine computes. Absent is fine: the family has no other value."""

HARMLESS = frozenset(
    {
        "architectures",
        "attention_dropout",
        "initializer_range",
        "torch_dtype",
        "dtype",
        "use_cache",
        "transformers_version",
        "pad_token_id",
        "_name_or_path",
        "quantization_config",
        "id2label",
        "label2id",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "tokenizer_class",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "problem_type",
        "mlp_bias",
    }
)
"""Keys that say nothing about inference mathematics (quantization_config is checked apart)."""

CHECKED_APART = frozenset(
    {
        "compress_ratios",
        "rope_scaling",
        "layer_types",
        "compress_rate_csa",
        "compress_rate_hca",
        "num_nextn_predict_layers",
    }
)

INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_hash_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
)
MAY_BE_ZERO = frozenset({"num_hash_layers", "bos_token_id", "eos_token_id"})

FLOATS = (
    "rms_norm_eps",
    "hc_eps",
    "rope_theta",
    "compress_rope_theta",
    "routed_scaling_factor",
    "swiglu_limit",
)

LAYER_TYPES = {
    "sliding_attention": lambda ratio: ratio == 0,
    "compressed_sparse_attention": lambda ratio: ratio == OVERLAP_RATIO,
    "heavily_compressed_attention": lambda ratio: ratio > OVERLAP_RATIO,
}


@dataclass(frozen=True)
class RopeScaling:
    """YaRN parameters; applied in compressed layers only, always on, no attention factor."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LayerPlan:
    """What kind of layer stands at one depth."""

    index: int
    """Depth in the main model; `num_hidden_layers` + i for draft layer i."""
    ratio: int
    """Tokens pooled into one compressed row; 0 = sliding window only."""
    hash_routed: bool
    """Experts come from the token id's table instead of the router's scores."""

    @property
    def compressed(self) -> bool:
        return self.ratio > 0

    @property
    def indexed(self) -> bool:
        """Whether a query sees only the compressed rows its indexer selects."""
        return self.ratio == OVERLAP_RATIO

    @property
    def overlap(self) -> int:
        """How many windows one compressed row pools over: 2 for ratio 4, else 1."""
        return 2 if self.ratio == OVERLAP_RATIO else 1

    @property
    def kind(self) -> str:
        if not self.compressed:
            return "sliding"
        return "indexed" if self.indexed else "pooled"


@dataclass(frozen=True)
class ModelConfig:
    """One checkpoint's facts. Machine choices and request choices live in `engine/options.py`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_hash_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    hc_mult: int
    hc_sinkhorn_iters: int
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    rms_norm_eps: float
    hc_eps: float
    rope_theta: float
    compress_rope_theta: float
    routed_scaling_factor: float
    swiglu_limit: float
    rope_scaling: RopeScaling
    layers: tuple[LayerPlan, ...]
    """The main model's schedule, one entry per layer."""
    mtp_layers: tuple[LayerPlan, ...] = ()
    """Draft layers of the MTP kind (ratio 0, score-routed); empty when there are none to run."""
    dspark: bool = False
    """The draft tensors are DSpark's: recognised, set aside, not loaded."""
    raw: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """config.json as read."""

    @property
    def nope_head_dim(self) -> int:
        """Channels of a row before the rotated tail."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def longest_context(self) -> int:
        """Most tokens that positions are defined for: those the model was made for, or those its
        RoPE scaling spans, where that is more."""
        scaling = self.rope_scaling
        spanned = int(scaling.factor * scaling.original_max_position_embeddings)
        return max(self.max_position_embeddings, spanned)

    @staticmethod
    def load(directory: Path) -> ModelConfig:
        """Read `directory`/config.json. Raises ConfigError."""
        path = directory / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path} does not exist; a model directory needs DeepSeek's config.json beside "
                "its safetensors files"
            ) from None
        except (OSError, ValueError) as exc:
            raise ConfigError(f"{path} cannot be read as JSON ({exc}); fetch it again") from exc
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a {type(raw).__name__}; it must be a JSON object")
        return ModelConfig.from_dict(raw)

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> ModelConfig:
        """Check every key of a parsed config.json. Raises ConfigError naming key and value."""
        _check_fixed(raw)
        _check_unknown(raw)
        _check_quantization(raw.get("quantization_config"))
        values: dict[str, Any] = {key: _integer(raw, key) for key in INTEGERS}
        values.update({key: _number(raw, key) for key in FLOATS})
        _check_shapes(values)
        dspark = any(key.startswith("dspark_") for key in raw)
        layers, mtp_layers = _schedule(raw, values, dspark)
        return ModelConfig(
            **values,
            rope_scaling=_rope_scaling(raw),
            layers=layers,
            mtp_layers=mtp_layers,
            dspark=dspark,
            raw=dict(raw),
        )


def _check_fixed(raw: dict[str, Any]) -> None:
    if "model_type" not in raw:
        raise ConfigError("config.json has no model_type; this engine runs deepseek_v4 only")
    for key, allowed in FIXED.items():
        if key in raw and raw[key] not in allowed:
            names = " or ".join(map(repr, allowed))
            raise ConfigError(
                f"config.json: {key} is {raw[key]!r}; this engine computes only {names}"
            )


def _check_unknown(raw: dict[str, Any]) -> None:
    known = set(FIXED) | HARMLESS | CHECKED_APART | set(INTEGERS) | set(FLOATS)
    unknown = sorted(k for k in raw if k not in known and not k.startswith("dspark_"))
    if unknown:
        raise ConfigError(
            f"config.json has unknown key {unknown[0]!r} = {raw[unknown[0]]!r}"
            + (f" (and {', '.join(unknown[1:])})" if unknown[1:] else "")
            + "; it may change the mathematics, so the model is not loaded"
        )


def _check_quantization(quantization: Any) -> None:
    """Weights are decoded by their own dtype; this only refuses a scheme we cannot decode."""
    if quantization is None:
        return
    expected: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    if not isinstance(quantization, dict):
        raise ConfigError(f"config.json: quantization_config is {quantization!r}; need an object")
    for key, value in quantization.items():
        if key in expected and value != expected[key]:
            raise ConfigError(
                f"config.json: quantization_config.{key} is {value!r}; this engine decodes only "
                f"{expected[key]!r}"
            )


def _integer(raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    lowest = 0 if key in MAY_BE_ZERO else 1
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        seen = "missing" if key not in raw else repr(value)
        raise ConfigError(f"config.json: {key} is {seen}; need an integer >= {lowest}")
    return value


def _number(raw: dict[str, Any], key: str) -> float:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        seen = "missing" if key not in raw else repr(value)
        raise ConfigError(f"config.json: {key} is {seen}; need a number > 0")
    return float(value)


def _check_shapes(v: dict[str, Any]) -> None:
    def need(ok: bool, seen: str, rule: str) -> None:
        if not ok:
            raise ConfigError(f"config.json: {seen}; need {rule}")

    heads, groups, rope = v["num_attention_heads"], v["o_groups"], v["qk_rope_head_dim"]
    need(heads % groups == 0, f"{heads} attention heads in {groups} o_groups", "equal groups")
    need(rope % 2 == 0, f"qk_rope_head_dim is {rope}", "an even number")
    need(rope <= v["head_dim"], f"head_dim is {v['head_dim']}", f"at least qk_rope_head_dim {rope}")
    need(
        rope <= v["index_head_dim"], f"index_head_dim is {v['index_head_dim']}", f"at least {rope}"
    )
    need(
        v["num_experts_per_tok"] <= v["n_routed_experts"],
        f"num_experts_per_tok is {v['num_experts_per_tok']}",
        f"at most n_routed_experts {v['n_routed_experts']}",
    )
    for key in ("bos_token_id", "eos_token_id"):
        need(v[key] < v["vocab_size"], f"{key} is {v[key]}", f"an id below {v['vocab_size']}")


def _rope_scaling(raw: dict[str, Any]) -> RopeScaling:
    scaling = raw.get("rope_scaling")
    if not isinstance(scaling, dict):
        raise ConfigError(f"config.json: rope_scaling is {scaling!r}; need the yarn parameters")
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"config.json: rope_scaling.type is {kind!r}; only 'yarn' is computed")
    known = {
        "type",
        "rope_type",
        "factor",
        "beta_fast",
        "beta_slow",
        "original_max_position_embeddings",
    }
    unknown = sorted(set(scaling) - known)
    if unknown:
        raise ConfigError(
            f"config.json: rope_scaling.{unknown[0]} = {scaling[unknown[0]]!r} is not understood; "
            "V4 uses no mscale or attention factor"
        )
    return RopeScaling(
        factor=_number(scaling, "factor"),
        beta_fast=_number(scaling, "beta_fast"),
        beta_slow=_number(scaling, "beta_slow"),
        original_max_position_embeddings=_integer(scaling, "original_max_position_embeddings"),
    )


def _schedule(
    raw: dict[str, Any], v: dict[str, Any], dspark: bool
) -> tuple[tuple[LayerPlan, ...], tuple[LayerPlan, ...]]:
    """compress_ratios -> plans of the main layers and of the MTP layers."""
    n_layers, ratios = v["num_hidden_layers"], raw.get("compress_ratios")
    n_draft = raw.get("num_nextn_predict_layers", 0)
    if isinstance(n_draft, bool) or not isinstance(n_draft, int) or n_draft < 0:
        raise ConfigError(
            f"config.json: num_nextn_predict_layers is {n_draft!r}; need an integer >= 0"
        )
    if not isinstance(ratios, list) or not all(type(r) is int for r in ratios):
        raise ConfigError(f"config.json: compress_ratios is {ratios!r}; need a list of integers")
    draft_ratios = ratios[n_layers:]
    if len(ratios) < n_layers or (not dspark and len(draft_ratios) not in (0, n_draft)):
        raise ConfigError(
            f"config.json: compress_ratios has {len(ratios)} entries; need one for each of "
            f"{n_layers} layers and {n_draft} draft layers"
        )
    for i, ratio in enumerate(ratios):
        if ratio != 0 and ratio < OVERLAP_RATIO:
            raise ConfigError(f"config.json: compress_ratios[{i}] is {ratio}; need 0 or >= 4")
    if any(draft_ratios):
        raise ConfigError(f"config.json: draft layers have ratios {draft_ratios}; need 0")
    layers = tuple(
        LayerPlan(i, ratio, hash_routed=i < v["num_hash_layers"])
        for i, ratio in enumerate(ratios[:n_layers])
    )
    _check_layer_types(raw, layers)
    n_mtp = 0 if dspark else n_draft
    return layers, tuple(LayerPlan(n_layers + i, 0, hash_routed=False) for i in range(n_mtp))


def _check_layer_types(raw: dict[str, Any], layers: tuple[LayerPlan, ...]) -> None:
    """Other programs' restatements of the schedule must say the same as compress_ratios."""
    types = raw.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) < len(layers):
            raise ConfigError(f"config.json: layer_types is {types!r}; need one per layer")
        for plan, name in zip(layers, types, strict=False):
            if name not in LAYER_TYPES or not LAYER_TYPES[name](plan.ratio):
                raise ConfigError(
                    f"config.json: layer_types[{plan.index}] is {name!r} but compress_ratios says "
                    f"{plan.ratio}"
                )
    for key, indexed in (("compress_rate_csa", True), ("compress_rate_hca", False)):
        for plan in layers:
            concerned = plan.compressed and plan.indexed == indexed
            if concerned and raw.get(key, plan.ratio) != plan.ratio:
                raise ConfigError(
                    f"config.json: {key} is {raw[key]!r} but compress_ratios[{plan.index}] is "
                    f"{plan.ratio}"
                )
