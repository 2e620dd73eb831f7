"""One file of named arrays that is either whole or rejected.

Little-endian. Offset 0: magic, 8 bytes. 8: version, u32. 12: length of the header, u32. 16: length
of the payload, u64. 24: CRC-32 of the payload, u32. 28: CRC-32 of the 28 bytes before and the
header, u32. 32: the header, JSON in UTF-8. Then the payload: the arrays back to back, in the order
of the header's "arrays", each [name, dtype, shape]. Nothing may follow.

A file is written beside its place, flushed and renamed: after a kill or a power cut there is the
old file or the new one. No length is believed before it agrees with the file's own.
"""

from __future__ import annotations

import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ds4py.errors import InputError

MAGIC = b"ds4-kv\r\n"
VERSION = 1
TEMPORARY = ".writing-"
"""Begins the name of a file that is not yet in its place."""

_PREFIX = struct.Struct("<8sIIQI")
_CRC = struct.Struct("<I")
_DTYPES = {name: np.dtype(name).newbyteorder("<") for name in "u1 u2 i4 f4 f8".split()}
_MOST_HEADER = 1 << 20

Arrays = dict[str, npt.NDArray[Any]]


class RecordError(InputError):
    """A file is no record, of another version, or damaged."""


def write(path: Path, header: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> int:
    """Write a record, all or nothing, readable by its owner alone; its bytes. Raises OSError."""
    listed, parts = [], []
    for name, array in arrays.items():
        kind = f"{array.dtype.kind}{array.dtype.itemsize}"
        listed.append([name, kind, list(array.shape)])
        parts.append(np.ascontiguousarray(array, _DTYPES[kind]).reshape(-1).view(np.uint8).data)
    text = json.dumps({**header, "arrays": listed}, separators=(",", ":")).encode()
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    prefix = _PREFIX.pack(MAGIC, VERSION, len(text), sum(map(len, parts)), crc)
    prefix += _CRC.pack(zlib.crc32(prefix + text))
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.writelines([prefix, text, *parts])
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return size


def read(path: Path) -> tuple[dict[str, Any], Arrays]:
    """Header and arrays, checked to the last bit. Raises RecordError, OSError."""
    with open(path, "rb") as stream:
        header, n_payload, expected = _read_header(stream, path)
        payload = stream.read(n_payload + 1)
    if len(payload) != n_payload or zlib.crc32(payload) != expected:
        raise RecordError(f"{path} is damaged: its content does not agree with its checksum")
    arrays, at = {}, 0
    for name, kind, shape in header["arrays"]:
        dtype, n_values = _DTYPES[kind], math.prod(shape)
        end = at + n_values * dtype.itemsize
        arrays[name] = np.frombuffer(memoryview(payload)[at:end], np.uint8).view(dtype)
        arrays[name] = arrays[name].reshape(shape)
        at = end
    return header, arrays


def read_header(path: Path) -> dict[str, Any]:
    """The header alone; the payload's length is checked, its content is not. As `read` raises."""
    with open(path, "rb") as stream:
        return _read_header(stream, path)[0]


def flush_directory(path: Path) -> None:
    """Make renames into a directory last through a power cut. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_header(stream: BinaryIO, path: Path) -> tuple[dict[str, Any], int, int]:
    """Header, length of the payload and its checksum."""
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(_PREFIX.size + _CRC.size)
    if len(start) < _PREFIX.size + _CRC.size or not start.startswith(MAGIC):
        raise RecordError(f"{path} is not a KV record of this program")
    _, version, n_header, n_payload, payload_crc = _PREFIX.unpack_from(start)
    if version != VERSION:
        raise RecordError(
            f"{path} is a KV record of version {version}; this program reads version {VERSION}"
        )
    if n_header > _MOST_HEADER or len(start) + n_header + n_payload != size:
        raise RecordError(f"{path} is damaged: it has {size} bytes, not those it should have")
    text = stream.read(n_header)
    if _CRC.unpack_from(start, _PREFIX.size)[0] != zlib.crc32(start[: _PREFIX.size] + text):
        raise RecordError(f"{path} is damaged: its header does not agree with its checksum")
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if _listed_bytes(header) != n_payload:
        raise RecordError(f"{path} is damaged: its arrays are not those of its header")
    return header, n_payload, payload_crc


def _listed_bytes(header: Any) -> int:
    """Bytes of the listed arrays, -1 when they make no sense: whoever wrote it can be malicious."""
    try:
        total = 0
        for name, kind, shape in header["arrays"]:
            if not isinstance(name, str) or any(type(n) is not int or n < 0 for n in shape):
                return -1
            total += math.prod(shape) * _DTYPES[kind].itemsize
        return total
    except (TypeError, KeyError, ValueError):
        return -1
