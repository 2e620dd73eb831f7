"""Writing GGUF files, version 3: streamed tensor by tensor, all or nothing, resumable.

The file is filled beside its place and renamed when it is whole. With an identity, what a killed
run finished is kept and taken up again by the next one that makes the same file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from ds4py.errors import WeightsError
from ds4py.formats.gguf import (
    FORMATS,
    KINDS,
    MAGIC,
    MAX_DIMS,
    STORAGE,
    VERSIONS,
    Field,
    alignment_of,
    padded,
    size_of,
)

MAX_TENSOR_NAME = 63
"""Longest tensor name other readers take."""


class NewTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    type: str
    dims: tuple[int, ...]
    """Fastest first."""
    parts: Callable[[], Iterable[npt.NDArray[Any]]]
    """Its bytes, in order, as arrays of any type; asked for when its turn comes."""


def write(
    path: Path,
    metadata: Mapping[str, Field],
    tensors: Sequence[NewTensor],
    identity: str | None = None,
) -> None:
    """Write a file; memory holds one part of one tensor.

    identity: names what the tensors are made from. A run with the same one goes on behind the
    last tensor that an interrupted run finished; without one nothing is kept.
    Raises WeightsError: a field or tensor that cannot be written, a full or read-only disk.
    """
    alignment = alignment_of(path, metadata)
    header = _header(path, metadata, tensors, alignment)
    partial, journal = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.done")
    try:
        done = 0 if identity is None else _finished(partial, journal, identity, header)
        with open(partial, "r+b" if done else "w+b") as stream:
            if not done:
                journal.unlink(missing_ok=True)
                stream.write(header)
            place = len(header)
            for count, tensor in enumerate(tensors, 1):
                if count > done:
                    stream.seek(place)
                    _write_tensor(path, stream, tensor, alignment)
                    if identity is not None:
                        _sync(stream)
                        _note(journal, identity, count)
                place += padded(size_of(tensor.type, tensor.dims), alignment)
            stream.truncate(place)
            _sync(stream)
        os.replace(partial, path)
        journal.unlink(missing_ok=True)
    except OSError as exc:
        raise WeightsError(f"{path} cannot be written ({exc.strerror})") from exc
    finally:
        if identity is None:
            partial.unlink(missing_ok=True)


def _finished(partial: Path, journal: Path, identity: str, header: bytes) -> int:
    """How many tensors an interrupted run of the same kind has written."""
    try:
        state = json.loads(journal.read_text(encoding="utf-8"))
        with open(partial, "rb") as stream:
            same = stream.read(len(header)) == header and state["identity"] == identity
        return int(state["tensors"]) if same else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _note(journal: Path, identity: str, count: int) -> None:
    beside = journal.with_name(f"{journal.name}.new")
    with open(beside, "w", encoding="utf-8") as stream:
        json.dump({"identity": identity, "tensors": count}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, journal)


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _header(
    path: Path, metadata: Mapping[str, Field], tensors: Sequence[NewTensor], alignment: int
) -> bytes:
    parts = [MAGIC, struct.pack("<IQQ", max(VERSIONS), len(tensors), len(metadata))]
    for key, item in metadata.items():
        try:
            parts += [_string(key), _field(item)]
        except (ValueError, OverflowError, TypeError) as exc:
            raise WeightsError(f"{path}: {key} cannot be written as {item.kind} ({exc})") from exc
    names: set[str] = set()
    offset = 0
    for tensor in tensors:
        _check_new(path, tensor, names)
        names.add(tensor.name)
        n, code = len(tensor.dims), FORMATS[tensor.type].code
        parts += [_string(tensor.name), struct.pack(f"<I{n}Q", n, *tensor.dims)]
        parts.append(struct.pack("<IQ", code, offset))
        offset = padded(offset + size_of(tensor.type, tensor.dims), alignment)
    header = b"".join(parts)
    return header + bytes(padded(len(header), alignment) - len(header))


def _check_new(path: Path, tensor: NewTensor, names: set[str]) -> None:
    n_name, dims = len(tensor.name.encode()), tensor.dims
    if tensor.name in names or not 0 < n_name <= MAX_TENSOR_NAME:
        raise WeightsError(
            f"{path}: {tensor.name!r} cannot name a tensor; need a new name of at most "
            f"{MAX_TENSOR_NAME} bytes"
        )
    block = FORMATS[tensor.type].values
    if not 1 <= len(dims) <= MAX_DIMS or min(dims) < 1 or dims[0] % block:
        raise WeightsError(
            f"{path}: {tensor.name} has dims {list(dims)}; {tensor.type} needs 1 to {MAX_DIMS}, "
            f"positive, the first a multiple of {block}"
        )


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data


def _field(item: Field) -> bytes:
    """Kind and value as bytes. Raises ValueError, OverflowError or TypeError."""
    kind = item.kind.removesuffix("[]")
    code = struct.pack("<I", KINDS.index(kind))
    values = item.value if item.kind.endswith("[]") else [item.value]
    data = b"".join(map(_string, values)) if kind == "string" else _numbers(kind, values)
    if not item.kind.endswith("[]"):
        return code + data
    return struct.pack("<I", KINDS.index("array")) + code + struct.pack("<Q", len(values)) + data


def _numbers(kind: str, values: Any) -> bytes:
    storage = STORAGE[kind]
    given = np.asarray(values)
    if given.ndim != 1 or given.dtype.kind not in "biuf":
        raise ValueError(f"{values!r} is not a number or a list of numbers")
    stored = given.astype(storage)
    if storage.kind != "f" and not np.array_equal(stored.astype(given.dtype), given):
        raise ValueError(f"{values!r} does not fit")
    return stored.tobytes()


def _write_tensor(path: Path, stream: BinaryIO, tensor: NewTensor, alignment: int) -> None:
    need, done = size_of(tensor.type, tensor.dims), 0
    for part in tensor.parts():
        data = np.ascontiguousarray(part)
        done += data.nbytes
        stream.write(data.data)
    if done != need:
        raise WeightsError(
            f"{path}: {tensor.name} came as {done} bytes; {tensor.type}{list(tensor.dims)} has "
            f"{need}"
        )
    stream.write(bytes(padded(need, alignment) - need))
