"""The metadata of a GGUF file made for DeepSeek V4 <-> ModelConfig, every key checked.

A key that is missing, contradicts the tensors or asks for what this engine does not compute is an
error that names the key, its value and the value needed. The sizes themselves are free: a smaller
relative opens as well. Source: the files of antirez/ds4, which the layout was made for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from ds4py.config import ModelConfig
from ds4py.errors import ConfigError, WeightsError
from ds4py.formats.gguf import ALIGNMENT, GGUF, Field, TensorInfo
from ds4py.text.messages import BOS, EOS

ARCHITECTURE = "deepseek4"
PREFIX = f"{ARCHITECTURE}."

COUNTS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.key_length": "head_dim",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.output_lora_rank": "o_lora_rank",
    "attention.output_group_count": "o_groups",
    "attention.sliding_window": "sliding_window",
    "attention.indexer.head_count": "index_n_heads",
    "attention.indexer.key_length": "index_head_dim",
    "attention.indexer.top_k": "index_topk",
    "rope.dimension_count": "qk_rope_head_dim",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "expert_count": "n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "hash_layer_count": "num_hash_layers",
    "hyper_connection.count": "hc_mult",
    "hyper_connection.sinkhorn_iterations": "hc_sinkhorn_iters",
}
"""Keys of whole numbers, and what config.json calls them."""
WIDE_COUNTS = ("context_length", "rope.scaling.original_context_length")
"""Those written as u64; the others are u32."""

NUMBERS = {
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.compress_rope_freq_base": "compress_rope_theta",
    "rope.freq_base": "rope_theta",
    "rope.scaling.factor": "factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "expert_weights_scale": "routed_scaling_factor",
    "hyper_connection.epsilon": "hc_eps",
}
"""Keys of positive numbers, f32."""
SCALING = {"factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}

RATIOS, CLAMP = "attention.compress_ratios", "swiglu_clamp_exp"
DRAFT_LAYERS = "nextn_predict_layers"

FIXED: dict[str, Any] = {
    "attention.head_count_kv": 1,
    "expert_shared_count": 1,
    "expert_weights_norm": True,
}
"""Keys with the only value this engine computes."""
FIXED_IF_PRESENT: dict[str, Any] = {
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "expert_gating_func": 4,  # ggml's number of sqrt(softplus(x))
    "leading_dense_block_count": 0,
    "rope.scaling.type": "yarn",
}
"""Keys that other writers add, as far as they say what is so anyhow."""
CHECKED_APART = {RATIOS, CLAMP, DRAFT_LAYERS, "attention.value_length", "swiglu_clamp_shexp"}

BOS_KEY, EOS_KEY = "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"
TOKENS_KEY = "tokenizer.ggml.tokens"

SIZED_BY = (
    ("embedding_length", "token_embd.weight", 0),
    ("vocab_size", "token_embd.weight", 1),
    ("hyper_connection.count", "output_hc_base.weight", 0),
    ("attention.head_count", ".attn_sinks.weight", 0),
    ("attention.key_length", ".attn_kv.weight", 1),
    ("attention.q_lora_rank", ".attn_q_a.weight", 1),
    ("attention.indexer.head_count", ".indexer.proj.weight", 1),
    ("attention.indexer.key_length", ".indexer_compressor_norm.weight", 0),
    ("expert_count", ".ffn_gate_exps.weight", 2),
    ("expert_feed_forward_length", ".ffn_gate_exps.weight", 1),
    ("expert_used_count", ".ffn_gate_tid2eid.weight", 0),
)
"""Which tensor (the first whose name ends so) shows a key's value, in which of its dims."""


