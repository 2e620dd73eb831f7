"""Results of long sums against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.kernels.shaders import Run, host, shader_runs


def compare(found: Any, expected: Any, tolerance: float) -> None:
    """Every number within `tolerance` of the largest of its array: what sums in float32 allow."""
    for x, y in zip(host(found), host(expected), strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max())


def near(run: Run, expected: Any, tolerance: float) -> None:
    """Every way of running agrees with the reference, as `compare` has it."""
    for found in shader_runs(run):
        compare(found, expected, tolerance)
