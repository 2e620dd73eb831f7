"""How a product of packed weight rows with a few activation rows is spread over a GPU.

The other side is metal/include/matvec.h, which says why. Nothing here depends on the device: the
figures follow from the 32 KiB of threadgroup memory that every Apple GPU offers, and from the
number of threadgroups that keeps the largest of them busy.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.kernels.build import Template
from ds4py.kernels.ops import Dtype

MAX_ROWS = 8
"""Activation rows that share one reading of the weights; more are a matrix product."""
UNIT = 256
"""Values that a simdgroup takes at a time, eight a lane."""
FEW_GROUPS = 128
"""Threadgroups below which cores of the largest GPUs (80) would idle."""
SMALL_INPUT, LARGE_INPUT = 10240, 16384
"""Bytes of staged activations that leave room for the weights of 8 and of 4 simdgroups."""


@dataclass(frozen=True)
class Tiling:
    """One launch's tiles of weight rows."""

    simdgroups: int
    """Per threadgroup."""
    rows: int
    """Weight rows per simdgroup, a power of two."""
    staged: int
    """Inputs of each activation row in threadgroup memory at a time."""

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

    @property
    def template(self) -> Template:
        return (("NSG", self.simdgroups), ("ROWS", self.rows), ("KC", self.staged))


def staged(n_x: int, n_in: int, dtype: Dtype, room: int) -> int:
    """How many of `n_in` inputs of `n_x` rows fit `room` bytes: all, or whole units."""
    most = room // (n_x * dtype.size)
    return n_in if n_in <= most else most // UNIT * UNIT


def tiling(n_x: int, n_in: int, dtype: Dtype, n_rows: int, tile: int | None = None) -> Tiling:
    """For `n_rows` weight rows over all matrices; `tile`: so many rows per threadgroup.

    Eight simdgroups where their weights and the activations fit together, else four. A simdgroup
    gets up to 16 rows, so that activations are staged rarely, but never so many that few
    threadgroups are left.
    """
    wide = n_x <= 2 and n_x * n_in * dtype.size <= SMALL_INPUT
    simdgroups = 8 if wide else 4
    keep = staged(n_x, n_in, dtype, SMALL_INPUT if wide else LARGE_INPUT)
    if tile is not None:
        return Tiling(simdgroups, tile // simdgroups, keep)
    rows = 1 if n_x == 1 else 4
    while rows < 16 and n_rows // (2 * rows * simdgroups) >= FEW_GROUPS:
        rows *= 2
    return Tiling(simdgroups, rows, keep)
