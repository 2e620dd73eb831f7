"""Small random bundles for the tests of streaming, and engines over them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ds4py import Engine, EngineOptions
from ds4py.config import ModelConfig
from ds4py.experts.options import StreamingOptions
from ds4py.quant.convert import Converter
from ds4py.quant.recipe import Recipe
from ds4py.weights.checkpoint import Checkpoint
from tests.golden.sets import plain, write
from tools.golden.presets import PRESETS, config, draw

LAYERS, EXPERTS, CHOSEN, HASHED = 8, 12, 3, 3
"""Of the bundles, counting the draft layer."""
LEAST = LAYERS * CHOSEN
"""Slots without which no token can be computed."""
Q8: dict[str, Any] = {"formats": {f"routed.{w}": "Q8_0" for w in ("gate", "up", "down")}}
TWO_SIZES = Q8 | {"rules": [{"class": "routed", "layers": "last 2", "format": "MXFP4"}]}


def make(folder: Path, recipe: dict[str, Any] = Q8) -> Path:
    """A bundle of 7 layers (3 hash-routed) and a draft layer, 12 experts of which 3 are chosen."""
    c = config(PRESETS["fast"]) | {"moe_intermediate_size": 96}
    parent = write(folder / "parent", c, {n: plain(v) for n, v in dict(draw(c, 5)).items()})
    loaded = ModelConfig.load(parent)
    target = folder / "bundle"
    plan = Recipe.from_dict(recipe, len(loaded.layers))
    Converter(Checkpoint(parent, loaded), target, plan).run()
    return target


def resident(path: Path, **options: Any) -> Engine:
    return Engine.open(path, EngineOptions(experts="resident", **options))


def streamed(path: Path, slots: int = LEAST, kernels: str = "auto", **streaming: Any) -> Engine:
    options = StreamingOptions(slots=slots, **{"readers": 2} | streaming)
    return Engine.open(path, EngineOptions(experts="streamed", kernels=kernels, streaming=options))


def prompt(n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 512, n)]


def recipe_of(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / "recipe.json").read_text()))
