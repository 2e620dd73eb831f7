"""Errors of ggml's own quantisers on fixed data: what the encoders are tested against.

    python tools/make_encode_figures.py LIBRARY VERSION > tests/pure/data/encode_figures.json

LIBRARY is a shared library with `ggml_quantize_chunk`: libggml-base of any llama.cpp build, or
ggml.c and ggml-quants.c of its source compiled with `gcc -O3 -march=native -shared -fPIC`.
VERSION says which. Without an importance ggml has two ways for most formats, no importance and one
of all ones; the better one counts.
"""

import ctypes
import json
import sys
from collections.abc import Iterator
from typing import Any

import gguf
import numpy as np

from ds4py.formats.gguf_blocks import FORMATS, decode

ROWS, COLS = 16, 1024
KINDS = {"gaussian": 0, "student-4": 4, "student-3": 3}
"""Degrees of freedom of the values' distribution; 0 for a gaussian one."""


def _gaussian(rng: Any, *shape: int) -> Any:
    """Box-Muller on the generator's uniform numbers, which no numpy version changes."""
    radius = np.sqrt(-2 * np.log1p(-rng.random(shape)))
    return radius * np.cos(2 * np.pi * rng.random(shape))


def samples() -> Iterator[tuple[str, Any, Any]]:
    """Name, values [ROWS, COLS] float32, importance [COLS] or None."""
    for kind, freedom in KINDS.items():
        rng = np.random.Generator(np.random.PCG64(freedom))
        x = _gaussian(rng, ROWS, COLS)
        if freedom:
            x /= np.sqrt((_gaussian(rng, freedom, ROWS, COLS) ** 2).mean(0))
        importance = np.exp(_gaussian(rng, COLS)).astype(np.float32)
        values = (0.02 * x).astype(np.float32)
        yield kind, values, None
        yield f"{kind}, importance", values, importance


def error(x: Any, y: Any, importance: Any) -> float:
    """Weighted squared error as a share of the weighted sum of squares."""
    w = np.ones(x.shape[1]) if importance is None else importance.astype(np.float64)
    exact = x.astype(np.float64)
    return float((w * (exact - y) ** 2).sum() / (w * exact**2).sum())


def quantize(library: Any, name: str, x: Any, importance: Any) -> Any:
    """ggml's bytes for x [rows, cols]."""
    out = np.zeros((x.shape[0], FORMATS[name].row_bytes(x.shape[1])), np.uint8)
    pointer = None if importance is None else importance.ctypes.data_as(ctypes.c_void_p)
    library.ggml_quantize_chunk(
        ctypes.c_int(gguf.GGMLQuantizationType[name]),
        x.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(x.shape[0]),
        ctypes.c_int64(x.shape[1]),
        pointer,
    )
    return out


def main() -> None:
    library, version = ctypes.CDLL(sys.argv[1]), sys.argv[2]
    figures: dict[str, dict[str, float]] = {name: {} for name in FORMATS}
    for label, x, importance in samples():
        for name in FORMATS:
            given = [np.ones(COLS, np.float32)] if importance is None else [importance]
            if importance is None and name != "IQ2_XXS":  # which requires one
                given.append(None)
            found = [
                error(x, decode(name, quantize(library, name, x, i)), importance) for i in given
            ]
            figures[name][label] = float(f"{min(found):.6g}")
    about = f"errors of ggml's quantisers ({version}), made by tools/make_encode_figures.py"
    print(json.dumps({"about": about, "errors": figures}, indent=1))


if __name__ == "__main__":
    main()
