"""What the encoders' inner loops share: how they are compiled, and float16 scales.

The loops run on plain arrays without the interpreter's lock, so that Python threads share the
rows. numba keeps float32 arithmetic only where no Python number takes part; hence the constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])

F32 = np.float32
ZERO = F32(0)
ONE = F32(1)
TWO = F32(2)
HALF = F32(0.5)
LARGEST = F32(3e38)
"""An error no encoding reaches."""

_FAST = {"reassoc", "contract", "nsz", "nnan", "ninf", "arcp"}
"""Inputs are checked to be finite, so sums may be reordered for the vector units."""


def compiled(function: Function) -> Function:
    """Machine code on the first call, kept on disk for the next process."""
    return cast(Function, numba.njit(nogil=True, cache=True, fastmath=_FAST)(function))


@compiled
def to_half(value: Any) -> int:
    """The bits of the float16 nearest to a finite value >= 0; the largest one beyond its range."""
    if value <= 0.0:
        return 0
    mantissa, exponent = math.frexp(value)
    if exponent < -13:  # subnormal: multiples of 2^-24
        return int(np.rint(math.ldexp(value, 24)))
    bits = ((exponent + 13) << 10) + int(np.rint(mantissa * 2048.0))
    return min(bits, 0x7BFF)


@compiled
def from_half(bits: int) -> np.float32:
    """The value of non-negative float16 bits."""
    exponent, mantissa = bits >> 10, bits & 1023
    if exponent == 0:
        return F32(math.ldexp(float(mantissa), -24))
    return F32(math.ldexp(float(mantissa + 1024), exponent - 25))


@compiled
def put_half(out: Any, at: int, bits: int) -> None:
    """Write float16 bits at byte `at` of out, little-endian."""
    out[at] = np.uint8(bits & 255)
    out[at + 1] = np.uint8(bits >> 8)
