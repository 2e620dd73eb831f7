"""Encoders of the formats without a minimum: Q8_0, Q6_K and MXFP4.

All three search the scale among those the format can store and keep the one whose weighted error
is smallest; a value is then the nearest of its levels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ds4py.quant.encode_compiled import (
    F32,
    LARGEST,
    ONE,
    ZERO,
    compiled,
    from_half,
    put_half,
    to_half,
)

_Q8_LEVELS = np.array(
    [127, 126, 128, 126.75, 126.5, 126.25, 127.25, 127.5, 127.75, 125.5, 125], np.float32
)
"""What the largest value of a block may become. 127 first: on equal errors the first stays."""


@compiled
def _error(x: Any, w: Any, at: int, n: int, scale: Any, low: Any, high: Any) -> Any:
    """Weighted squared error of n values at the nearest of scale * low..high."""
    inverse = ONE / scale
    total = ZERO
    for i in range(at, at + n):
        q = min(max(np.rint(x[i] * inverse), low), high)
        e = x[i] - scale * q
        total += w[i] * e * e
    return total


@compiled
def q8_0(x: Any, w: Any, out: Any) -> None:
    """x [rows, blocks, 32], w [blocks, 32] -> out [rows, blocks, 34] uint8."""
    low, high = F32(-127), F32(127)
    for r in range(x.shape[0]):
        for b in range(x.shape[1]):
            xb, wb, ob = x[r, b], w[b], out[r, b]
            largest = ZERO
            for i in range(32):
                largest = max(largest, abs(xb[i]))
            best, bits = LARGEST, 0
            for level in _Q8_LEVELS:
                trial = to_half(largest / level)
                if trial:
                    error = _error(xb, wb, 0, 32, from_half(trial), low, high)
                    if error < best:
                        best, bits = error, trial
            put_half(ob, 0, bits)
            inverse = ONE / from_half(bits) if bits else ZERO
            for i in range(32):
                ob[2 + i] = np.uint8(int(min(max(np.rint(xb[i] * inverse), low), high)) & 255)


@compiled
def _q6_k_scales(x: Any, w: Any, d: Any, scales: Any) -> None:
    """The best of the storable scales of each run, signed, into scales [16] int64.

    A run holds -32..31, so the sign of its scale makes the largest value negative.
    """
    low, high = F32(-32), F32(31)
    for j in range(16):
        largest = ZERO
        for i in range(16 * j, 16 * j + 16):
            if abs(x[i]) > abs(largest):
                largest = x[i]
        sign = -1 if largest > ZERO else 1
        guess = int(np.rint(abs(largest) / (F32(32) * d)))
        best, scales[j] = LARGEST, 0
        for s in range(max(guess - 4, 1), min(guess + 5, 127) + 1):
            error = _error(x, w, 16 * j, 16, d * F32(sign * s), low, high)
            if error < best:
                best, scales[j] = error, sign * s


@compiled
def _q6_k_block(x: Any, w: Any, scales: Any, q: Any, out: Any) -> None:
    largest = ZERO
    for i in range(256):
        largest = max(largest, abs(x[i]))
    # The largest run gets scale 122 or so: room for the search on both sides.
    bits = to_half(largest / F32(32 * 122))
    out[:] = 0
    if bits == 0:
        return
    d = from_half(bits)
    _q6_k_scales(x, w, d, scales)
    for j in range(16):
        inverse = ONE / (d * F32(scales[j])) if scales[j] else ZERO
        for i in range(16 * j, 16 * j + 16):
            q[i] = int(min(max(np.rint(x[i] * inverse), F32(-32)), F32(31))) + 32
        out[192 + j] = np.uint8(scales[j] & 255)
    for h in range(2):
        for i in range(64):
            a, b = q[128 * h + i], q[128 * h + 64 + i]
            out[64 * h + i] = np.uint8((a & 15) | (b & 15) << 4)
            shift = 2 * (i // 32)
            out[128 + 32 * h + i % 32] |= np.uint8((a >> 4) << shift | (b >> 4) << (shift + 4))
    put_half(out, 208, bits)


@compiled
def q6_k(x: Any, w: Any, out: Any) -> None:
    """x [rows, blocks, 256], w [blocks, 256] -> out [rows, blocks, 210] uint8."""
    scales, q = np.empty(16, np.int64), np.empty(256, np.int64)
    for r in range(x.shape[0]):
        for b in range(x.shape[1]):
            _q6_k_block(x[r, b], w[b], scales, q, out[r, b])


@compiled
def _e2m1(value: Any) -> Any:
    """Code of the E2M1 magnitude nearest to value >= 0."""
    code = 0
    code += value > F32(0.25)
    code += value > F32(0.75)
    code += value > F32(1.25)
    code += value > F32(1.75)
    code += value > F32(2.5)
    code += value > F32(3.5)
    code += value > F32(5)
    return code


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_TINY = F32(1e-35)
"""Smaller values are zeros: their scale would be no normal float32."""


@compiled
def _mxfp4_exponent(x: Any, w: Any, largest: Any) -> int:
    """Scale byte of a block: one of three around the one that just reaches the largest value."""
    guess = math.frexp(largest)[1] - 3 + 127
    unit = math.ldexp(1.0, 127 - guess)
    best, exponent = LARGEST, guess
    for step in range(-1, 2):
        scale = F32(2.0**step)
        inverse = F32(unit / scale)
        error = ZERO
        for i in range(32):
            value = abs(x[i]) * inverse
            e = scale * (value - _E2M1[_e2m1(value)])
            error += w[i] * e * e
        if error < best:
            best, exponent = error, guess + step
    return min(max(exponent, 1), 254)


@compiled
def mxfp4(x: Any, w: Any, out: Any) -> None:
    """x [rows, blocks, 32], w [blocks, 32] -> out [rows, blocks, 17] uint8."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1]):
            xb, ob = x[r, b], out[r, b]
            largest = ZERO
            for i in range(32):
                largest = max(largest, abs(xb[i]))
            ob[:] = 0
            if largest < _TINY:
                continue
            exponent = _mxfp4_exponent(xb, w[b], largest)
            ob[0] = exponent
            inverse = F32(math.ldexp(1.0, 127 - exponent))
            for i in range(32):
                code = _e2m1(abs(xb[i]) * inverse)
                code += 8 * (xb[i] < ZERO and code > 0)
                ob[1 + i % 16] |= np.uint8(code << (4 * (i // 16)))
