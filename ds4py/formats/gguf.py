"""Reading GGUF files: metadata, tensor table and data, every number checked before it is used.

The layout, little-endian: magic, version, the two counts, metadata (key, kind, value), tensor
table (name, dims fastest first, type, offset), padding to the alignment, data. Versions 2 and 3
are the same but for byte order. Tensors are read one at a time. Knows nothing of what keys and
tensors mean, nor how a block is decoded. Source: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ds4py.errors import WeightsError

U8 = npt.NDArray[np.uint8]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Where the file does not say otherwise in `general.alignment`."""
MAX_HEADER_BYTES = 64 << 20
"""Metadata and tensor table of the largest V4 take 15 MB; what claims more is damaged."""
MAX_NAME_BYTES = 65535
MAX_DIMS = 4

KINDS = tuple("u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split())
"""Kinds of metadata values; the position is the number in the file."""
STORAGE = {
    kind: np.dtype(f"<{kind[0]}{int(kind[1:]) // 8}") for kind in KINDS if kind[1:].isdigit()
}
STORAGE["bool"] = np.dtype("u1")
"""How numbers lie in the file."""


class Format(NamedTuple):
    """A tensor type: its number in the file, and its blocks."""

    code: int
    values: int
    """Values in a block; a row is a whole number of blocks."""
    n_bytes: int
    """Bytes of a block."""


FORMATS = {
    "F32": Format(0, 1, 4),
    "F16": Format(1, 1, 2),
    "Q4_0": Format(2, 32, 18),
    "Q4_1": Format(3, 32, 20),
    "Q5_0": Format(6, 32, 22),
    "Q5_1": Format(7, 32, 24),
    "Q8_0": Format(8, 32, 34),
    "Q8_1": Format(9, 32, 40),
    "Q2_K": Format(10, 256, 84),
    "Q3_K": Format(11, 256, 110),
    "Q4_K": Format(12, 256, 144),
    "Q5_K": Format(13, 256, 176),
    "Q6_K": Format(14, 256, 210),
    "Q8_K": Format(15, 256, 292),
    "IQ2_XXS": Format(16, 256, 66),
    "IQ2_XS": Format(17, 256, 74),
    "IQ3_XXS": Format(18, 256, 98),
    "IQ1_S": Format(19, 256, 50),
    "IQ4_NL": Format(20, 32, 18),
    "IQ3_S": Format(21, 256, 110),
    "IQ2_S": Format(22, 256, 82),
    "IQ4_XS": Format(23, 256, 136),
    "I8": Format(24, 1, 1),
    "I16": Format(25, 1, 2),
    "I32": Format(26, 1, 4),
    "I64": Format(27, 1, 8),
    "F64": Format(28, 1, 8),
    "IQ1_M": Format(29, 256, 56),
    "BF16": Format(30, 1, 2),
    "TQ1_0": Format(34, 256, 54),
    "TQ2_0": Format(35, 256, 66),
    "MXFP4": Format(39, 32, 17),
}
"""Every type whose size is known, so that a file can be described whatever it holds."""
_BY_CODE = {item.code: name for name, item in FORMATS.items()}


class Field(NamedTuple):
    """A metadata value. `kind` is one of KINDS; of an array, that of its items with `[]` behind.

    Arrays of numbers are numpy arrays, of strings lists.
    """

    kind: str
    value: Any


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies, and what it is."""

    file: Path
    name: str
    type: str
    dims: tuple[int, ...]
    """As in the file: fastest first."""
    offset: int
    """First byte in the file."""

    @property
    def n_bytes(self) -> int:
        return size_of(self.type, self.dims)

    def read(self, start: int = 0, n_bytes: int | None = None) -> U8:
        """`n_bytes` (default: all) bytes from byte `start` of the tensor. Raises WeightsError."""
        count = self.n_bytes - start if n_bytes is None else n_bytes
        try:
            data = np.fromfile(self.file, np.uint8, count, offset=self.offset + start)
        except OSError as exc:
            raise WeightsError(f"{self.file} cannot be read ({exc})") from exc
        if data.nbytes != count:
            raise WeightsError(
                f"{self.file} ends inside {self.name}, which it held when it was opened; fetch "
                "the file again"
            )
        return data


@dataclass(frozen=True)
class GGUF:
    """What a file says about itself."""

    path: Path
    version: int
    alignment: int
    metadata: dict[str, Field] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)


def size_of(type_name: str, dims: Sequence[int]) -> int:
    """Bytes of a tensor; dims[0] must be a whole number of blocks."""
    item = FORMATS[type_name]
    return prod(dims) // item.values * item.n_bytes


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF file does."""
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def read(path: Path) -> GGUF:
    """Metadata and tensor table of a file. Raises WeightsError naming key or tensor."""
    try:
        with open(path, "rb") as stream:
            cursor = _Cursor(path, stream, os.fstat(stream.fileno()).st_size)
            return _read(path, cursor)
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read ({os.strerror(exc.errno or 0)})") from exc


class _Cursor:
    """Reads forward through the header; nothing is read that the file cannot hold."""

    def __init__(self, path: Path, stream: BinaryIO, size: int):
        self.path, self.stream, self.size, self.position = path, stream, size, 0
        self.limit = min(size, MAX_HEADER_BYTES)

    def need(self, n_bytes: int, what: str) -> None:
        if n_bytes > self.limit - self.position:
            whole = "file" if self.limit == self.size else "longest header this program reads"
            raise WeightsError(
                f"{self.path} is truncated or damaged: {what} claims {n_bytes} bytes at byte "
                f"{self.position}, but the {whole} has {self.limit} bytes"
            )

    def take(self, n_bytes: int, what: str) -> bytes:
        self.need(n_bytes, what)
        data = self.stream.read(n_bytes)
        if len(data) != n_bytes:  # the file shrank since its size was asked for
            raise WeightsError(f"{self.path} ends inside {what}; fetch the file again")
        self.position += n_bytes
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.u64(what)
        if longest is not None and length > longest:
            raise WeightsError(
                f"{self.path} is damaged: {what} claims {length} bytes; need at most {longest}"
            )
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as exc:
            raise WeightsError(f"{self.path}: {what} is not UTF-8 ({exc.reason})") from exc

    def field(self, key: str) -> Field:
        kind = self.kind(key)
        if kind == "string":
            return Field(kind, self.string(key))
        if kind != "array":
            return Field(kind, self.numbers(kind, 1, key)[0].item())
        kind, count = self.kind(key), self.u64(key)
        if kind == "array":
            raise WeightsError(f"{self.path}: {key} is an array of arrays; need one of numbers")
        if kind != "string":
            return Field(f"{kind}[]", self.numbers(kind, count, key))
        self.need(8 * count, key)  # the length of each
        return Field("string[]", [self.string(f"{key}[{i}]") for i in range(count)])

    def kind(self, key: str) -> str:
        code = self.u32(key)
        if code >= len(KINDS):
            raise WeightsError(
                f"{self.path}: {key} has the unknown kind {code}; known are 0 to {len(KINDS) - 1}"
            )
        return KINDS[code]

    def numbers(self, kind: str, count: int, key: str) -> npt.NDArray[Any]:
        storage = STORAGE[kind]
        data = np.frombuffer(self.take(count * storage.itemsize, key), storage)
        if kind != "bool":
            return data
        if data.max(initial=0) > 1:
            raise WeightsError(f"{self.path}: {key} is {data.max()}; a bool is 0 or 1")
        return data.astype(np.bool_)


def _read(path: Path, cursor: _Cursor) -> GGUF:
    version = _version(path, cursor)
    n_tensors, n_fields = cursor.u64("the tensor count"), cursor.u64("the metadata count")
    cursor.need(13 * n_fields, "the metadata")  # each has at least a length, a kind and a byte
    metadata: dict[str, Field] = {}
    for i in range(n_fields):
        key = cursor.string(f"the name of metadata key {i}", MAX_NAME_BYTES)
        shown = _shown(key)
        if key in metadata:
            raise WeightsError(f"{path} has the metadata key {shown} twice")
        metadata[key] = cursor.field(shown)
    alignment = alignment_of(path, metadata)
    cursor.need(32 * n_tensors, "the tensor table")  # a length, a dim count, a dim, type, offset
    entries = [_entry(cursor, i) for i in range(n_tensors)]
    start = padded(cursor.position, alignment)
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        if entry.name in tensors:
            raise WeightsError(f"{path} has the tensor {_shown(entry.name)} twice")
        tensors[entry.name] = _placed(entry, start, alignment, cursor.size)
    _check_overlap(path, tensors)
    return GGUF(path, version, alignment, metadata, tensors)


def _version(path: Path, cursor: _Cursor) -> int:
    if cursor.size < 24 or cursor.take(4, "the magic") != MAGIC:
        raise WeightsError(f"{path} ({cursor.size} bytes) is not a GGUF file")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        seen = f"version {version}" if swapped not in VERSIONS else "big-endian"
        raise WeightsError(f"{path} is {seen}; need little-endian GGUF of version 2 or 3")
    return version


def alignment_of(path: Path, metadata: Mapping[str, Field]) -> int:
    given = metadata.get("general.alignment", Field("u32", ALIGNMENT))
    value = given.value
    if given.kind != "u32" or not 0 < value <= MAX_HEADER_BYTES or value & (value - 1):
        raise WeightsError(
            f"{path}: general.alignment is {given.kind} {value}; need a power of two as u32"
        )
    return int(value)


def _shown(name: str) -> str:
    """A name from the file, fit for a line: escaped and cut."""
    text = name if name.isprintable() else repr(name)[1:-1]
    return text if len(text) <= 120 else text[:120] + "..."


def _entry(cursor: _Cursor, index: int) -> TensorInfo:
    """A row of the table; `offset` still counts from the start of the data."""
    path, number = cursor.path, f"tensor {index}"
    name = cursor.string(f"the name of {number}", MAX_NAME_BYTES)
    shown = _shown(name)
    n_dims = cursor.u32(shown)
    if not 1 <= n_dims <= MAX_DIMS:
        raise WeightsError(f"{path}: {shown} has {n_dims} dims; need 1 to {MAX_DIMS}")
    dims = tuple(cursor.u64(shown) for _ in range(n_dims))
    code, offset = cursor.u32(shown), cursor.u64(shown)
    if code not in _BY_CODE:
        raise WeightsError(f"{path}: {shown} has the unknown tensor type {code}")
    block = FORMATS[_BY_CODE[code]].values
    if min(dims) < 1 or dims[0] % block:
        raise WeightsError(
            f"{path}: {shown} has dims {list(dims)}; {_BY_CODE[code]} needs them positive and the "
            f"first a multiple of {block}"
        )
    return TensorInfo(path, name, _BY_CODE[code], dims, offset)


def _placed(entry: TensorInfo, start: int, alignment: int, size: int) -> TensorInfo:
    shown = _shown(entry.name)
    if entry.offset % alignment:
        raise WeightsError(
            f"{entry.file}: {shown} lies at offset {entry.offset}, which is no multiple of the "
            f"alignment {alignment}"
        )
    end = start + entry.offset + entry.n_bytes
    if end > size:
        raise WeightsError(
            f"{entry.file} has {size} bytes but {shown} ({entry.type}{list(entry.dims)}) ends at "
            f"byte {end}; the download looks incomplete, fetch the file again"
        )
    return TensorInfo(entry.file, entry.name, entry.type, entry.dims, start + entry.offset)


def _check_overlap(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for a, b in pairwise(sorted(tensors.values(), key=lambda t: t.offset)):
        if b.offset < a.offset + a.n_bytes:
            raise WeightsError(
                f"{path}: {_shown(a.name)} ({a.n_bytes} bytes from byte {a.offset}) overlaps "
                f"{_shown(b.name)}, which begins at byte {b.offset}"
            )


def padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
