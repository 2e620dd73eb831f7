"""The contract of V4's GGUF files: keys, tensors, and an error that names each deviation.

Names, sizes and types are written out from the description of antirez/ds4's files, not taken from
the package's tables. Files are made in memory: no test here reads a weight.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4py.config import ModelConfig
from ds4py.errors import ConfigError, InputError, TokenizerError, WeightsError
from ds4py.formats.gguf import GGUF, Field, TensorInfo, size_of
from ds4py.text.messages import BOS, CONTROL_TOKENS, EOS
from ds4py.text.tokenizer import byte_alphabet
from ds4py.weights.gguf import GGUFCheckpoint, slots
from ds4py.weights.gguf_config import config_of, metadata_of
from ds4py.weights.gguf_tokenizer import tokenizer_of

FLASH = Path(__file__).parent / "data" / "configs" / "flash.json"

METADATA: dict[str, tuple[str, Any]] = {
    "general.architecture": ("string", "deepseek4"),
    "general.alignment": ("u32", 32),
    "deepseek4.block_count": ("u32", 43),
    "deepseek4.context_length": ("u64", 1048576),
    "deepseek4.embedding_length": ("u32", 4096),
    "deepseek4.vocab_size": ("u32", 129280),
    "deepseek4.attention.head_count": ("u32", 64),
    "deepseek4.attention.head_count_kv": ("u32", 1),
    "deepseek4.attention.key_length": ("u32", 512),
    "deepseek4.attention.value_length": ("u32", 512),
    "deepseek4.rope.dimension_count": ("u32", 64),
    "deepseek4.attention.q_lora_rank": ("u32", 1024),
    "deepseek4.attention.output_lora_rank": ("u32", 1024),
    "deepseek4.attention.output_group_count": ("u32", 8),
    "deepseek4.expert_count": ("u32", 256),
    "deepseek4.expert_used_count": ("u32", 6),
    "deepseek4.expert_shared_count": ("u32", 1),
    "deepseek4.expert_feed_forward_length": ("u32", 2048),
    "deepseek4.expert_group_count": ("u32", 0),
    "deepseek4.expert_group_used_count": ("u32", 0),
    "deepseek4.hash_layer_count": ("u32", 3),
    "deepseek4.attention.sliding_window": ("u32", 128),
    "deepseek4.attention.indexer.head_count": ("u32", 64),
    "deepseek4.attention.indexer.key_length": ("u32", 128),
    "deepseek4.attention.indexer.top_k": ("u32", 512),
    "deepseek4.hyper_connection.count": ("u32", 4),
    "deepseek4.hyper_connection.sinkhorn_iterations": ("u32", 20),
    "deepseek4.hyper_connection.epsilon": ("f32", 1e-6),
    "deepseek4.attention.compress_ratios": ("u32[]", [0, 0] + [4, 128] * 20 + [4]),
    "deepseek4.swiglu_clamp_exp": ("f32[]", [10.0] * 43),
    "deepseek4.rope.freq_base": ("f32", 10000),
    "deepseek4.attention.compress_rope_freq_base": ("f32", 160000),
    "deepseek4.rope.scaling.original_context_length": ("u64", 65536),
    "deepseek4.rope.scaling.factor": ("f32", 16),
    "deepseek4.rope.scaling.yarn_beta_fast": ("f32", 32),
    "deepseek4.rope.scaling.yarn_beta_slow": ("f32", 1),
    "deepseek4.expert_weights_scale": ("f32", 1.5),
    "deepseek4.expert_weights_norm": ("bool", True),
    "deepseek4.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
}

# Name -> checkpoint name, usual type, dims, and the layers that have it (C: ratio 4, P: any ratio).
GLOBAL = """
token_embd.weight        embed.weight   F16  4096,129280
output.weight            head.weight    Q8_0 4096,129280
output_norm.weight       norm.weight    F32  4096
output_hc_fn.weight      hc_head_fn     F16  16384,4
output_hc_base.weight    hc_head_base   F32  4
output_hc_scale.weight   hc_head_scale  F32  1
"""
LAYER = """
hc_attn_fn.weight              hc_attn_fn                          F16  16384,24
hc_attn_scale.weight           hc_attn_scale                       F32  3
hc_attn_base.weight            hc_attn_base                        F32  24
hc_ffn_fn.weight               hc_ffn_fn                           F16  16384,24
hc_ffn_scale.weight            hc_ffn_scale                        F32  3
hc_ffn_base.weight             hc_ffn_base                         F32  24
attn_norm.weight               attn_norm.weight                    F32  4096
ffn_norm.weight                ffn_norm.weight                     F32  4096
attn_q_a.weight                attn.wq_a.weight                    Q8_0 4096,1024
attn_q_a_norm.weight           attn.q_norm.weight                  F32  1024
attn_q_b.weight                attn.wq_b.weight                    Q8_0 1024,32768
attn_kv.weight                 attn.wkv.weight                     Q8_0 4096,512
attn_kv_a_norm.weight          attn.kv_norm.weight                 F32  512
attn_sinks.weight              attn.attn_sink                      F32  64
attn_output_a.weight           attn.wo_a.weight                    Q8_0 4096,8192
attn_output_b.weight           attn.wo_b.weight                    Q8_0 8192,4096
ffn_gate_inp.weight            ffn.gate.weight                     F16  4096,256
ffn_gate_exps.weight           ffn.experts.*.w1.weight             IQ2_XXS 4096,2048,256
ffn_up_exps.weight             ffn.experts.*.w3.weight             IQ2_XXS 4096,2048,256
ffn_down_exps.weight           ffn.experts.*.w2.weight             Q2_K 2048,4096,256
ffn_gate_shexp.weight          ffn.shared_experts.w1.weight        Q8_0 4096,2048
ffn_up_shexp.weight            ffn.shared_experts.w3.weight        Q8_0 4096,2048
ffn_down_shexp.weight          ffn.shared_experts.w2.weight        Q8_0 2048,4096
"""
POOLED = """
attn_compressor_kv.weight      attn.compressor.wkv.weight          F16  4096,W
attn_compressor_gate.weight    attn.compressor.wgate.weight        F16  4096,W
attn_compressor_ape.weight     attn.compressor.ape                 F16  W,R
attn_compressor_norm.weight    attn.compressor.norm.weight         F32  512
"""
INDEXED = """
indexer.attn_q_b.weight        attn.indexer.wq_b.weight            F16  1024,8192
indexer.proj.weight            attn.indexer.weights_proj.weight    F16  4096,64
indexer_compressor_ape.weight  attn.indexer.compressor.ape         F16  256,4
indexer_compressor_kv.weight   attn.indexer.compressor.wkv.weight  F16  4096,256
indexer_compressor_gate.weight attn.indexer.compressor.wgate.weight F16 4096,256
indexer_compressor_norm.weight attn.indexer.compressor.norm.weight F32  128
"""
HASHED = "ffn_gate_tid2eid.weight ffn.gate.tid2eid I32 6,129280\n"
SCORED = "exp_probs_b.bias ffn.gate.bias F32 256\n"
DRAFT = """
e_proj.weight                  e_proj.weight                       Q8_0 4096,4096
h_proj.weight                  h_proj.weight                       Q8_0 4096,4096
enorm.weight                   enorm.weight                        F32  4096
hnorm.weight                   hnorm.weight                        F32  4096
norm.weight                    norm.weight                         F32  4096
hc_head_fn.weight              hc_head_fn                          F16  16384,4
hc_head_base.weight            hc_head_base                        F32  4
hc_head_scale.weight           hc_head_scale                       F32  1
"""
Row = tuple[str, str, tuple[int, ...]]
"""Checkpoint name, type, dims."""


def rows(table: str, ours: str = "", theirs: str = "", ratio: int = 0) -> dict[str, Row]:
    found = {}
    for line in filter(None, table.splitlines()):
        name, held, type_name, dims = line.split()
        sizes = dims.replace("W", "1024" if ratio == 4 else "512").replace("R", str(ratio))
        found[theirs + name] = (ours + held, type_name, tuple(map(int, sizes.split(","))))
    return found


def flash() -> ModelConfig:
    return ModelConfig.from_dict(json.loads(FLASH.read_text()))


def test_tensors_of_flash() -> None:
    """All 1,328, and as many bytes as the released file has behind its header of 5 MB."""
    expected = rows(GLOBAL)
    for layer, ratio in enumerate(METADATA["deepseek4.attention.compress_ratios"][1]):
        tables = LAYER + (POOLED if ratio else "") + (INDEXED if ratio == 4 else "")
        tables += HASHED if layer < 3 else SCORED
        expected |= rows(tables, f"layers.{layer}.", f"blk.{layer}.", ratio)
    found = slots(flash())
    assert len(found) == 1328
    assert {s.name: (s.types[0], s.dims) for s in found} == {
        name: row[1:] for name, row in expected.items()
    }
    for slot in found:
        held = expected[slot.name][0]
        if "*" in held:
            assert slot.holds == tuple(held.replace("*", str(e)) for e in range(256))
        else:
            assert slot.holds == (held,)
    n_bytes = sum(-(-size_of(s.types[0], s.dims) // 32) * 32 for s in found)
    assert 5.2e6 < 86_720_111_488 - n_bytes < 5.4e6


def test_tensors_of_a_draft_layer() -> None:
    expected = rows(LAYER + SCORED + DRAFT, "mtp.0.", "mtp.0.")
    found = slots(flash(), draft=True)
    assert {s.name: (s.types[0], s.dims) for s in found} == {
        name: row[1:] for name, row in expected.items()
    }
    assert {s.name: s.holds[0] for s in found} == {
        name: row[0].replace("*", "0") for name, row in expected.items()
    }


def test_metadata_of_flash() -> None:
    found = metadata_of(flash(), "Flash")
    assert found.pop("general.name") == Field("string", "Flash")
    assert {key: tuple(field) for key, field in found.items()} == METADATA


def tokenizer_fields(vocab_size: int) -> dict[str, Field]:
    tokens = [*CONTROL_TOKENS, *sorted(byte_alphabet()), "ab"]
    tokens += [f"[PAD{i}]" for i in range(vocab_size - len(tokens))]
    kinds = [3] * len(CONTROL_TOKENS) + [1] * 257 + [5] * (vocab_size - len(CONTROL_TOKENS) - 257)
    return {
        "tokenizer.ggml.model": Field("string", "gpt2"),
        "tokenizer.ggml.pre": Field("string", "joyai-llm"),
        "tokenizer.ggml.tokens": Field("string[]", tokens),
        "tokenizer.ggml.token_type": Field("i32[]", np.array(kinds, np.int32)),
        "tokenizer.ggml.merges": Field("string[]", ["a b"]),
        "tokenizer.ggml.bos_token_id": Field("u32", 0),
        "tokenizer.ggml.eos_token_id": Field("u32", 1),
        "tokenizer.chat_template": Field("string", "not used"),
    }


SMALL = """
num_hidden_layers=4 hidden_size=256 vocab_size=300 num_attention_heads=4 head_dim=128 q_lora_rank=32
o_lora_rank=64 o_groups=2 index_n_heads=8 n_routed_experts=5 num_experts_per_tok=2 hc_mult=2
moe_intermediate_size=256 num_nextn_predict_layers=1 num_hash_layers=1
"""


def small_config() -> ModelConfig:
    sizes = {key: int(value) for key, value in (item.split("=") for item in SMALL.split())}
    ratios = {"compress_ratios": [0, 4, 16, 4]}
    return ModelConfig.from_dict(json.loads(FLASH.read_text()) | sizes | ratios)


def small() -> GGUF:
    """A whole file of a small relative, draft layer included; its tensors lie nowhere."""
    config = small_config()
    tensors = {
        s.name: TensorInfo(Path("m.gguf"), s.name, s.types[0], s.dims, 0)
        for s in slots(config) + slots(config, draft=True)
    }
    metadata = metadata_of(config, "small") | tokenizer_fields(config.vocab_size)
    return GGUF(Path("m.gguf"), 3, 32, metadata, tensors)


def open_all(file: GGUF) -> GGUFCheckpoint:
    config = config_of(file)
    tokenizer_of(file, config.vocab_size, config.bos_token_id, config.eos_token_id)
    return GGUFCheckpoint(file, config)


def test_a_small_relative_opens() -> None:
    source = open_all(small())
    assert replace(source.config, raw={}) == replace(small_config(), raw={})
    assert source.has_draft
    part = source.entries["layers.2.ffn.experts.3.w2.weight"]
    assert (part.dtype, part.shape, part.n_bytes) == ("Q2_K", (256, 256), 256 * 84)
    assert (part.tensor.name, part.start) == ("blk.2.ffn_down_exps.weight", 3 * 256 * 84)


def test_metadata_of_other_writers() -> None:
    """What llama.cpp's converters write beside or instead of it."""
    file = small()
    file.metadata.update(
        {
            "general.type": Field("string", "model"),
            "general.file_type": Field("u32", 19),
            "quantize.imatrix.entries_count": Field("u32", 120),
            "deepseek4.context_length": Field("u32", 1048576),
            "deepseek4.rope.scaling.type": Field("string", "yarn"),
            "deepseek4.expert_gating_func": Field("u32", 4),
            "deepseek4.nextn_predict_layers": Field("u32", 1),
            "deepseek4.swiglu_clamp_shexp": Field("f32[]", np.full(4, 10, np.float32)),
            "deepseek4.swiglu_clamp_exp": Field("f64[]", np.full(5, 10.0)),
            "deepseek4.attention.compress_ratios": Field("i32[]", np.array([0, 4, 16, 4, 0])),
            "deepseek4.hyper_connection.epsilon": Field("f32", float(np.float32(1e-6))),
        }
    )
    for key in ("expert_group_count", "expert_group_used_count"):
        del file.metadata[f"deepseek4.{key}"]
    for key in ("bos_token_id", "eos_token_id", "token_type", "model"):
        del file.metadata[f"tokenizer.ggml.{key}"]
    source = open_all(file)
    assert source.config.hc_eps == 1e-6
    assert source.config.max_position_embeddings == 1048576


