"""Whole models with their shaders executed on the CPU, against the reference operations.

Both run in float32 and differ by the order of sums. A value on a rounding boundary of the trained
round trips then moves the logits of its position, so most positions must agree closely and all of
them roughly.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from ds4py.kernels.build import Launcher

pytest.importorskip("ziglang")
from tools.metal_cpu import metal_kernel
from tools.metal_cpu.arrays import as_numpy

pytestmark = pytest.mark.shader


def make(name: str, input_names: list[str], **text: Any) -> Callable[..., list[Any]]:
    """A kernel on the CPU that also looks at what the project promises MLX: contiguous inputs."""
    kernel = metal_kernel(name, input_names, **text)

    def call(inputs: Any, **rest: Any) -> list[Any]:
        for argument, x in zip(input_names, inputs, strict=True):
            assert as_numpy(x).flags.c_contiguous, f"{name}: {argument} is not contiguous"
        return kernel(inputs=inputs, **rest)

    return call


def engines(path: Path | str) -> tuple[Engine, Engine]:
    """The same model on the reference operations, and on shaders."""
    metal = Engine.open(path, EngineOptions(kernels="metal"), launcher=Launcher(make))
    return Engine.open(path, EngineOptions()), metal


def check(logits: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(logits - expected).max(axis=1)
    assert np.median(off) < 5e-3 and off.max() < 0.5


@pytest.mark.parametrize("chunks", [[1] * 6, [6]], ids=["one by one", "together"])
def test_the_embedded_model(chunks: list[int]) -> None:
    reference, metal = engines("tiny")
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 2048, 6)]
    check(metal.score(ids, chunks), reference.score(ids, chunks))
