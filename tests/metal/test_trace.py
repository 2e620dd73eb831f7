"""What a step of the released dimensions costs, counted in MLX's own graph of it."""

import json
from pathlib import Path

import pytest

from ds4py.bench import kernels
from ds4py.bench.kernels import StepCost
from ds4py.config import ModelConfig

FLASH = Path(__file__).parents[1] / "pure" / "data" / "configs" / "flash.json"


@pytest.fixture(scope="module", params=[1_000, 100_000, 1_000_000])
def cost(request: pytest.FixtureRequest) -> StepCost:
    config = ModelConfig.from_dict(json.loads(FLASH.read_text()))
    return kernels.trace_step(config, request.param)


def test_one_buffer_stays_small_whatever_the_context(cost: StepCost) -> None:
    assert cost.largest[1] < 8 << 20, cost.largest