OPTIONAL = ("deepseek4.expert_group_count", "deepseek4.expert_group_used_count")
REQUIRED = [key for key in METADATA if key.startswith("deepseek4.") and key not in OPTIONAL]


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    file = small()
    del file.metadata[key]
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} is missing; need ") as caught:
        open_all(file)
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


WRONG_COUNTS = (
    *(Field("u32", 2**32 - 1), Field("i32", -1)),
    *(Field("f32", 4.0), Field("bool", True), Field("string", "4\n")),
)
FREE = ("top_k", "sinkhorn_iterations", "context_length")  # as many as one likes
COUNTS = [key for key in REQUIRED if METADATA[key][0] in ("u32", "u64")]


@pytest.mark.parametrize(
    ("key", "field"),
    [(k, f) for k in COUNTS for f in WRONG_COUNTS if not (k.endswith(FREE) and f.kind == "u32")],
    ids=repr,
)
def test_wrong_counts_are_named(key: str, field: Field) -> None:
    file = small()
    file.metadata[key] = field
    with pytest.raises(InputError, match=re.escape(key)) as caught:
        open_all(file)
    assert "need" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [k for k in REQUIRED if METADATA[k][0] == "f32"])
@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan, 4, "1"], ids=str)
def test_wrong_numbers_are_named(key: str, value: Any) -> None:
    file = small()
    kind = {float: "f32", int: "u32", str: "string"}[type(value)]
    file.metadata[key] = Field(kind, value)
    with pytest.raises(ConfigError, match=rf"{re.escape(key)} is {kind}.*; need a number above 0"):
        open_all(file)