def config_of(file: GGUF) -> ModelConfig:
    """The model's config. Raises ConfigError or WeightsError naming key or tensor."""
    _check_file(file)
    raw: dict[str, Any] = {"model_type": "deepseek_v4"}
    raw |= {name: _count(file, key) for key, name in COUNTS.items()}
    raw |= {name: _number(file, key) for key, name in NUMBERS.items()}
    raw["rope_scaling"] = {"type": "yarn", **{name: raw.pop(name) for name in sorted(SCALING)}}
    _check_sizes(file, raw)
    raw["swiglu_limit"] = _clamp(file, CLAMP, raw["num_hidden_layers"])
    _check_fixed(file, raw)
    raw["compress_ratios"] = _ratios(file, raw["num_hidden_layers"])
    raw["bos_token_id"], raw["eos_token_id"] = _ends(file)
    raw |= _draft(file)
    try:
        return ModelConfig.from_dict(raw)
    except ConfigError as exc:
        raise ConfigError(_in_own_words(file, str(exc))) from exc


def is_dspark(file: GGUF) -> bool:
    """Whether draft tensors in the file are DSpark's, which are set aside."""
    return any("dspark" in key for key in file.metadata) or any(
        name.startswith("mtp.") and re.search(r"\.(main_proj|markov_head)\.", name)
        for name in file.tensors
    )


def metadata_of(config: ModelConfig, name: str) -> dict[str, Field]:
    """The model's part of a file's metadata; the tokenizer's part comes from `gguf_tokenizer`."""
    values = {**vars(config), **vars(config.rope_scaling)}
    fields = {
        "general.architecture": Field("string", ARCHITECTURE),
        "general.name": Field("string", name),
        "general.alignment": Field("u32", ALIGNMENT),
    }
    for key, item in COUNTS.items():
        kind = "u64" if key in WIDE_COUNTS else "u32"
        fields[PREFIX + key] = Field(kind, values[item])
    for key, item in NUMBERS.items():
        fields[PREFIX + key] = Field("f32", values[item])
    for key, value in FIXED.items():
        fields[PREFIX + key] = Field("bool" if value is True else "u32", value)
    fields[PREFIX + "attention.value_length"] = Field("u32", config.head_dim)
    for key in ("expert_group_count", "expert_group_used_count"):
        fields[PREFIX + key] = Field("u32", 0)
    ratios = [plan.ratio for plan in config.layers]
    fields[PREFIX + RATIOS] = Field("u32[]", ratios)
    fields[PREFIX + CLAMP] = Field("f32[]", [config.swiglu_limit] * len(ratios))
    return fields


def _check_file(file: GGUF) -> None:
    """What kind of file it is, and that no key goes unread."""
    kind = file.metadata.get("general.architecture")
    if kind is None or kind.value != ARCHITECTURE:
        seen = "missing" if kind is None else repr(kind.value)
        raise ConfigError(
            f"{file.path}: general.architecture is {seen}; this engine runs {ARCHITECTURE!r} only"
        )
    parts = file.metadata.get("split.count")
    if parts is not None and parts.value > 1:
        raise ConfigError(
            f"{file.path}: split.count is {parts.value}; join the parts into one file first, with "
            "llama-gguf-split --merge"
        )
    if file.tensors and not any(name.startswith("blk.") for name in file.tensors):
        raise WeightsError(
            f"{file.path} has no blk.* tensor: it holds a draft layer or a part of a model; open "
            "the main file"
        )
    known = {*COUNTS, *NUMBERS, *FIXED, *FIXED_IF_PRESENT, *CHECKED_APART}
    for key, field in file.metadata.items():
        own = key.removeprefix(PREFIX)
        if own != key and own not in known and not own.startswith("dspark"):
            raise ConfigError(
                f"{file.path} has the unknown key {_short(key)} = {_short(field.value)}; it may "
                "change the mathematics, so the model is not loaded"
            )


def _get(file: GGUF, key: str, kinds: str, need: str) -> Any:
    """A key's value, if its kind is among `kinds`."""
    field = file.metadata.get(PREFIX + key)
    if field is None or field.kind not in kinds.split():
        raise _refused(file, key, field, need)
    return field.value


