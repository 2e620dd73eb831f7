"""Drawing the next token, with noise that is a function of (seed, position, token id).

Nothing is carried from one draw to the next, so it does not matter how steps were batched, and a
shader and plain operations draw the same token.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.kernels.build import Launcher
from ds4py.kernels.ops import Array

THREADS = 512
"""Of the kernel, for one row of logits."""
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""Odd constant of the splitmix64 generator: spreads neighbouring positions over all keys."""
SETTINGS = ("temperature", "log_min_p", "repetition", "presence", "frequency")
"""The columns of `settings`."""


def noise_key(seed: int, position: int) -> npt.NDArray[np.uint32]:
    """Two words for the draw after `position` tokens, from splitmix64: uint32 [2]."""
    x = (seed + (position + 1) * GOLDEN_GAMMA) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return np.array([x >> 32, x & 0xFFFFFFFF], np.uint32)


def gumbel(key: Array, n: int) -> Array:
    """Standard Gumbel noise for counters 0..n-1: key uint32 [S, 2] -> float32 [S, n]."""
    high, low = key[:, :1], key[:, 1:]
    bits = _mix(_mix(mx.arange(n, dtype=mx.uint32)[None] + high) ^ low)
    uniform = mx.minimum((bits.astype(mx.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    return -mx.log(-mx.log1p(-uniform))


def _mix(x: Array) -> Array:
    """Two rounds of xor-shift and multiplication; see metal/include/noise.h."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, mx.uint32)
    return x ^ (x >> 16)


def token(
    launcher: Launcher,
    logits: Array,
    settings: Array,
    key: Array,
    lowest: Array,
    in_prompt: Array | None = None,
    counts: Array | None = None,
    bias: Array | None = None,
    greedy: bool = False,
) -> Array:
    """One token of each row in one launch: logits float32 [S, V] -> ids int32 [S].

    settings float32 [S, 5]: SETTINGS. key uint32 [S, 2]. lowest [S]: the smallest logit, after
    everything else, that may be drawn. in_prompt bool and counts float32 [S, V]: what penalties
    look at; bias [S, V]: added after them. greedy: the highest logit, without temperature or noise.
    """
    n, v = logits.shape
    assert settings.shape == (n, len(SETTINGS)) and (in_prompt is None) == (counts is None)
    template = (
        ("V", v),
        ("PENALISED", counts is not None),
        ("BIASED", bias is not None),
        ("GREEDY", greedy),
    )
    optional = (logits if x is None else x for x in (in_prompt, counts, bias))
    (out,) = launcher.launch(
        "sample_token",
        (logits, *optional, lowest, key, settings),
        template,
        (THREADS, n, 1),
        (THREADS, 1, 1),
        [((n,), mx.int32)],
    )
    return out


def token_ref(
    logits: Array,
    settings: Array,
    key: Array,
    lowest: Array,
    in_prompt: Array | None = None,
    counts: Array | None = None,
    bias: Array | None = None,
    greedy: bool = False,
) -> Array:
    """What `token` computes."""
    x = adjusted(logits, settings, in_prompt, counts, bias)
    if not greedy:
        x = x / settings[:, :1]
        limit = mx.maximum(lowest[:, None], x.max(-1, keepdims=True) + settings[:, 1:2])
        x = mx.where(x < limit, -mx.inf, x + gumbel(key, x.shape[1]))
    return mx.argmax(x, axis=-1).astype(mx.int32)


def bound(
    launcher: Launcher,
    logits: Array,
    settings: Array,
    bounds: Array,
    in_prompt: Array | None = None,
    counts: Array | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """Logits after penalties, bias and temperature [S, V], and the smallest of each row inside
    top-k and, of what that leaves, top-p [S]. Ties at a boundary stay together.

    bounds float32 [S, 2]: k, 0 for all, and p; the rest as for `token`.
    """
    n, v = logits.shape
    assert settings.shape == (n, len(SETTINGS)) and bounds.shape == (n, 2)
    assert (in_prompt is None) == (counts is None)
    template = (("V", v), ("PENALISED", counts is not None), ("BIASED", bias is not None))
    optional = (logits if x is None else x for x in (in_prompt, counts, bias))
    scaled, lowest = launcher.launch(
        "sample_bound",
        (logits, *optional, bounds, settings),
        template,
        (THREADS, n, 1),
        (THREADS, 1, 1),
        [((n, v), mx.float32), ((n,), mx.float32)],
    )
    return scaled, lowest


def bound_ref(
    logits: Array,
    settings: Array,
    bounds: Array,
    in_prompt: Array | None = None,
    counts: Array | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array]:
    """What `bound` computes."""
    scaled = adjusted(logits, settings, in_prompt, counts, bias) / settings[:, :1]
    ordered = mx.sort(scaled, axis=1)[:, ::-1]
    n, v = ordered.shape
    k = mx.where(bounds[:, :1] > 0, mx.minimum(bounds[:, :1], v), v).astype(mx.int32)
    lowest = mx.take_along_axis(ordered, k - 1, axis=1)
    p = mx.softmax(mx.where(ordered < lowest, -mx.inf, ordered), axis=1, precise=True)
    p = mx.where(bounds[:, 1:] < 1, p, 0)  # none is ever reached
    kept = mx.cumsum(p, axis=1) - p < bounds[:, 1:]  # what comes before is short of it
    least = mx.where(kept, ordered, mx.inf).min(1, keepdims=True)
    return scaled, mx.maximum(lowest, least).reshape(n)


def adjusted(
    logits: Array,
    settings: Array,
    in_prompt: Array | None,
    counts: Array | None,
    bias: Array | None,
) -> Array:
    """Logits after penalties and bias."""
    if in_prompt is not None:
        assert counts is not None
        repetition, presence, frequency = (settings[:, i : i + 1] for i in (2, 3, 4))
        shrunk = mx.where(logits > 0, logits / repetition, logits * repetition)
        logits = mx.where(mx.logical_or(in_prompt, counts > 0), shrunk, logits)
        logits = logits - presence * (counts > 0) - frequency * counts
    return logits if bias is None else logits + bias