OFF_BY_ONE = [
    (key, "shows")
    for key in (
        *("block_count", "embedding_length", "vocab_size", "attention.head_count"),
        *("attention.q_lora_rank", "expert_count", "expert_used_count", "hash_layer_count"),
        *("expert_feed_forward_length", "attention.indexer.head_count", "hyper_connection.count"),
        "attention.indexer.key_length",
    )
]


@pytest.mark.parametrize(("key", "says"), OFF_BY_ONE)
def test_counts_that_the_tensors_contradict(key: str, says: str) -> None:
    file = small()
    right = file.metadata[f"deepseek4.{key}"].value
    file.metadata[f"deepseek4.{key}"] = Field("u32", right + 1)
    if key == "block_count":
        file.metadata["deepseek4.swiglu_clamp_exp"] = Field("f32[]", np.full(9, 10, np.float32))
    named = rf"deepseek4\.{re.escape(key)} is {right + 1}, but .* {says} {right}; need {right}"
    with pytest.raises(ConfigError, match=named):
        open_all(file)


@pytest.mark.parametrize(
    ("key", "field", "says"),
    [
        ("attention.head_count_kv", Field("u32", 2), "is u32 2; need 1"),
        ("attention.value_length", Field("u32", 64), "is u32 64; need 128"),
        ("expert_shared_count", Field("u32", 0), "is u32 0; need 1"),
        ("expert_shared_count", Field("bool", True), "is bool True; need 1"),
        ("expert_weights_norm", Field("bool", False), "is bool False; need True"),
        ("expert_weights_norm", Field("u32", 1), "is u32 1; need True"),
        ("expert_group_count", Field("u32", 8), "is u32 8; need 0"),
        ("expert_group_used_count", Field("u32", 4), "is u32 4; need 0"),
        ("expert_gating_func", Field("u32", 2), "is u32 2; need 4"),
        ("rope.scaling.type", Field("string", "linear"), "is string linear; need 'yarn'"),
        ("rope.dimension_count", Field("u32", 63), "is 63; need an even number"),
        (
            "rope.dimension_count",
            Field("u32", 256),
            r"length is 128; need at least .*rope",
        ),
        ("attention.sliding_window", Field("u32", 2**21), "need at most deepseek4.context_length"),
        ("attention.output_group_count", Field("u32", 3), "is 3, but .* shows 2"),
        ("nextn_predict_layers", Field("u32", 2), "is u32 2; need 0 or 1"),
        ("nextn_predict_layers", Field("u32", 0), r"is u32 0; need 1, as the file has mtp\.\*"),
        ("attention.compress_ratios", Field("i32[]", [0, 4]), "at least 4 whole numbers"),
        ("attention.compress_ratios", Field("i32[]", [0, -4, 16, 4]), "whole numbers"),
        ("attention.compress_ratios", Field("f32[]", [0, 4, 16, 4]), "whole numbers"),
        ("attention.compress_ratios", Field("i32[]", [0, 4, 16, 4, 4]), "those behind them 0"),
        ("attention.compress_ratios", Field("i32[]", [0, 4, 128, 4]), r"\[2\] is 128.*need 16"),
        ("attention.compress_ratios", Field("i32[]", [0, 4, 0, 4]), r"\[2\] is 0.*need 16"),
        ("attention.compress_ratios", Field("i32[]", [4, 4, 16, 4]), r"\[0\] is 4.*need 0"),
        ("swiglu_clamp_exp", Field("f32[]", [10, 10, 10]), "each of 4 layers"),
        ("swiglu_clamp_exp", Field("f32[]", [10, 10, 10, 7]), "one and the same number"),
        ("swiglu_clamp_exp", Field("f32[]", [0, 0, 0, 0]), "one and the same number"),
        ("swiglu_clamp_exp", Field("f32[]", [np.nan] * 4), "one and the same number"),
        ("swiglu_clamp_exp", Field("f32", 10.0), "is f32 10.0; need an array"),
        ("swiglu_clamp_shexp", Field("f32[]", [7] * 4), "need that of swiglu_clamp_exp"),
        ("rope.scaling.attn_factor", Field("f32", 0.8), "unknown key .* = 0.8"),
    ],
)
def test_values_this_engine_does_not_compute(key: str, field: Field, says: str) -> None:
    file = small()
    if field.kind.endswith("[]"):
        field = Field(field.kind, np.asarray(field.value))
    file.metadata[f"deepseek4.{key}"] = field
    named = "attention.key_length" if says.startswith("length") else key
    with pytest.raises(ConfigError, match=re.escape(named)) as caught:
        open_all(file)
    assert re.search(says, str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "field", "says"),
    [
        ("general.architecture", Field("string", "llama"), "general.architecture is 'llama'"),
        ("general.architecture", None, "general.architecture is missing"),
        ("split.count", Field("u16", 3), "split.count is 3; join"),
        ("tokenizer.ggml.model", Field("string", "llama"), "scores is missing"),
        ("tokenizer.ggml.pre", Field("string", "qwen2"), "pre is 'qwen2'; need 'joyai-llm'"),
        ("tokenizer.ggml.pre", None, "pre is missing"),
        ("tokenizer.ggml.merges", None, "merges is missing"),
        ("tokenizer.ggml.merges", Field("string", "a b"), r"merges is a string"),
        ("tokenizer.ggml.tokens", None, "tokens is missing"),
        ("tokenizer.ggml.tokens", Field("string[]", [BOS, EOS]), "has 2 tokens; .* is 300"),
        ("tokenizer.ggml.token_type", Field("i32[]", np.ones(3, int)), "but 3 token types"),
        ("tokenizer.ggml.token_type", Field("f32[]", np.ones(300)), r"token_type is a f32\[\]"),
        ("tokenizer.ggml.bos_token_id", Field("u32", 17), "bos is token 17"),
        ("tokenizer.ggml.eos_token_id", Field("u32", 300), "eos_token_id is 300"),
        ("tokenizer.ggml.eos_token_id", Field("string", "1"), "eos_token_id is string"),
    ],
)
def test_other_keys(key: str, field: Field | None, says: str) -> None:
    file = small()
    if field is None:
        del file.metadata[key]
    else:
        file.metadata[key] = field
    with pytest.raises((ConfigError, TokenizerError), match=says) as caught:
        open_all(file)
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


