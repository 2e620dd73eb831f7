"""Encoder of IQ2_XXS: the scale, the points and the signs are chosen together.

A block is 8 groups of 4 vectors of 8 values; a vector is one of 256 points with positive
coordinates, times signs of which an even number is minus, times the group's scale, which is
d (k + 1/2) / 4 with k in 0..15. For scale s a vector costs, up to a constant,

    s^2 Q - 2 s P      Q = sum w g^2,   P = sum w |x| g - 2 min(w |x| g) where signs must give way:

the least loss among the eight flips that make the minuses even depends on the point g. P and Q do
not depend on s, so the points that are best for any scale are the corners of the lower hull of
(Q, P): five or so of the 256. They are found once, by bisection; after that every scale is tried
against these few alone. The choice of points and signs is therefore exact for the scale chosen;
d itself is searched on a grid and by least squares.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ds4py.formats.gguf_blocks.tables import IQ2XXS_GRID
from ds4py.quant.encode_compiled import (
    F32,
    HALF,
    LARGEST,
    ONE,
    TWO,
    ZERO,
    compiled,
    from_half,
    put_half,
    to_half,
)

_GRID = np.ascontiguousarray(IQ2XXS_GRID.T)
_SQUARES = _GRID * _GRID
_TINY = F32(1e-10)
"""Groups with a smaller scale are zeros: the least d of a block is 2^-24."""
_TOP = F32(IQ2XXS_GRID.max())
_MOST = 14
"""Corners kept of a vector; of 10^5 random vectors none had more than 11."""
_REACH = F32(5)
"""Scales from 1/5 to 5 times a group's rough one are searched exactly."""
_FACTORS = np.geomspace(0.45, 2.4, 12).astype(np.float32)
"""Where the search for a group's own scale begins, times its rough scale."""
_D_STEPS = np.linspace(15.6, 10.6, 6).astype(np.float32)
"""What k + 1/2 the largest scale of a block may become. 17 steps gain 0.05 %, one loses 0.1 %."""


@compiled
def _squares(w: Any, q: Any) -> None:
    """Q of the vectors of a block, w [256], for the 256 points: q [32, 256]."""
    for v in range(32):
        q[v] = ZERO
        for i in range(8):
            for j in range(256):
                q[v, j] += w[8 * v + i] * _SQUARES[i, j]


@compiled
def _products(x: Any, w: Any, p: Any) -> Any:
    """P of the vector x [8] for the 256 points, p [256]; returns the sum of w |x|."""
    a0, a1, a2, a3 = abs(x[0]) * w[0], abs(x[1]) * w[1], abs(x[2]) * w[2], abs(x[3]) * w[3]
    a4, a5, a6, a7 = abs(x[4]) * w[4], abs(x[5]) * w[5], abs(x[6]) * w[6], abs(x[7]) * w[7]
    g = _GRID
    for j in range(256):
        p[j] = ((a0 * g[0, j] + a1 * g[1, j]) + (a2 * g[2, j] + a3 * g[3, j])) + (
            (a4 * g[4, j] + a5 * g[5, j]) + (a6 * g[6, j] + a7 * g[7, j])
        )
    odd = False
    for i in range(8):
        odd ^= x[i] < ZERO
    if odd:
        for j in range(256):
            first = min(min(a0 * g[0, j], a1 * g[1, j]), min(a2 * g[2, j], a3 * g[3, j]))
            second = min(min(a4 * g[4, j], a5 * g[5, j]), min(a6 * g[6, j], a7 * g[7, j]))
            p[j] -= TWO * min(first, second)
    return ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7))


@compiled
def _best_point(p: Any, q: Any, s: Any, bound: Any) -> Any:
    """The point with the least s Q - 2 P, of which none is larger than `bound`.

    Compares integers that carry the point in their low byte: compilers have vector instructions
    for the least of integers, while for the least of floats they keep to the order of the loop.
    The cost keeps 22 bits.
    """
    unit = F32(8e6) / bound
    a, b = s * unit, TWO * unit
    least = np.int32(2**31 - 1)
    for j in range(256):
        least = min(least, np.int32((np.int32(a * q[j] - b * p[j]) << 8) + j))
    return least & 255


