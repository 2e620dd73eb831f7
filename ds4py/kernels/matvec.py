"""How a product of packed weight rows with a few activation rows is spread over a GPU.

The other side is metal/include/matvec.h, which says why. Nothing here depends on the device: the
figures follow from the 32 KiB of threadgroup memory that every Apple GPU offers, and from the
number of threadgroups that keeps the fastest memory busy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ds4py.kernels.build import Template
from ds4py.kernels.ops import Dtype

MAX_ROWS = 8
"""Activation rows that share one reading of the weights; more are a matrix product."""
UNIT = 256
"""Values that a simdgroup takes at a time, eight a lane."""
FEW_GROUPS = 40
"""Threadgroups that a launch is not divided into fewer than: the cores of the largest GPU but those
that are two of it. Each reads all activations: with 40 to 64 of them those are below 2 % of the
weights' bytes over a step of V4-Flash (tests/metal/test_step.py). 40 have 700 KB on their way from
memory at any time, what 800 GB/s bring in 0.9 us."""
MAX_TILE_ROWS = 80
"""Weight rows of a simdgroup: beyond, activations are staged rarely enough."""
THREADGROUP_BYTES, POINTS_BYTES, RESULT_BYTES = 32768, 2048, 4096
"""Threadgroup memory: all, for IQ2_XXS's points, for a tile's results at most."""


def stage_bytes(n_x: int) -> int:
    """Threadgroup memory where a simdgroup stages weights."""
    return 2816 if n_x > 2 else 2432


@dataclass(frozen=True)
class Tiling:
    """One launch's tiles of weight rows."""

    simdgroups: int
    """Per threadgroup."""
    rows: int
    """Weight rows per simdgroup: 1, 2 or a multiple of 4."""
    room: int
    """Bytes of threadgroup memory for activations."""

    @property
    def tile(self) -> int:
        """Weight rows per threadgroup."""
        return self.simdgroups * self.rows

    @property
    def threads(self) -> int:
        return 32 * self.simdgroups

    def tiles(self, n_rows: int) -> int:
        """Threadgroups for one matrix."""
        return -(-n_rows // self.tile)

    def staged(self, n_x: int, n_in: int, dtype: Dtype) -> int:
        """How many of `n_in` inputs of `n_x` rows are staged at a time: all, or whole units."""
        most = self.room // (n_x * dtype.size)
        keep = n_in if n_in <= most else most // UNIT * UNIT
        assert keep, f"{self.room} bytes are no room for {n_x} rows of activations"
        return keep

    @property
    def template(self) -> Template:
        return (("NSG", self.simdgroups), ("ROWS", self.rows))


@lru_cache(1024)
def tiling(
    n_x: int,
    n_in: int,
    dtype: Dtype,
    n_rows: int,
    floats: int,
    rows: int | None = None,
    points: bool = True,
    power: bool = False,
) -> Tiling:
    """For `n_rows` weight rows over all matrices, `floats` kept for each row of a tile.

    Eight or six simdgroups where their weights fit beside one or two whole rows of activations,
    else four. A simdgroup gets up to 80 weight rows, so that activations are staged rarely, but
    never so many that few threadgroups are left. rows: so many instead. points: whether a format
    may be IQ2_XXS. power: rows are a power of two.
    """
    for simdgroups in (8, 6, 4):
        each = rows or _rows(n_x, n_rows, floats, simdgroups)
        each = power_of_two(each) if power else each
        kept = stage_bytes(n_x) * simdgroups + 4 * floats * simdgroups * each + 256
        room = THREADGROUP_BYTES - kept - (POINTS_BYTES if points else 0)
        if simdgroups == 4 or (n_x <= 2 and n_x * n_in * dtype.size <= room):
            break
    return Tiling(simdgroups, each, room)


def least_rows(n_x: int) -> int:
    """Weight rows of a simdgroup: of several activation rows each is used for four of them."""
    return 1 if n_x == 1 else 4


def power_of_two(n: int) -> int:
    """The largest up to n, or 1."""
    return 1 << max(n.bit_length() - 1, 0)


def _rows(n_x: int, n_rows: int, floats: int, simdgroups: int) -> int:
    most = min(MAX_TILE_ROWS, RESULT_BYTES // (4 * floats * simdgroups))
    rows = min(n_rows // (simdgroups * FEW_GROUPS), most)
    rows = rows & -4 if rows >= 4 else min(rows, 2)
    return max(rows, least_rows(n_x))
