"""Encoders of the formats with a minimum: Q4_K and Q2_K.

A block is runs of values; run j decodes to d s_j q - dmin m_j with small integers s_j and m_j. The
order of work: the best free scale and minimum of every run; d and dmin whose multiples lie near
them; then in turns the best integers and codes for that d and dmin, and the best d and dmin for
those integers and codes. The error never rises, and the last state that lowered it is written.
"""

from __future__ import annotations

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

_ROUNDS = 3
"""Turns of integers and scales. A fourth lowers the error by 0.1 %."""


@compiled
def _sums(x: Any, w: Any, low: Any, inverse: Any, top: Any) -> Any:
    """With q the code of x on the grid low + q / inverse: sums of w q, w q^2 and w q x."""
    sq, sqq, sqx = ZERO, ZERO, ZERO
    for i in range(x.size):
        q = min(max(np.rint((x[i] - low) * inverse), ZERO), top)
        wq = w[i] * q
        sq += wq
        sqq += wq * q
        sqx += wq * x[i]
    return sq, sqq, sqx


@compiled
def _line(sw: Any, sx: Any, sq: Any, sqq: Any, sqx: Any) -> Any:
    """Least squares of x = scale q - least with scale, least >= 0, and by how much it lowers
    the sum of w x^2."""
    det = sw * sqq - sq * sq
    if det > ZERO:
        scale = (sw * sqx - sx * sq) / det
        least = (sq * sqx - sqq * sx) / det
        if scale > ZERO and least >= ZERO:
            return scale, least, scale * sqx - least * sx
    if sqx > ZERO and sqq > ZERO:
        return sqx / sqq, ZERO, sqx * sqx / sqq
    least = max(-sx / sw, ZERO)
    return ZERO, least, -least * sx


@compiled
def _free(x: Any, w: Any, top: Any, cuts: Any) -> Any:
    """Scale, least and the scale's curvature of one run, integers left aside.

    Starts at grids that reach from the least to the largest value, each end cut by some of
    `cuts` steps, and follows the best start downhill.
    """
    low, high, sw, sx = x[0], x[0], ZERO, ZERO
    for i in range(x.size):
        low, high = min(low, x[i]), max(high, x[i])
        sw += w[i]
        sx += w[i] * x[i]
    low = min(low, ZERO)
    if high <= low:
        return ZERO, -low, ZERO
    best, scale, least, curve = -ONE, ZERO, ZERO, ZERO
    step = (high - low) / top
    for cut_low in cuts:
        for cut_high in cuts:
            start = low + cut_low * step
            inverse = top / (high - cut_high * step - start)
            sq, sqq, sqx = _sums(x, w, start, inverse, top)
            a, b, gain = _line(sw, sx, sq, sqq, sqx)
            if gain > best:
                best, scale, least, curve = gain, a, b, sqq
    for _ in range(4):
        if scale <= ZERO:
            break
        sq, sqq, sqx = _sums(x, w, -least, ONE / scale, top)
        a, b, gain = _line(sw, sx, sq, sqq, sqx)
        if gain <= best:
            break
        best, scale, least, curve = gain, a, b, sqq
    return scale, least, curve


@compiled
def _unit(values: Any, curves: Any, most: Any) -> int:
    """Bits of the float16 whose multiples 0..most lie nearest to the values, by their curves."""
    largest = ZERO
    for j in range(values.size):
        largest = max(largest, values[j])
    best, bits = LARGEST, 0
    for k in range(25):
        trial = to_half(largest / (most * F32(1.03 - 0.02 * k)))
        if trial == 0:
            continue
        d = from_half(trial)
        error = ZERO
        for j in range(values.size):
            e = values[j] - d * min(np.rint(values[j] / d), most)
            error += curves[j] * e * e
        if error < best:
            best, bits = error, trial
    return bits


@compiled
def _run_error(x: Any, w: Any, scale: Any, least: Any, top: Any) -> Any:
    inverse = ONE / scale if scale > ZERO else ZERO
    error = ZERO
    for i in range(x.size):
        q = min(max(np.rint((x[i] + least) * inverse), ZERO), top)
        e = x[i] + least - scale * q
        error += w[i] * e * e
    return error


@compiled
def _integers(x: Any, w: Any, d: Any, dmin: Any, top: Any, most: int, s: int, m: int) -> Any:
    """The best s and m of a run near the given ones, and their error."""
    sw, sx = ZERO, ZERO
    for i in range(x.size):
        sw += w[i]
        sx += w[i] * x[i]
    sq = _sums(x, w, -dmin * F32(m), ONE / (d * F32(s)), top)[0] if s and d > ZERO else ZERO
    best, best_s, best_m = LARGEST, s, m
    for trial in range(max(s - 3, 0), min(s + 3, most) + 1):
        scale = d * F32(trial)
        # The minimum that keeps the mean where it is.
        guess = int((scale * sq - sx) / (sw * dmin)) if dmin > ZERO else 0
        for k in range(max(guess - 1, 0), max(min(guess + 2, most), 0) + 1):
            error = _run_error(x, w, scale, dmin * F32(min(k, most)), top)
            if error < best:
                best, best_s, best_m = error, trial, min(k, most)
    return best_s, best_m, best


