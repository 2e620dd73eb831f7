"""Writes safetensors files with DeepSeek's storage formats, which numpy has no types for.

A stored tensor is its format's name (as in a safetensors header), its shape and its bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Stored(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def float32(x: NDArray[Any]) -> Stored:
    return Stored("F32", x.shape, np.ascontiguousarray(x, "<f4").tobytes())


def int64(x: NDArray[Any]) -> Stored:
    return Stored("I64", x.shape, np.ascontiguousarray(x, "<i8").tobytes())


def coded(dtype: str, codes: NDArray[Any]) -> Stored:
    """One byte per stored element: F8_E4M3, F8_E8M0 or, with two FP4 values to a byte, I8."""
    return Stored(dtype, codes.shape, np.ascontiguousarray(codes, np.uint8).tobytes())


def to_bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of the nearest BF16 values, ties to even; finite input."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def bfloat16(x: NDArray[np.float32]) -> Stored:
    return Stored("BF16", x.shape, to_bfloat16(x).astype("<u2").tobytes())


def write(path: Path, tensors: Mapping[str, Stored]) -> None:
    """A safetensors file: the header's length, the header, the data (where offsets start)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor.data for tensor in tensors.values())


def read(path: Path) -> dict[str, NDArray[Any]]:
    """The F32, BF16 and I64 tensors of a file that `write` wrote, BF16 widened to float32."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    kinds = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "I64": np.dtype("<i8")}
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        values = np.frombuffer(data[begin:end], kinds[entry["dtype"]]).reshape(entry["shape"])
        found[name] = from_bfloat16(values) if entry["dtype"] == "BF16" else values
    return found
