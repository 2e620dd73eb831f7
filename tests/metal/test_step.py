"""What a token of V4-Flash reads besides its weights and rows, counted at its full widths."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ds4py.bench.kernels import state_at
from ds4py.bench.traffic import bytes_per_token
from ds4py.config import ModelConfig
from ds4py.quant.recipe import default_format

pytest.importorskip("ziglang")
from tests.metal.step import Step

pytestmark = [pytest.mark.shader, pytest.mark.long]

CONFIG = Path(__file__).parents[1] / "pure" / "data" / "configs" / "flash.json"
WEIGHTS = {
    "dense_project": {f"w{i}" for i in range(8)},
    "dense_expand": {"w", "fn"},
    "moe_gate_up": {"records", "shared_gate", "shared_up"},
    "moe_down": {"records", "shared_down", "fn"},
    "hyper_embed": {"table", "reader"},
}
"""The inputs that are weights; that each is read once is tested kernel by kernel."""
PLAIN = {"rows attended", "rows scored", "frontier"}
"""Classes of bytes that are no weights."""


def counted(position: int) -> tuple[Counter[str], dict[str, int]]:
    """Bytes by kernel that are no weights, and what the step must read. The vocabulary is an eighth
    of Flash's, whose head would take most of the time."""
    config: dict[str, Any] = json.loads(CONFIG.read_text())
    config["vocab_size"] //= 8
    step = Step(ModelConfig.from_dict(config), default_format, position)
    more: Counter[str] = Counter()
    for kind, n in step.launches.items():
        for name, n_bytes in step.reads(kind).items():
            if name not in WEIGHTS.get(kind.name, ()):
                more[kind.name] += n * n_bytes
    must = bytes_per_token(step.model, step.resident, state_at(step.model, position))
    return more, must


@pytest.mark.parametrize("position", [1000, 100_000, 100_095])
def test_a_token_reads_little_besides_weights_and_rows(position: int) -> None:
    """Every threadgroup of a product reads the product's input, and attention reads a row for each
    16 of the 64 heads. The last position ends a window of 128 tokens, all of which is then read."""
    more, must = counted(position)
    weights = sum(n for name, n in must.items() if name not in PLAIN)
    inputs = sum(more[name] for name in WEIGHTS)
    assert inputs / weights <= 0.018, more
    rows = sum(must.get(name, 0) for name in PLAIN)
    assert (weights + more.total()) / (weights + rows) <= 1.03, more