@compiled
def _units_again(x: Any, w: Any, d: Any, dmin: Any, top: Any, s: Any, m: Any) -> Any:
    """Least squares of d and dmin for all codes of the block as they are."""
    n = x.shape[1]
    uu, uv, vv, ux, vx = ZERO, ZERO, ZERO, ZERO, ZERO
    for j in range(x.shape[0]):
        sj, mj = F32(s[j]), F32(m[j])
        scale = d * sj
        inverse = ONE / scale if scale > ZERO else ZERO
        sw, sx = ZERO, ZERO
        for i in range(n):
            sw += w[j, i]
            sx += w[j, i] * x[j, i]
        sq, sqq, sqx = _sums(x[j], w[j], -dmin * mj, inverse, top)
        uu += sj * sj * sqq
        uv -= sj * mj * sq
        vv += mj * mj * sw
        ux += sj * sqx
        vx -= mj * sx
    det = uu * vv - uv * uv
    if det <= F32(1e-6) * uu * vv:
        return (ux / uu if uu > ZERO and dmin <= ZERO else d), dmin
    return (ux * vv - vx * uv) / det, (vx * uu - ux * uv) / det


@compiled
def _block(x: Any, w: Any, top: Any, most: int, cuts: Any, work: Any, s: Any, m: Any) -> Any:
    """Bits of d and dmin; s and m [runs] int64 of a block x, w [runs, n]. work [4, runs] f32."""
    runs = x.shape[0]
    for j in range(runs):
        work[0, j], work[1, j], work[2, j] = _free(x[j], w[j], top, cuts)
        work[3, j] = w[j].sum()
    d_bits = _unit(work[0], work[2], F32(most))
    m_bits = _unit(work[1], work[3], F32(most))
    trial_s, trial_m = np.empty_like(s), np.empty_like(m)
    d, dmin = from_half(d_bits), from_half(m_bits)
    for j in range(runs):
        trial_s[j] = min(int(np.rint(work[0, j] / d)), most) if d > ZERO else 0
        trial_m[j] = min(int(np.rint(work[1, j] / dmin)), most) if dmin > ZERO else 0
    best, best_d, best_m = LARGEST, 0, 0
    for _ in range(_ROUNDS):
        total = ZERO
        for j in range(runs):
            trial_s[j], trial_m[j], error = _integers(
                x[j], w[j], d, dmin, top, most, trial_s[j], trial_m[j]
            )
            total += error
        if total >= best:
            break
        best, best_d, best_m = total, d_bits, m_bits
        s[:], m[:] = trial_s, trial_m
        d, dmin = _units_again(x, w, d, dmin, top, s, m)
        d_bits, m_bits = to_half(d), to_half(dmin)
        d, dmin = from_half(d_bits), from_half(m_bits)
    return best_d, best_m


@compiled
def _codes(x: Any, d: Any, dmin: Any, top: Any, s: Any, m: Any, q: Any) -> None:
    """The codes of a block x [runs, n] into q [runs * n] uint8."""
    n = x.shape[1]
    for j in range(x.shape[0]):
        scale, least = d * F32(s[j]), dmin * F32(m[j])
        inverse = ONE / scale if scale > ZERO else ZERO
        for i in range(n):
            q[j * n + i] = np.uint8(min(max(np.rint((x[j, i] + least) * inverse), ZERO), top))


# More cuts, or integers tried further away, gain 0.5 % and cost half as much time again; with free
# scales instead of integers the error would be 3 % (Q2_K) and 1 % (Q4_K) lower.
_Q2_CUTS = np.array([-0.2, 0, 0.2, 0.4], np.float32)
_Q4_CUTS = np.array([-0.3, 0, 0.3, 0.6], np.float32)


@compiled
def q2_k(x: Any, w: Any, out: Any) -> None:
    """x [rows, blocks, 256], w [blocks, 256] -> out [rows, blocks, 84] uint8."""
    s, m, work = np.empty(16, np.int64), np.empty(16, np.int64), np.empty((4, 16), np.float32)
    q = np.empty(256, np.uint8)
    top = F32(3)
    for r in range(x.shape[0]):
        for b in range(x.shape[1]):
            runs, ob = x[r, b].reshape(16, 16), out[r, b]
            d, dmin = _block(runs, w[b].reshape(16, 16), top, 15, _Q2_CUTS, work, s, m)
            _codes(runs, from_half(d), from_half(dmin), top, s, m, q)
            for j in range(16):
                ob[j] = s[j] | m[j] << 4
            for h in range(2):
                p = q[128 * h : 128 * h + 128]
                for i in range(32):
                    ob[16 + 32 * h + i] = p[i] | p[32 + i] << 2 | p[64 + i] << 4 | p[96 + i] << 6
            put_half(ob, 80, d)
            put_half(ob, 82, dmin)


@compiled
def q4_k(x: Any, w: Any, out: Any) -> None:
    """x [rows, blocks, 256], w [blocks, 256] -> out [rows, blocks, 144] uint8."""
    s, m, work = np.empty(8, np.int64), np.empty(8, np.int64), np.empty((4, 8), np.float32)
    q = np.empty(256, np.uint8)
    top = F32(15)
    for r in range(x.shape[0]):
        for b in range(x.shape[1]):
            runs, ob = x[r, b].reshape(8, 32), out[r, b]
            d, dmin = _block(runs, w[b].reshape(8, 32), top, 63, _Q4_CUTS, work, s, m)
            _codes(runs, from_half(d), from_half(dmin), top, s, m, q)
            put_half(ob, 0, d)
            put_half(ob, 2, dmin)
            for j in range(4):
                ob[4 + j] = s[j] | (s[4 + j] >> 4) << 6
                ob[8 + j] = m[j] | (m[4 + j] >> 4) << 6
                ob[12 + j] = (s[4 + j] & 15) | (m[4 + j] & 15) << 4
            for c in range(4):
                for i in range(32):
                    ob[16 + 32 * c + i] = q[64 * c + i] | q[64 * c + 32 + i] << 4
