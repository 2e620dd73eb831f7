"""Reading safetensors files tensor by tensor, with every header field checked before it is used.

The `safetensors` package cannot hand E8M0 and packed E2M1 bytes to numpy, and it maps whole files;
this reader seeks to one tensor at a time, so that peak memory is one tensor. Format: 8 bytes
little-endian header length, JSON header, data. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.errors import WeightsError

MAX_HEADER_BYTES = 256 << 20
"""Flash's largest header is 8 MB; a length beyond this is not a safetensors file."""

STORAGE: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.uint8,
    "U8": np.uint8,
    "BOOL": np.uint8,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
}
"""numpy type that holds each dtype's bits; formats numpy lacks come back as raw bits."""


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""
    n_bytes: int

    def read(self) -> npt.NDArray[Any]:
        """The tensor's bits as a fresh numpy array of `shape`. Raises WeightsError."""
        storage = np.dtype(STORAGE[self.dtype]).newbyteorder("<")
        try:
            with open(self.file, "rb") as stream:
                stream.seek(self.offset)
                data = np.fromfile(stream, storage, self.n_bytes // storage.itemsize)
        except OSError as exc:
            raise WeightsError(f"{self.file} cannot be read ({exc})") from exc
        if data.nbytes != self.n_bytes:
            raise WeightsError(
                f"{self.file} ends at byte {self.offset + data.nbytes} inside a tensor that needs "
                f"{self.n_bytes} bytes; the download looks incomplete"
            )
        return data.reshape(self.shape)

    def map(self) -> npt.NDArray[Any]:
        """The same as `read`, with pages of the file as memory; what is written stays private."""
        storage = np.dtype(STORAGE[self.dtype]).newbyteorder("<")
        try:
            return np.memmap(self.file, storage, "c", self.offset, self.shape)
        except (OSError, ValueError) as exc:
            raise WeightsError(f"{self.file} cannot be mapped ({exc})") from exc


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of one file, by name. Raises WeightsError for anything malformed."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise WeightsError(
                    f"{path} ({size} bytes) is truncated or not a safetensors file: its header "
                    f"claims {length} bytes"
                )
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read ({os.strerror(exc.errno or 0)})") from exc
    except _Twice as exc:
        raise WeightsError(
            f"{path} names {exc} twice in its header; the file is damaged, fetch it again"
        ) from exc
    except ValueError as exc:
        raise WeightsError(f"{path} is not a safetensors file: its header is not JSON") from exc
    if not isinstance(header, dict):
        raise WeightsError(f"{path} is not a safetensors file: its header is not an object")
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, info, 8 + length, size) for name, info in header.items()}
    _check_overlap(path, entries)
    return entries


class _Twice(ValueError):
    """A name that stands twice in one JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members. Raises _Twice where a plain `dict` would keep the last of two."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return members


def _check_overlap(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    placed = sorted((e.offset, e.n_bytes, name) for name, e in entries.items() if e.n_bytes)
    for (start, n_bytes, name), (after, _, other) in pairwise(placed):
        if after < start + n_bytes:
            raise WeightsError(
                f"{path}: {name} ({n_bytes} bytes from byte {start}) overlaps {other}, which "
                f"begins at byte {after}; the file is damaged, fetch it again"
            )


def _entry(path: Path, name: str, info: Any, base: int, size: int) -> TensorEntry:
    try:
        dtype, shape = info["dtype"], tuple(info["shape"])
        begin, end = info["data_offsets"]
        if not all(type(n) is int for n in (*shape, begin, end)):
            raise TypeError("a size that is no whole number")
    except (KeyError, TypeError, ValueError) as exc:
        raise WeightsError(f"{path}: header entry of {name!r} is malformed") from exc
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise WeightsError(
            f"{path}: {name} has dtype {dtype}; known are {', '.join(sorted(STORAGE))}"
        )
    n_items = 1
    for n in shape:
        n_items *= n
    if min((*shape, begin), default=0) < 0 or (
        end - begin != n_items * np.dtype(STORAGE[dtype]).itemsize
    ):
        raise WeightsError(
            f"{path}: {name} says {dtype}{list(shape)} but its data spans {end - begin} bytes"
        )
    if base + end > size:
        raise WeightsError(
            f"{path} has {size} bytes but {name} ends at byte {base + end}; the download looks "
            "incomplete, fetch the file again"
        )
    return TensorEntry(path, dtype, shape, base + begin, end - begin)


def read_directory(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a model directory: the index's shards, else model.safetensors, else every
    *.safetensors file.

    Raises WeightsError: no weights, a missing shard, a tensor in two files or not where the
    index says.
    """
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return _read_sharded(directory, index)
    single = directory / "model.safetensors"
    files = [single] if single.exists() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{directory} holds no *.safetensors file; is it a model directory?")
    tensors: dict[str, TensorEntry] = {}
    for name, entry in _all_entries(files):
        if name in tensors:
            raise WeightsError(f"{name} stands in both {tensors[name].file} and {entry.file}")
        tensors[name] = entry
    return tensors


def _all_entries(files: list[Path]) -> Iterator[tuple[str, TensorEntry]]:
    for path in files:
        yield from read_header(path).items()


def _read_sharded(directory: Path, index: Path) -> dict[str, TensorEntry]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(f"{index} has no readable weight_map ({exc}); fetch it again") from exc
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise WeightsError(
            f"{directory} lacks {len(absent)} of {len(files)} shards ({absent[0]} first); the "
            "download looks incomplete"
        )
    tensors = dict(_all_entries([directory / name for name in files]))
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != Path(file).name:
            raise WeightsError(f"{index} places {name} in {file}, which does not hold it")
    return tensors