def retyped(name: str, type_name: str) -> Callable[[dict[str, TensorInfo]], object]:
    return lambda t: t.update({name: replace(t[name], type=type_name)})


def copied(name: str, new: str) -> Callable[[dict[str, TensorInfo]], object]:
    return lambda t: t.update({new: replace(t[name], name=new)})


def reshaped(name: str, *dims: int) -> Callable[[dict[str, TensorInfo]], object]:
    return lambda t: t.update({name: replace(t[name], dims=dims)})


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("blk.3.attn_kv.weight"), r"lacks 1 of 1\d\d tensors: blk\.3\.attn_kv"),
        (lambda t: t.pop("output.weight"), r"lacks 1 of .*output\.weight"),
        (lambda t: t.pop("blk.3.exp_probs_b.bias"), r"lacks 1 of .*exp_probs_b\.bias"),
        (lambda t: t.pop("mtp.0.enorm.weight"), r"lacks 1 of .*mtp\.0\.enorm"),
        (copied("output.weight", "blk.1.x"), r"has 1 tensors .* does not call for: blk\.1\.x"),
        (copied("blk.3.exp_probs_b.bias", "blk.0.exp_probs_b.bias"), r"1 tensors .*blk\.0\.exp_p"),
        (reshaped("blk.1.attn_norm.weight", 255), r"attn_norm.weight has dims \[255\]; .*\[256\]"),
        (reshaped("blk.1.attn_output_b.weight", 256, 128), r"\[256, 128\]; .*\[128, 256\]"),
        (reshaped("blk.2.ffn_up_exps.weight", 256, 256, 4), r"\[256, 256, 4\]; .* 5\]"),
        (reshaped("blk.2.ffn_up_exps.weight", 256, 1280), r"ffn_up_exps.weight has dims"),
        (retyped("blk.1.attn_norm.weight", "Q8_0"), "has type Q8_0; need F32 or F16 or BF16"),
        (retyped("blk.1.attn_q_a.weight", "Q5_K"), "type Q5_K; need Q8_0 or Q6_K or Q4_K or F16"),
        (retyped("blk.1.ffn_gate_inp.weight", "Q8_0"), "need F16 or F32 or BF16"),
        (retyped("blk.0.ffn_gate_tid2eid.weight", "I64"), "type I64; need I32"),
        (retyped("blk.1.ffn_down_exps.weight", "IQ1_S"), "type IQ1_S; need Q2_K or IQ2_XXS"),
        (retyped("blk.1.ffn_up_exps.weight", "Q4_K"), "is IQ2_XXS and blk.1.ffn_up_exps.* Q4_K"),
        (lambda t: [t.pop(n) for n in list(t) if n[:3] == "blk"], r"has no blk\.\* tensor"),
    ],
)
def test_wrong_tensors_are_named(edit: Callable[[Any], object], says: str) -> None:
    file = small()
    edit(file.tensors)
    with pytest.raises(WeightsError, match=says) as caught:
        open_all(file)
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("blk.1.attn_q_a.weight", "Q8_0 Q6_K Q4_K F16 BF16 F32"),  # AProjQ4 among them
        ("output.weight", "Q8_0 Q6_K Q4_K F16"),
        ("token_embd.weight", "F16 F32 BF16 Q8_0"),
        ("blk.1.hc_attn_fn.weight", "F16 F32"),
        ("blk.1.attn_compressor_kv.weight", "F16 F32 BF16 Q8_0"),
        ("blk.1.ffn_down_exps.weight", "Q2_K Q4_K Q6_K IQ2_XXS MXFP4 Q8_0 F16"),
        ("blk.1.attn_norm.weight", "F32 F16 BF16"),
    ],
)
def test_types_that_are_read(name: str, types: str) -> None:
    for type_name in types.split():
        file = small()
        retyped(name, type_name)(file.tensors)
        open_all(file)


def test_draft_layers() -> None:
    """In the same file, in a file of its own, or of DSpark's kind and set aside."""
    whole, file = small(), small()
    apart = replace(whole, tensors={n: t for n, t in whole.tensors.items() if n[:3] == "mtp"})
    for name in apart.tensors:
        del file.tensors[name]
    assert not open_all(file).has_draft
    assert GGUFCheckpoint(file, config_of(file), draft=apart).has_draft
    with pytest.raises(WeightsError, match="stands in both"):
        GGUFCheckpoint(whole, config_of(whole), draft=apart)
    copied("mtp.0.norm.weight", "mtp.0.main_proj.weight")(whole.tensors)
    source = open_all(whole)
    assert source.config.dspark and not source.has_draft and not source.config.mtp_layers
    file.metadata["deepseek4.dspark.block_size"] = Field("u32", 5)
    assert open_all(file).config.dspark
