"""Stacking what layers add to the state: exact copies."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import state
from ds4py.kernels.build import Launcher
from ds4py.kernels.ops import MlxOps, Ops
from tests.kernels.shaders import LATER, caught, host, shader_runs

pytestmark = pytest.mark.shader
OPS = cast(Ops, MlxOps())


class Case:
    """Layers with s new rows each, of which n are taken, after n_old rows."""

    def __init__(
        self,
        layers: int,
        s: int,
        taken: int,
        kept: int,
        n_old: int,
        width: int,
        dtype: Any,
        unread: int = 0,
    ):
        rng = np.random.default_rng(layers + width)
        words = [
            rng.integers(0, 255, (s, width * dtype.size)).astype(np.uint8) for _ in range(layers)
        ]
        self.layers = [mx.array(x).view(dtype) for x in words]
        old = rng.integers(0, 255, (layers, n_old, width * dtype.size)).astype(np.uint8)
        self.old = mx.array(old).view(dtype) if n_old else None
        self.taken, self.kept, self.unread = taken, kept, unread

    @property
    def given(self) -> Any:
        return self.layers, self.taken, self.kept, self.old

    def run(self, launcher: Launcher) -> Any:
        unread = mx.array([self.unread]) if self.unread else None
        return [state.stack(launcher, *self.given, unread).view(mx.uint8)]

    def compare(self, made: Any) -> None:
        wanted = np.array(state.stack_ref(OPS, *self.given).view(mx.uint8))
        wanted[:, : self.unread] = 0
        np.testing.assert_array_equal(host(made)[0], wanted)


@pytest.mark.parametrize(
    ("layers", "s", "taken", "kept", "n_old", "width", "dtype"),
    [
        (1, 1, 1, 1, 0, 584, mx.uint8),
        (3, 5, 2, 2, 0, 194, mx.uint8),
        (24, 1, 1, 63, 63, 194, mx.uint8),
        (43, 2, 2, 127, 127, 584, mx.uint8),
        (3, 9, 9, 7, 7, 512, mx.float32),
        (2, 4, 3, 3, 0, 68, mx.uint8),
        (2, 4, 3, 5, 7, 33, mx.bfloat16),
        (2, 3, 1, 1, 0, 9, mx.uint8),
    ],
)
def test_stack(
    layers: int, s: int, taken: int, kept: int, n_old: int, width: int, dtype: Any
) -> None:
    for unread in {0, kept // 3, kept}:
        case = Case(layers, s, taken, kept, n_old, width, dtype, unread)
        for made in shader_runs(case.run):
            case.compare(made)


@LATER
@pytest.mark.parametrize(
    "change",
    [
        ("OLD + uint(place[1]) - kept", "OLD - kept + 1"),
        ("size_t(place[0]) + layer", "layer"),
        ("case 17: fresh = (const device U*)part_17", "case 17: fresh = (const device U*)part_18"),
        ("row < OLD\n", "row <= OLD\n"),
        ("< uint(unread[0])", "<= uint(unread[0])"),
    ],
)
def test_stack_planted(change: tuple[str, str]) -> None:
    case = Case(26, 3, 3, 5, 4, 66, mx.uint8, unread=1)
    caught(lambda launcher: case.compare(case.run(launcher)), {"state_stack": change})
