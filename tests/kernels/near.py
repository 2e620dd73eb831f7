"""Results of long sums against the reference, and the bytes that a launch moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ds4py.kernels.build import Launcher
from tests.kernels.shaders import LATER, Run, host, shader_runs
from tools.metal_cpu import Kernel, Traffic


def variants(cases: dict[str, Any], n_now: int) -> pytest.MarkDecorator:
    """Parametrize `case`: the first `n_now` by name, the others in the long run."""
    named = [
        pytest.param(case, id=name, marks=() if i < n_now else LATER)
        for i, (name, case) in enumerate(cases.items())
    ]
    return pytest.mark.parametrize("case", named)


def bugs(names: str, planted: Sequence[tuple[str, ...]], n_now: int) -> pytest.MarkDecorator:
    """Parametrize `names` likewise; what a bug changes is its id."""
    listed = [
        pytest.param(*bug, marks=() if i < n_now else LATER) for i, bug in enumerate(planted)
    ]
    return pytest.mark.parametrize(names.split(), listed)


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
