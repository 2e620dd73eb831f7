"""What a step of the released dimensions costs, counted in MLX's own graph of it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from ds4py.bench import kernels
from ds4py.bench.kernels import StepCost
from ds4py.cache.state import SequenceState
from ds4py.cli.bench import run_kernels
from ds4py.cli.settings import ModelChoice
from ds4py.config import ModelConfig
from ds4py.kernels.build import Launcher
from ds4py.quant.recipe import default_format

FLASH = Path(__file__).parents[1] / "pure" / "data" / "configs" / "flash.json"
CONFIG = ModelConfig.from_dict(json.loads(FLASH.read_text()))


@pytest.fixture(scope="module", params=[1_000, 100_000, 1_000_000])
def cost(request: pytest.FixtureRequest) -> StepCost:
    return kernels.trace_step(CONFIG, default_format, request.param)


def test_few_launches(cost: StepCost) -> None:
    """A plain port launches 6,500 operations, each of them a round trip through memory."""
    assert cost.launches <= 620
    assert sum(cost.operations.values()) <= 10, cost.operations


def test_a_token_that_completes_rows_of_every_ratio_launches_a_few_more() -> None:
    cost = kernels.trace_step(CONFIG, default_format, 128 * 800 - 1)
    assert cost.kernels["compress_rows"] == 41 and cost.launches <= 670


def test_no_buffer_of_a_token_grows_with_the_context(cost: StepCost) -> None:
    """The largest is what a commit keeps of the ratio-128 layers: 127 rows of values each. What
    grows at first ends with the parts that rows are split into: 128 that are scored, and 32 that
    are attended, 4.2 MB in each of the 20 layers that see all rows."""
    assert cost.largest == ("state_stack", 20 * 127 * 2 * 512 * 4)
    assert cost.new_bytes < 80e6 + 20 * 4.2e6


def test_no_buffer_of_a_chunk_grows_with_the_context() -> None:
    """All buffers of a prompt's chunk are as large near the end of the context as near its start;
    the largest are the queries in float32."""
    near, far = (kernels.trace_step(CONFIG, default_format, n, 512) for n in (10_240, 1_000_192))
    assert near.new_bytes == far.new_bytes and near.kernels == far.kernels
    assert far.largest == ("dense_matmul", 512 * (64 * 512 + 64 * 128) * 4)


def test_bytes_are_those_of_the_released_file(cost: StepCost) -> None:
    """antirez/ds4's file has the same formats; its decode reads 9.55 GB near the start."""
    near = sum(n for name, n in cost.n_bytes.items() if not name.startswith("rows"))
    assert abs(near / 9.64e9 - 1) < 0.01
    assert cost.n_bytes["routed experts"] == 43 * 6 * (2 * 2048 * 1056 + 4096 * 672)
    n_rows, scored = cost.position // 4, cost.n_bytes.get("rows scored", 0)
    assert scored == (21 * n_rows * 68 if n_rows > 512 else 0)


def test_the_command_prints_tables_and_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_kernels(ModelChoice(str(FLASH), None), [1000], False) == 0
    *table, line = capfd.readouterr().out.splitlines()
    steps = json.loads(line)["steps"]
    assert [(s["n_sequences"], s["n_tokens"]) for s in steps] == [
        *((n, 1) for n in (1, 2, 4, 8)),
        (1, 512),
    ]
    assert "570 launches" in table[0] and any("routed experts" in row for row in table)
    assert run_kernels(ModelChoice("tiny", None), [100], True) == 0


def known(engine: Engine, positions: Sequence[int], seed: int) -> list[SequenceState]:
    """Sequences of those lengths, whose arrays hold different values."""
    rng, states = np.random.default_rng(seed), []
    for position in positions:
        state = kernels.state_at(engine.model, position)
        old = state.frontier
        values = {
            name: mx.array(rng.normal(size=v.shape).astype(np.float32))
            for name, v in old.values.items()
        }
        window = mx.array(rng.integers(0, 256, old.window.shape).astype(np.uint8))
        state.frontier = replace(old, window=window, values=values)
        for store in state.rows.values():
            store.data = mx.array(rng.integers(0, 256, store.data.shape).astype(np.uint8))
        states.append(state)
    return states


def written(nodes: Sequence[kernels.Node]) -> list[Any]:
    """Every primitive with its arguments and its inputs: arrays by value, else by their maker."""
    made: dict[str, Any] = {}
    for node in nodes:
        for name, array in node.get("constants", ()):
            made[name] = (array.dtype, array.shape, sha256(np.array(array).tobytes()).digest())
    primitives = [node for node in nodes if "name" in node]
    for i, node in enumerate(primitives):
        made |= {name: (i, j) for j, (name, *_) in enumerate(node["outputs"])}
    return [
        (node["name"], node["arguments"], [made.get(name) for name, *_ in node["inputs"]])
        for node in primitives
    ]


@pytest.mark.parametrize(
    ("recorded", "positions"),
    [
        ([300], [300]),
        ([300], [304]),
        ([4200], [6200]),  # more parts of the rows that are scored, and attended
        ([303], [407]),
        ([3], [7]),  # nothing committed, something committed
        ([127], [255]),
        ([303, 299, 7, 127], [127, 303, 299, 7]),
        ([511] * 8, [511] * 8),
    ],
    ids=str,
)
def test_a_replayed_step_is_the_step_launched_anew(
    recorded: list[int], positions: list[int]
) -> None:
    """The same texts, grids, inputs and weights, for other arrays than those recorded, also at
    another place."""
    graphs = []
    for lazy in (True, False):
        launcher = Launcher(lazy=lazy)
        engine = Engine.open("tiny", EngineOptions(kernels="metal"), launcher=launcher)
        steps = [(2, positions)]
        if lazy:
            steps = [(0, recorded), (1, recorded), *steps]

        todo = iter(steps)

        def build(engine: Engine = engine, todo: Iterator[Any] = todo) -> Any:
            seed, at = next(todo)
            tokens = mx.array([(7 * seed + i) % 100 for i in range(len(at))])
            assert engine.launcher is not None
            return kernels.step(engine.model, known(engine, at, seed), tokens, engine.launcher)

        graphs.append(kernels.graph(build, len(steps)))
        counted = launcher.counters
    kernel_nodes = [node for node in graphs[0] if node.get("name") == kernels.KERNEL]
    assert len(kernel_nodes) == counted.total() > 20
    assert written(graphs[0]) == written(graphs[1])
