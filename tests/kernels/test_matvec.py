"""The plan of a launch fits a threadgroup's memory at every size of the released models."""

from itertools import product
from typing import Any

import mlx.core as mx
import pytest

from ds4py.kernels import matvec
from ds4py.kernels.dense import PART, expand_rows

# Inputs and rows of: entry, queries, groups, head; gate and up (two products a row).
PROJECTIONS = [(4096, 4160, 1), (1024, 40960, 1), (4096, 8192, 1), (4096, 129280, 1)]
PROJECTIONS += [(7168, 4672, 1), (1536, 73728, 1), (4096, 16384, 1), (7168, 129280, 1)]
PROJECTIONS += [(4096, 2048, 2), (7168, 3072, 2), (256, 768, 1), (32, 1, 1)]
# Inputs, channels and choices (none: the end of attention) of what goes into the streams.
ENDS = [(8192, 4096, 0), (2048, 4096, 6), (16384, 7168, 0), (3072, 7168, 6), (128, 256, 2)]
DTYPES = [mx.bfloat16, mx.float32]


def check(
    plan: matvec.Tiling, n_x: int, n_in: int, dtype: Any, floats: int, points: bool = True
) -> None:
    keep = plan.staged(n_x, n_in, dtype)
    assert keep == n_in or (keep % matvec.UNIT == 0 and 0 < keep < n_in)
    stage = plan.simdgroups * matvec.stage_bytes(n_x)
    used = n_x * keep * dtype.size + stage + 4 * floats * plan.tile
    used += matvec.POINTS_BYTES if points else 0
    assert used + 4 * (48 + 8) <= matvec.THREADGROUP_BYTES  # slots and places of eight rows
    assert plan.rows in (1, 2) or plan.rows % 4 == 0


@pytest.mark.parametrize(("s", "dtype"), [*product(range(1, matvec.MAX_ROWS + 1), DTYPES)])
def test_threadgroup_memory(s: int, dtype: Any) -> None:
    for n_in, n_rows, n_maps in PROJECTIONS:
        floats = n_maps * s
        check(matvec.tiling(s, n_in, dtype, n_rows, floats), s, n_in, dtype, floats)
    for n_in, n_rows, n_chosen in ENDS:
        floats = s * (1 + max(4, n_chosen + 1)) if n_chosen else s
        plan = matvec.tiling(s, n_in, dtype, n_rows, floats, expand_rows(s), points=n_chosen > 0)
        assert plan.tile % PART == 0
        check(plan, s, n_in, dtype, floats, points=n_chosen > 0)


def test_one_row_is_staged_whole() -> None:
    """All inputs of V4-Flash in bfloat16, so that the weights are read in whole rows."""
    for n_in, n_rows, n_maps in [*PROJECTIONS[:4], PROJECTIONS[8]]:
        plan = matvec.tiling(1, n_in, mx.bfloat16, n_rows, n_maps)
        assert plan.staged(1, n_in, mx.bfloat16) == n_in and plan.simdgroups == 8
    for (n_in, n_rows, n_chosen), floats, simdgroups in zip(ENDS[:2], (1, 8), (6, 8), strict=True):
        points = n_chosen > 0
        plan = matvec.tiling(1, n_in, mx.bfloat16, n_rows, floats, expand_rows(1), points)
        assert plan.staged(1, n_in, mx.bfloat16) == n_in and plan.simdgroups == simdgroups