def _refused(file: GGUF, key: str, field: Field | None, need: str) -> ConfigError:
    seen = "missing" if field is None else f"{field.kind} {_short(field.value)}"
    return ConfigError(f"{file.path}: {PREFIX}{key} is {seen}; need {need}")


def _count(file: GGUF, key: str) -> int:
    lowest = 0 if key == "hash_layer_count" else 1
    need = f"a whole number, {lowest} or more"
    value = int(_get(file, key, "u8 u16 u32 u64 i8 i16 i32 i64", need))
    if value < lowest:
        raise _refused(file, key, file.metadata[PREFIX + key], need)
    return value


def _number(file: GGUF, key: str) -> float:
    need = "a number above 0"
    value = _get(file, key, "f32 f64", need)
    if not 0 < value < 1e30:
        raise _refused(file, key, file.metadata[PREFIX + key], need)
    return _decimal(value)


def _decimal(value: float) -> float:
    """The shortest decimal a float32 stands for: 1e-6, not 9.99999997e-07."""
    return float(str(np.float32(value)))


def _clamp(file: GGUF, key: str, n_layers: int) -> float:
    """One value for all layers, which is what config.json can say."""
    need = f"an array of one and the same number for each of {n_layers} layers"
    values = np.asarray(_get(file, key, "f32[] f64[]", need), np.float64)[:n_layers]
    if len(values) < n_layers or not np.isfinite(values).all() or not (values > 0).all():
        raise _refused(file, key, file.metadata[PREFIX + key], need)
    if not np.allclose(values, values[0], rtol=1e-6, atol=0):
        raise _refused(file, key, file.metadata[PREFIX + key], need)
    return _decimal(float(values[0]))


def _check_fixed(file: GGUF, raw: dict[str, Any]) -> None:
    same = {"attention.value_length": raw["head_dim"]}
    for key, needed in {**FIXED, **FIXED_IF_PRESENT, **same}.items():
        field = file.metadata.get(PREFIX + key)
        if field is None and key in FIXED_IF_PRESENT:
            continue
        if (
            field is None
            or field.value != needed
            or isinstance(field.value, bool) != (isinstance(needed, bool))
        ):
            raise _refused(file, key, field, repr(needed))
    if PREFIX + "swiglu_clamp_shexp" in file.metadata:
        shared = _clamp(file, "swiglu_clamp_shexp", raw["num_hidden_layers"])
        if not math.isclose(shared, raw["swiglu_limit"], rel_tol=1e-6):
            field = file.metadata[PREFIX + "swiglu_clamp_shexp"]
            raise _refused(file, "swiglu_clamp_shexp", field, f"that of {CLAMP}")
    if raw["sliding_window"] > raw["max_position_embeddings"]:
        field = file.metadata[PREFIX + "attention.sliding_window"]
        raise _refused(file, "attention.sliding_window", field, f"at most {PREFIX}context_length")


def _check_sizes(file: GGUF, raw: dict[str, Any]) -> None:
    """Keys against the tensors that show their values."""
    for key, tensor, shown in (*_seen_in_tensors(file), *_seen_in_groups(file, raw)):
        value = raw[COUNTS[key]]
        if value != shown:
            raise ConfigError(
                f"{file.path}: {PREFIX}{key} is {value}, but {tensor} shows {shown}; need {shown}"
            )


def _seen_in_tensors(file: GGUF) -> Iterator[tuple[str, str, int]]:
    """(key, what shows it, value)."""
    for key, ending, dim in SIZED_BY:
        for tensor in file.tensors.values():
            if tensor.name.endswith(ending) and dim < len(tensor.dims):
                yield key, f"{tensor.name} {tensor.type}{list(tensor.dims)}", tensor.dims[dim]
                break
    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    hashed = sum(name.endswith(".ffn_gate_tid2eid.weight") for name in file.tensors)
    yield "block_count", "the number of different blk.N", len(layers)
    yield "hash_layer_count", "the number of ffn_gate_tid2eid.weight", hashed