@compiled
def _corners(p: Any, q: Any, rough: Any, most: Any, stack: Any, points: Any) -> int:
    """The points that are best for some scale near `rough`, into points; how many there are.

    most [2]: no P and no Q is larger.
    """
    low, high = rough / _REACH, rough * _REACH
    first = _best_point(p, q, low, TWO * most[0] + low * most[1])
    last = _best_point(p, q, high, TWO * most[0] + high * most[1])
    points[0] = first
    if first == last:
        return 1
    points[1] = last
    n = 2
    stack[0, 0], stack[0, 1] = first, last
    depth = 1
    while depth and n < _MOST:
        depth -= 1
        a, b = stack[depth, 0], stack[depth, 1]
        if q[a] <= q[b]:
            continue
        s = TWO * (p[a] - p[b]) / (q[a] - q[b])  # where both cost the same
        c = _best_point(p, q, s, TWO * most[0] + s * most[1])
        here = s * q[a] - TWO * p[a]
        if here - (s * q[c] - TWO * p[c]) <= F32(1e-5) * abs(here):
            continue
        points[n] = c
        n += 1
        stack[depth, 0], stack[depth, 1] = a, c
        stack[depth + 1, 0], stack[depth + 1, 1] = c, b
        depth += 2
    return n


@compiled
def _group_cost(p: Any, q: Any, n: Any, s: Any) -> Any:
    """Cost of a group at scale s: p, q [4, corners], n [4]."""
    total = ZERO
    for v in range(4):
        least = LARGEST
        for c in range(n[v]):
            least = min(least, s * q[v, c] - TWO * p[v, c])
        total += least
    return s * total


@compiled
def _group_sums(p: Any, q: Any, n: Any, s: Any) -> Any:
    """Sums of P and Q of the four points that are best at scale s."""
    sp, sq = ZERO, ZERO
    for v in range(4):
        least, best = LARGEST, 0
        for c in range(n[v]):
            cost = s * q[v, c] - TWO * p[v, c]
            if cost < least:
                least, best = cost, c
        sp += p[v, best]
        sq += q[v, best]
    return sp, sq


@compiled
def _group_scale(p: Any, q: Any, n: Any, rough: Any) -> Any:
    """The best free scale of a group and its cost."""
    best, scale = ZERO, ZERO
    for factor in _FACTORS:
        s = factor * rough
        cost = _group_cost(p, q, n, s)
        if cost < best:
            best, scale = cost, s
    for _ in range(2):
        sp, sq = _group_sums(p, q, n, scale)
        if sp > ZERO and sq > ZERO:
            scale, best = sp / sq, -sp * sp / sq
    return scale, best


@compiled
def _try(p: Any, q: Any, n: Any, free: Any, d: Any, limit: Any, k: Any) -> Any:
    """The best k of the 8 groups for this d, and what they cost more than with free scales.

    free [8, 2]: scale and cost. Gives up once `limit` is passed.
    """
    quarter = d * F32(0.25)
    excess = ZERO
    for g in range(8):
        below = min(max(int(free[g, 0] / quarter - HALF), 0), 15)
        best = LARGEST
        for trial in range(below, min(below + 1, 15) + 1):
            cost = _group_cost(p[g], q[g], n[g], quarter * (F32(trial) + HALF))
            if cost < best:
                best, k[g] = cost, trial
        excess += best - free[g, 1]
        if excess > limit:
            break
    return excess


@compiled
def _search(p: Any, q: Any, n: Any, free: Any, k: Any) -> int:
    """Bits of the best d; k [8] is set to go with it."""
    largest = ZERO
    for g in range(8):
        largest = max(largest, free[g, 0])
    best, bits = LARGEST, 0
    trial_k = np.empty_like(k)
    for step in _D_STEPS:
        trial = to_half(F32(4) * largest / step)
        if trial == 0:
            continue
        cost = _try(p, q, n, free, from_half(trial), best, trial_k)
        if cost < best:
            best, bits = cost, trial
            k[:] = trial_k
    for _ in range(2):
        if bits == 0:
            break
        sp, sq, d = ZERO, ZERO, from_half(bits)
        for g in range(8):
            factor = F32(0.25) * (F32(k[g]) + HALF)
            gp, gq = _group_sums(p[g], q[g], n[g], d * factor)
            sp += factor * gp
            sq += factor * factor * gq
        trial = to_half(sp / sq) if sp > ZERO else 0
        if trial == 0:
            break
        cost = _try(p, q, n, free, from_half(trial), best, trial_k)
        if cost >= best:
            break
        best, bits = cost, trial
        k[:] = trial_k
    return bits


