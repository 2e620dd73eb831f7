"""Images made of token ids alone, so that any reader can tell whether one is what was saved."""

import hashlib
from typing import Any

import numpy as np

from ds4py.cache.snapshot import Image

RATIOS = {"attn4": 4, "index4": 4, "attn128": 128}
WIDTHS = {"attn4": 20, "index4": 12, "attn128": 20}


def ids(seed: int, n: int, shared: int = 0) -> np.ndarray[Any, Any]:
    """n token ids; the first `shared` are those of every other seed."""
    common = np.random.default_rng(0).integers(0, 1000, n)
    own = np.random.default_rng(seed).integers(0, 1000, n)
    return np.where(np.arange(n) < shared, common, own).astype(np.int32)


def text(tokens: np.ndarray[Any, Any]) -> bytes:
    return b"".join(b"%d " % token for token in tokens)


def image(tokens: np.ndarray[Any, Any], start: int = 0) -> Image:
    """Rows that depend on all tokens before them, as a model's do."""
    rows = {}
    for name, ratio in RATIOS.items():
        made = [
            _bytes(f"{name} {j}", tokens[: ratio * (j + 1)], 2 * WIDTHS[name])
            for j in range(start // ratio, len(tokens) // ratio)
        ]
        stacked = np.array(made, np.uint8).reshape(-1, 2, WIDTHS[name])
        rows[name] = stacked.swapaxes(0, 1)
    frontier = {
        "window": _bytes("window", tokens, 500).reshape(2, 5, 50),
        "values.attn4": _bytes("values", tokens, 400).view(np.float32).reshape(2, 5, 10),
        "streams": _bytes("streams", tokens, 80).view(np.float32).reshape(1, 2, 10),
    }
    return Image(tokens, start, rows, RATIOS, frontier, seed=7)


def same(a: Image, b: Image) -> bool:
    """Whether two images agree to the last bit."""
    pairs = [(a.tokens, b.tokens)]
    pairs += [(a.rows[n], b.rows[n]) for n in RATIOS]
    pairs += [(a.frontier[n], b.frontier[n]) for n in a.frontier]
    return a.seed == b.seed and all(x.tobytes() == y.tobytes() for x, y in pairs)


def _bytes(name: str, tokens: np.ndarray[Any, Any], n: int) -> np.ndarray[Any, Any]:
    key = hashlib.sha256(name.encode() + tokens.tobytes()).digest()
    return np.frombuffer(hashlib.shake_128(key).digest(n), np.uint8).copy()