def _seen_in_groups(file: GGUF, raw: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """As above, of the grouped output projection [heads of a group, ranks of all groups]."""
    heads = raw["num_attention_heads"] * raw["head_dim"]
    for tensor in file.tensors.values():
        if tensor.name.endswith(".attn_output_a.weight") and len(tensor.dims) == 2:
            groups = max(heads // tensor.dims[0], 1)
            shown = f"{tensor.name} {tensor.type}{list(tensor.dims)}"
            yield "attention.output_group_count", shown, groups
            yield "attention.output_lora_rank", shown, tensor.dims[1] // groups
            break


def _ratios(file: GGUF, n_layers: int) -> list[int]:
    """One for each layer; entries behind those belong to draft layers, which have none."""
    need = f"an array of at least {n_layers} whole numbers, those behind them 0"
    values = [int(v) for v in _get(file, RATIOS, "u32[] i32[]", need)]
    if len(values) < n_layers or min(values) < 0 or any(values[n_layers:]):
        raise _refused(file, RATIOS, file.metadata[PREFIX + RATIOS], need)
    for layer, ratio in enumerate(values[:n_layers]):
        bias = file.tensors.get(f"blk.{layer}.attn_compressor_ape.weight")
        shown = _ratio_of(bias)
        if shown is not None and shown != ratio:
            seen = "has no compressor" if bias is None else f"has {bias.name}{list(bias.dims)}"
            raise ConfigError(
                f"{file.path}: {PREFIX}{RATIOS}[{layer}] is {ratio}, but the layer {seen}; need "
                f"{shown}"
            )
    return values[:n_layers]


def _ratio_of(bias: TensorInfo | None) -> int | None:
    """None where the tensor itself is malformed, which is reported as such."""
    if bias is None:
        return 0
    return bias.dims[1] if len(bias.dims) == 2 else None


def _ends(file: GGUF) -> tuple[int, int]:
    """The ids of the tokens that begin and end a text."""
    found = []
    tokens = file.metadata.get(TOKENS_KEY, Field("string[]", [])).value
    for key, text in ((BOS_KEY, BOS), (EOS_KEY, EOS)):
        field = file.metadata.get(key)
        if field is not None and field.kind not in ("u32", "i32", "u64"):
            raise ConfigError(f"{file.path}: {key} is {field.kind}; need a u32")
        if field is None and text not in tokens:
            raise ConfigError(
                f"{file.path}: {key} is missing and {TOKENS_KEY} has no {text}; need one of them"
            )
        found.append(tokens.index(text) if field is None else int(field.value))
    return found[0], found[1]


def _draft(file: GGUF) -> dict[str, Any]:
    """config.json's keys of draft layers. A main file may name one that lies in another file."""
    if is_dspark(file):
        return {"dspark_layers": True}
    named = PREFIX + DRAFT_LAYERS in file.metadata
    field = file.metadata.get(PREFIX + DRAFT_LAYERS, Field("u32", 1))
    if type(field.value) is not int or field.value not in (0, 1):
        raise _refused(file, DRAFT_LAYERS, field, "0 or 1")
    inside = any(name.startswith("mtp.") for name in file.tensors)
    if named and inside and not field.value:
        raise _refused(file, DRAFT_LAYERS, field, "1, as the file has mtp.* tensors")
    return {"num_nextn_predict_layers": field.value}


def _in_own_words(file: GGUF, message: str) -> str:
    """A message about config.json, in the file's names."""
    own = {name: PREFIX + key for key, name in {**COUNTS, **NUMBERS}.items()}
    own |= {"compress_ratios": PREFIX + RATIOS, "swiglu_limit": PREFIX + CLAMP}
    own |= {"bos_token_id": BOS_KEY, "eos_token_id": EOS_KEY, "config.json": str(file.path)}
    found = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in own))
    return found.sub(lambda match: own[match[0]], message)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = repr(text)[1:-1].replace("\\n", " ")
    return text if len(text) <= 80 else text[:80] + "..."