@compiled
def _signs(x: Any, w: Any, point: Any) -> int:
    """7-bit sign index of a vector: with an odd number of minuses the cheapest sign is turned."""
    bits, odd, least, weakest = 0, False, LARGEST, 0
    for i in range(8):
        loss = abs(x[i]) * w[i] * _GRID[i, point]
        if loss < least:
            least, weakest = loss, i
        if x[i] < ZERO:
            bits |= 1 << i
            odd = not odd
    if odd:
        bits ^= 1 << weakest
    return bits & 127


@compiled
def _write(x: Any, w: Any, p: Any, q: Any, n: Any, points: Any, d: Any, k: Any, out: Any) -> None:
    for g in range(8):
        s = d * F32(0.25) * (F32(k[g]) + HALF)
        word = k[g] << 28
        for v in range(4):
            least, best = LARGEST, 0
            for c in range(n[g, v]):
                cost = s * q[g, v, c] - TWO * p[g, v, c]
                if cost < least:
                    least, best = cost, c
            point = points[g, v, best]
            out[2 + 8 * g + v] = point
            at = 32 * g + 8 * v
            word |= _signs(x[at : at + 8], w[at : at + 8], point) << 7 * v
        for i in range(4):
            out[6 + 8 * g + i] = word >> 8 * i & 255


@compiled
def _prepare(x: Any, w: Any, squares: Any, p: Any, q: Any, n: Any, points: Any, free: Any) -> None:
    """Corners of all 32 vectors of a block, and the free scale and cost of each group.

    squares [32, 256]; p, q, points [8, 4, corners], n [8, 4], free [8, 2].
    """
    stack, products = np.empty((_MOST + 2, 2), np.int64), np.empty(256, np.float32)
    for g in range(8):
        sx, sw = ZERO, ZERO
        for i in range(32 * g, 32 * g + 32):
            sx += w[i] * abs(x[i])
            sw += w[i]
        rough = sx / (F32(17) * sw)
        if rough < _TINY:
            n[g], points[g], p[g], q[g], free[g] = 1, 0, ZERO, ONE, ZERO
            continue
        for v in range(4):
            at = 32 * g + 8 * v
            total = _products(x[at : at + 8], w[at : at + 8], products)
            most = (_TOP * total, _TOP * _TOP * sw)
            row = squares[4 * g + v]
            n[g, v] = _corners(products, row, rough, most, stack, points[g, v])
            for c in range(n[g, v]):
                p[g, v, c] = products[points[g, v, c]]
                q[g, v, c] = row[points[g, v, c]]
        free[g] = _group_scale(p[g], q[g], n[g], rough)


@compiled
def iq2_xxs(x: Any, w: Any, out: Any) -> None:
    """x [rows, blocks, 256], w [blocks, 256] -> out [rows, blocks, 66] uint8."""
    p, q = np.empty((8, 4, _MOST), np.float32), np.empty((8, 4, _MOST), np.float32)
    points, n = np.empty((8, 4, _MOST), np.int64), np.empty((8, 4), np.int64)
    free, k = np.empty((8, 2), np.float32), np.zeros(8, np.int64)
    squares = np.empty((32, 256), np.float32)
    for b in range(x.shape[1]):
        wb = w[b]
        _squares(wb, squares)  # the same for all rows
        for r in range(x.shape[0]):
            k[:] = 0
            _prepare(x[r, b], wb, squares, p, q, n, points, free)
            bits = _search(p, q, n, free, k)
            put_half(out[r, b], 0, bits)
            _write(x[r, b], wb, p, q, n, points, from_half(bits), k, out[r, b])
