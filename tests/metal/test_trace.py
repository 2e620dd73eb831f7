"""What a step of the released dimensions costs, counted in MLX's own graph of it."""

import json
from pathlib import Path

import pytest

from ds4py.bench import kernels
from ds4py.bench.kernels import StepCost
from ds4py.config import ModelConfig
from ds4py.quant.recipe import default_format

FLASH = Path(__file__).parents[1] / "pure" / "data" / "configs" / "flash.json"


@pytest.fixture(scope="module", params=[1_000, 100_000, 1_000_000])
def cost(request: pytest.FixtureRequest) -> StepCost:
    config = ModelConfig.from_dict(json.loads(FLASH.read_text()))
    return kernels.trace_step(config, default_format, request.param)


def test_few_launches(cost: StepCost) -> None:
    """A plain port launches 6,500 operations, each of them a round trip through memory."""
    assert cost.launches <= 640
    assert sum(cost.operations.values()) <= 10, cost.operations


def test_no_buffer_grows_with_the_context(cost: StepCost) -> None:
    """The largest is what a commit keeps of the ratio-128 layers: 127 rows of values each."""
    assert cost.largest[1] < 16 << 20, cost.largest
