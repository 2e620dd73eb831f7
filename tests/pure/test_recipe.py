"""Recipes: every tensor has a class, rules override classes, nonsense is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from ds4py.config import ModelConfig
from ds4py.errors import InputError
from ds4py.quant.recipe import DEFAULT, Recipe, class_of
from ds4py.weights import names

FLASH = Path(__file__).parent / "data" / "configs" / "flash.json"


def test_every_tensor_of_flash_has_a_class() -> None:
    config = ModelConfig.from_dict(json.loads(FLASH.read_text()))
    found = {class_of(name) for name in {**names.expected(config), **names.expected_draft(config)}}
    assert found == set(DEFAULT)


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("layers.3.ffn.experts.17.w1.weight", "IQ2_XXS"),
        ("layers.3.ffn.experts.17.w3.weight", "IQ2_XXS"),
        ("layers.3.ffn.experts.17.w2.weight", "Q2_K"),
        ("mtp.0.ffn.experts.17.w2.weight", "Q2_K"),
        ("layers.3.ffn.shared_experts.w2.weight", "Q8_0"),
        ("layers.3.attn.wo_a.weight", "Q8_0"),
        ("head.weight", "Q8_0"),
        ("layers.2.attn.indexer.wq_b.weight", "keep"),
        ("layers.2.attn.indexer.compressor.wkv.weight", "keep"),
        ("layers.2.attn.compressor.wgate.weight", "keep"),
        ("layers.2.ffn.gate.weight", "keep"),
        ("layers.2.hc_attn_fn", "keep"),
        ("embed.weight", "keep"),
    ],
)
def test_default(name: str, format_name: str) -> None:
    assert Recipe.from_dict({}, 43).format_of(name) == format_name


def test_rules() -> None:
    recipe = Recipe.from_dict(
        {
            "formats": {"attention": "Q6_K"},
            "rules": [
                {"class": "routed", "layers": "last 6", "format": "Q4_K"},
                {"class": "routed.down", "layers": [1], "format": "Q6_K"},
                {"class": "shared", "layers": "2-3", "format": "Q4_K"},
                {"class": "attention", "layers": "first 1", "format": "Q8_0"},
            ],
        },
        43,
    )
    w1, w2 = "layers.{}.ffn.experts.0.w1.weight", "layers.{}.ffn.experts.0.w2.weight"
    assert [recipe.format_of(w1.format(i)) for i in (36, 37, 42)] == ["IQ2_XXS", "Q4_K", "Q4_K"]
    assert [recipe.format_of(w2.format(i)) for i in (0, 1, 37)] == ["Q2_K", "Q6_K", "Q4_K"]
    shared = "layers.{}.ffn.shared_experts.w1.weight"
    assert [recipe.format_of(shared.format(i)) for i in (1, 2, 3)] == ["Q8_0", "Q4_K", "Q4_K"]
    assert [recipe.format_of(f"layers.{i}.attn.wkv.weight") for i in (0, 1)] == ["Q8_0", "Q6_K"]
    assert recipe.format_of("mtp.0.ffn.experts.0.w1.weight") == "IQ2_XXS"


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ([], "name, about, formats and rules"),
        ({"format": {}}, "name, about, formats and rules"),
        ({"formats": {"mlp": "Q8_0"}}, "no class 'mlp'"),
        ({"formats": {"shared": "Q5_K"}}, "no format 'Q5_K'"),
        ({"rules": [{"class": "rout", "format": "Q4_K"}]}, "no class 'rout'"),
        ({"rules": [{"class": "routed"}]}, "no format None"),
        ({"rules": ["last"]}, "class, layers and format"),
        ({"rules": [{"class": "routed", "layers": "last six", "format": "Q4_K"}]}, "last six"),
        ({"rules": [{"class": "routed", "layers": [43], "format": "Q4_K"}]}, r"layers \[43\]"),
        ({"rules": [{"class": "routed", "layers": "9-3", "format": "Q4_K"}]}, "9-3"),
    ],
)
def test_refused(raw: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Recipe.from_dict(raw, 43)
