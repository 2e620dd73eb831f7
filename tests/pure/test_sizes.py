"""Sizes computed from a config against those that others published, and against real bundles."""

import json
from pathlib import Path

import pytest

from ds4py import assets
from ds4py.cli import planned
from ds4py.config import ModelConfig
from ds4py.hub import manifest
from ds4py.quant import sizes
from ds4py.quant.recipe import Recipe

PATHS = sorted(assets.path("models", "recipes").glob("*.json"))
GGUF_HEADER = 8 << 20
"""Metadata with the vocabulary takes less."""


def known(name: str) -> tuple[manifest.Manifest, ModelConfig]:
    found = manifest.load(name)
    assert found is not None
    return found, ModelConfig.from_dict(dict(found.config))


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_published_sizes_are_those_of_the_index(name: str) -> None:
    found, config = known(name)
    assert sizes.total(sizes.published(config)).n_bytes == found.weight_bytes


def test_the_default_recipe_is_the_size_of_the_published_gguf_file() -> None:
    _, config = known("flash")
    theirs = manifest.load("flash-gguf")
    assert theirs is not None
    ours = sizes.total(sizes.of_gguf(config, Recipe.load(None, len(config.layers))))
    assert ours.tensors == 1328
    assert 0 < theirs.weight_bytes - ours.n_bytes < GGUF_HEADER


def test_records_of_flash_need_no_padding() -> None:
    _, config = known("flash")
    found = sizes.of_bundle(config, Recipe.load(None, len(config.layers)))
    routed = sum(found[kind].n_bytes for kind in ("routed.gate", "routed.up", "routed.down"))
    assert routed == 43 * 256 * 7_077_888


def test_a_bundle_is_as_large_as_was_said() -> None:
    folder = assets.path("models", "tiny")
    config = ModelConfig.load(folder)
    plan = Recipe.load(None, len(config.layers))
    said = sizes.total(sizes.of_bundle(config, plan)).n_bytes
    names = json.loads((folder / "recipe.json").read_text())["files"]
    written = sum((folder / name).stat().st_size for name in names)
    assert 0 < written - said < 200_000  # headers, padded to whole pages


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_shipped_recipes_fit_both_models_and_both_layouts(path: Path) -> None:
    assert path.stem in planned.RECIPES
    for name in ("flash", "pro"):
        _, config = known(name)
        recipe = Recipe.load(path, len(config.layers))
        assert recipe.name == path.stem
        assert sizes.of_bundle(config, recipe) and sizes.of_gguf(config, recipe)


def test_what_inspect_says_of_a_model_that_is_not_here() -> None:
    made = planned.Planned(known("flash")[0], 100_000, "48GB")
    lines = "\n".join(f"{a} {b}" for a, b in planned.facts(made))
    assert "159.6 GB" in lines and "86.7 GB as GGUF" in lines
    assert "`ds4 pull flash`" in lines and len(list(planned.table(made))) == 15


def test_where_its_memory_would_go() -> None:
    made = planned.Planned(known("flash")[0], 100_000, "48GB")
    said = planned.report(made)
    memory = said["memory"]
    assert memory["streamed"] and memory["total"] <= memory["budget"] == 48e9
    # 21 layers with a row of 584 + 68 bytes every 4 tokens, 20 with one of 584 every 128
    assert memory["kv_bytes_per_token"] == 21 * 652 / 4 + 20 * 584 / 128
    assert memory["experts"] % 7_077_888 == 0 and memory["experts_on_disk"] == 11008 * 7_077_888
    assert said["bytes_per_token"]["experts"] == 258 * 7_077_888
    assert "error" in planned.report(planned.Planned(made.manifest, None, "8GB"))["memory"]
    whole = planned.report(planned.Planned(made.manifest, 100_000, "128GB"))["memory"]
    assert not whole["streamed"] and whole["resident_records"] is None


def test_a_gguf_file_is_planned_like_a_bundle() -> None:
    """Its experts can stay on disk, too: sizes and memory are told before it is fetched."""
    made = planned.Planned(known("flash-gguf")[0], 100_000, "48GB")
    lines = "\n".join(f"{a} {b}" for a, b in planned.facts(made))
    assert "86.7 GB" in lines and "as a bundle" not in lines
    said = planned.report(made)
    classes = sum(size["bytes"] for size in said["classes"])
    assert 0 < made.manifest.weight_bytes - classes < GGUF_HEADER
    memory = said["memory"]
    assert memory["streamed"] and memory["experts_on_disk"] == 11008 * 7_077_888
    assert memory["scratch"] < 2e9 and memory["resident_records"] > 4000
