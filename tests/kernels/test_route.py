"""The router's shader against the plain operations."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import route
from ds4py.kernels.build import Launcher
from ds4py.kernels.ops import MlxOps, Ops
from tests.kernels.shaders import LATER, caught, host, shader_runs

pytestmark = pytest.mark.shader
OPS = cast(Ops, MlxOps())


class Case:
    """n rows of logits over e experts, k chosen, by score or by table."""

    def __init__(self, n: int, e: int, k: int, hashed: bool = False, scale: float = 3.0):
        rng = np.random.default_rng(n + e)
        self.logits = mx.array(rng.standard_normal((n, e)).astype(np.float32) * scale)
        self.bias = mx.array(rng.standard_normal(e).astype(np.float32))
        table = np.stack([rng.permutation(e)[:k] for _ in range(50)]).astype(np.int32)
        self.table = mx.array(table) if hashed else None
        self.tokens = mx.array(rng.integers(0, 50, n).astype(np.int32))
        self.k = k

    @property
    def given(self) -> Any:
        bias = None if self.table is not None else self.bias
        return self.logits, self.k, 1.5, bias, self.table, self.tokens

    def run(self, launcher: Launcher) -> Any:
        return route.experts(launcher, *self.given)

    def compare(self, made: Any) -> None:
        ids, weight = host(made)
        wanted_ids, wanted = host(route.experts_ref(OPS, *self.given))
        np.testing.assert_array_equal(ids, wanted_ids)
        np.testing.assert_allclose(weight, wanted, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("n", "e", "k"), [(1, 16, 2), (5, 5, 2), (3, 256, 6), (2, 384, 6), (40, 5, 5), (1, 7, 1)]
)
@pytest.mark.parametrize("hashed", [False, True])
def test_experts(n: int, e: int, k: int, hashed: bool) -> None:
    case = Case(n, e, k, hashed)
    for made in shader_runs(case.run):
        case.compare(made)


def test_far_out_logits_and_ties() -> None:
    """Overflow of exp, and scores so small that log(1 + x) would cancel; ties go to lower ids."""
    case = Case(3, 64, 6, scale=60)
    case.logits[1] = mx.array(-40.0)
    case.logits[2] = mx.array(np.repeat([2.0, -1.0], 32).astype(np.float32))
    case.bias = mx.zeros(64)
    for made in shader_runs(case.run):
        case.compare(made)
        assert host(made)[0][1:].tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@LATER
@pytest.mark.parametrize(
    "change",
    [
        ("chosen = min(chosen, 32 * i + lane)", "chosen = max(chosen % E, 32 * i + lane)"),
        ("if (32 * i + lane == chosen) ranks[i] = -INFINITY;", ""),
        ("float(bias_or_table[expert])", "0.0f"),
        ("score / total * scaling[0]", "score / total"),
        ("one == 1.0f ? x :", "one == 1.0f ? 0.0f :"),
        ("row * K + place] = int(mine)", "row * K + lane] = int(mine)"),
    ],
)
def test_experts_planted(change: tuple[str, str]) -> None:
    far = Case(3, 64, 6)
    far.logits[1], far.bias = mx.array(-40.0), mx.zeros(64)
    cases = [Case(5, 256, 6), far]

    def check(launcher: Launcher) -> None:
        for case in cases:
            case.compare(case.run(launcher))

    caught(check, {"route_experts": change})


@LATER
def test_table_planted() -> None:
    case = Case(9, 16, 2, hashed=True)
    change = ("size_t(tokens[row]) * K", "size_t(row) * K")
    caught(lambda launcher: case.compare(case.run(launcher)), {"route_experts": change})
