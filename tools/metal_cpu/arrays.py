"""Arrays of numpy and of MLX, their type names, and the memory a kernel may touch.

numpy has no bfloat16: such arrays have the dtype `ml_dtypes.bfloat16`, whose bytes are the same.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from tools.metal_cpu.source import TYPES

try:
    import ml_dtypes
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "tools/metal_cpu needs the package 'ml_dtypes' (bfloat16 arrays in numpy), which is not "
        "installed; run: pip install '.[shaders]'"
    ) from exc

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def dtype_name(dtype: Any) -> str:
    """The name of a numpy or MLX dtype, or of a type given by name. Raises TypeError."""
    if isinstance(dtype, mx.Dtype):
        name = str(dtype).rpartition(".")[2]
    elif dtype == "bfloat16":
        name = "bfloat16"
    else:
        name = np.dtype(dtype).name
    if name not in TYPES:
        raise TypeError(f"dtype {name} does not exist in Metal; need one of {', '.join(TYPES)}")
    return name


def numpy_dtype(name: str) -> np.dtype[Any]:
    return BFLOAT16 if name == "bfloat16" else np.dtype(name)


def as_numpy(value: Any) -> np.ndarray:
    """An input as a numpy array, without a copy where that is possible.

    Python numbers become 0-dimensional arrays of the types MLX gives them.
    """
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, mx.array):
        if value.dtype == mx.bfloat16:
            return np.asarray(value.view(mx.uint16)).view(BFLOAT16)
        return np.asarray(value)
    if isinstance(value, bool):
        return np.array(value, np.bool_)
    if isinstance(value, int):
        return np.array(value, np.int32)
    if isinstance(value, float):
        return np.array(value, np.float32)
    return np.asarray(value)


def as_mlx(value: np.ndarray) -> mx.array:
    if value.dtype == BFLOAT16:
        return mx.array(value.view(np.uint16)).view(mx.bfloat16)
    return mx.array(value)


def memory(value: np.ndarray) -> np.ndarray:
    """The bytes from the first to the last element of an array with any strides >= 0."""
    if value.flags.c_contiguous:
        return value
    if any(s < 0 for s in value.strides):
        raise ValueError("an input has negative strides, which MLX arrays never have")
    last = sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True))
    n = last // value.itemsize + 1 if value.size else 0
    return np.lib.stride_tricks.as_strided(value, (n,), (value.itemsize,))
