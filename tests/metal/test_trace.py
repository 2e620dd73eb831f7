"""What a step of the released dimensions costs, counted in MLX's own graph of it."""

import json
from pathlib import Path

import pytest

from ds4py.bench import kernels
from ds4py.bench.kernels import StepCost
from ds4py.cli.bench import run_kernels
from ds4py.cli.settings import ModelChoice
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


def test_bytes_are_those_of_the_released_file(cost: StepCost) -> None:
    """antirez/ds4's file has the same formats; its decode reads 9.55 GB near the start."""
    near = sum(n for name, n in cost.n_bytes.items() if not name.startswith("rows"))
    assert abs(near / 9.64e9 - 1) < 0.01
    assert cost.n_bytes["routed experts"] == 43 * 6 * (2 * 2048 * 1056 + 4096 * 672)
    n_rows, scored = cost.position // 4, cost.n_bytes.get("rows scored", 0)
    assert scored == (21 * n_rows * 68 if n_rows > 512 else 0)


def test_the_command_prints_a_table_and_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_kernels(ModelChoice(str(FLASH), None), [1000], False) == 0
    *table, line = capfd.readouterr().out.splitlines()
    assert json.loads(line)["steps"][0]["position"] == 1000
    assert "574 launches" in table[0] and any("routed experts" in row for row in table)
    assert run_kernels(ModelChoice("tiny", None), [100], True) == 0
