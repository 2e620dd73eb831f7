"""Every key of config.json is understood, or the model is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds4py.config import ModelConfig
from ds4py.errors import ConfigError

CONFIGS = Path(__file__).parent / "data" / "configs"


def raw(name: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    config.update(changes)
    return {key: value for key, value in config.items() if value != "absent"}


def test_flash_schedule() -> None:
    c = ModelConfig.from_dict(raw("flash"))
    kinds = [plan.kind for plan in c.layers]
    assert kinds[:4] == ["sliding", "sliding", "indexed", "pooled"]
    assert (kinds.count("indexed"), kinds.count("pooled")) == (21, 20)
    assert [plan.hash_routed for plan in c.layers[:4]] == [True, True, True, False]
    assert [(plan.ratio, plan.hash_routed) for plan in c.mtp_layers] == [(0, False)]
    assert c.nope_head_dim == 448


def test_pro_has_no_sliding_layer() -> None:
    c = ModelConfig.from_dict(raw("pro"))
    kinds = [plan.kind for plan in c.layers]
    assert kinds[:3] == ["pooled", "pooled", "indexed"]
    assert (kinds.count("indexed"), kinds.count("pooled"), len(kinds)) == (30, 31, 61)


@pytest.mark.parametrize("n_draft", [1, 3])
def test_flash_0731_draft_is_set_aside(n_draft: int) -> None:
    ratios = [0, 0] + [4, 128] * 20 + [4, 0, 0, 0]
    c = ModelConfig.from_dict(
        raw(
            "flash",
            compress_ratios=ratios,
            num_nextn_predict_layers=n_draft,
            dspark_block_size=5,
            dspark_target_layer_ids=[40, 41, 42],
        )
    )
    assert (len(c.layers), c.mtp_layers, c.dspark) == (43, (), True)


def test_ratios_are_data() -> None:
    ratios = [0, 8, 4, 32, *raw("flash")["compress_ratios"][4:]]
    c = ModelConfig.from_dict(raw("flash", compress_ratios=ratios))
    assert [plan.kind for plan in c.layers[:4]] == ["sliding", "pooled", "indexed", "pooled"]
    assert [plan.overlap for plan in c.layers[:4]] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "deepseek_v3"}, "model_type"),
        ({"model_type": "absent"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"expert_dtype": "int3"}, "expert_dtype"),
        ({"attention_chunk": 7}, "attention_chunk"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": "absent"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"swiglu_limit": 0}, "swiglu_limit"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_scaling": None}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type"),
        ({"compress_ratios": [0] * 40}, "compress_ratios"),
        ({"compress_ratios": [0] * 42 + [2, 0]}, r"compress_ratios\[42\]"),
        ({"compress_ratios": [0] * 43 + [4]}, "draft"),
        ({"compress_ratios": "4"}, "compress_ratios"),
        ({"num_experts_per_tok": 300}, "num_experts_per_tok"),
        ({"o_groups": 7}, "o_groups"),
        ({"eos_token_id": 200000}, "eos_token_id"),
        ({"layer_types": ["sliding_attention"] * 44}, "layer_types"),
        ({"compress_rate_csa": 8}, "compress_rate_csa"),
        ({"quantization_config": {"fmt": "e5m2"}}, "quantization_config.fmt"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        ModelConfig.from_dict(raw("flash", **changes))
    assert "\n" not in str(caught.value)


def test_yarn_mscale_is_refused() -> None:
    scaling = raw("flash")["rope_scaling"] | {"mscale": 1.0}
    with pytest.raises(ConfigError, match="mscale"):
        ModelConfig.from_dict(raw("flash", rope_scaling=scaling))


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_unreadable_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.load(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.load(tmp_path)
