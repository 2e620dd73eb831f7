"""Results of long sums against the reference, and the bytes that a launch moves."""

from __future__ import annotations

from typing import Any

import numpy as np

from ds4py.kernels.build import Launcher
from tests.kernels.shaders import Run, host, shader_runs
from tools.metal_cpu import Kernel, Traffic


def compare(found: Any, expected: Any, tolerance: float) -> None:
    """Every number within `tolerance` of the largest of its array: what sums in float32 allow."""
    for x, y in zip(host(found), host(expected), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def near(run: Run, expected: Any, tolerance: float) -> None:
    """Every way of running agrees with the reference, as `compare` has it."""
    for found in shader_runs(run):
        compare(found, expected, tolerance)


def traffic(run: Run, name: str) -> dict[str, Traffic]:
    """What the last launch of a kernel did with device memory, by buffer."""
    kernels: dict[str, Kernel] = {}

    def make(**text: Any) -> Any:
        kernel = kernels[text["name"]] = Kernel(**text)
        return lambda **arguments: kernel(**arguments, mode="check")

    run(Launcher(make))
    return kernels[name].last.traffic
