"""Writing safetensors files as a bundle needs them; what an expert record is and where it lies.

Files are streamed tensor by tensor, aligned, hashed on the way, synced, and renamed into place: a
kill leaves the old file or the new one, never a part. Any safetensors reader can open them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ds4py.errors import InputError
from ds4py.formats.gguf_blocks.scales import are_finite

RECORD_ALIGN = 16384
"""An expert record is one aligned read, and a page of Apple Silicon."""


@dataclass(frozen=True)
class NewTensor:
    """One tensor to write; its data is asked for when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    chunks: Callable[[], Iterable[npt.NDArray[Any]]]
    """Arrays whose bytes, one after the other, are the tensor."""


def write(path: Path, tensors: Sequence[NewTensor], align: int = 8) -> str:
    """Write a safetensors file whose data starts at a multiple of `align`; returns its sha256.

    Raises InputError when the place cannot be written or the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    digest = hashlib.sha256()
    try:
        with open(partial, "wb") as stream:
            head = _header(tensors, align)
            stream.write(head)
            digest.update(head)
            for tensor in tensors:
                n_written = 0
                for chunk in tensor.chunks():
                    data = np.ascontiguousarray(chunk).view(np.uint8).reshape(-1).data
                    stream.write(data)
                    digest.update(data)
                    n_written += data.nbytes
                assert n_written == tensor.n_bytes, (tensor.name, n_written, tensor.n_bytes)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as exc:
        raise InputError(
            f"{path} cannot be written ({exc.strerror}); free space and retry"
        ) from exc
    finally:
        partial.unlink(missing_ok=True)
    return digest.hexdigest()


def _header(tensors: Sequence[NewTensor], align: int) -> bytes:
    entries, offset = {}, 0
    for t in tensors:
        end = offset + t.n_bytes
        entries[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class RecordLayout:
    """Where the three matrices of one expert lie in its record: gate | up | down | padding."""

    gate_bytes: int
    up_bytes: int
    down_bytes: int

    @property
    def record_bytes(self) -> int:
        """A multiple of RECORD_ALIGN."""
        used = self.gate_bytes + self.up_bytes + self.down_bytes
        return -(-used // RECORD_ALIGN) * RECORD_ALIGN

    def slices(self) -> tuple[slice, slice, slice]:
        """Byte ranges of gate, up and down."""
        up, down = self.gate_bytes, self.gate_bytes + self.up_bytes
        return slice(0, up), slice(up, down), slice(down, down + self.down_bytes)


class Span(NamedTuple):
    """Consecutive bytes of a file and where they belong in the record."""

    file: Path
    offset: int
    n_bytes: int
    at: int


@dataclass(frozen=True)
class LayerRecords:
    """The records of one layer: whole in a bundle, in three parts in a GGUF file."""

    layer: int
    spans: tuple[Span, ...]
    """Of expert 0; expert e lies e * n_bytes further in each."""
    n_experts: int
    layout: RecordLayout
    formats: tuple[str, str, str]
    """Of gate, up and down."""
    crc32: tuple[int, ...] | None
    """Of every record; None where the files carry none, as GGUF files do."""

    @property
    def record_bytes(self) -> int:
        return self.layout.record_bytes

    def of(self, expert: int) -> tuple[Span, ...]:
        """Where one expert's record lies."""
        return tuple(
            Span(file, offset + expert * n_bytes, n_bytes, at)
            for file, offset, n_bytes, at in self.spans
        )

    def fault(self, expert: int, record: memoryview) -> tuple[Span, str] | None:
        """Where and how a record shows that it is damaged: by its checksum, or where there is
        none by scales that are no numbers."""
        spans = self.of(expert)
        if self.crc32 is not None:
            sound = zlib.crc32(record[: self.record_bytes]) == self.crc32[expert]
            return None if sound else (spans[0], "does not match its checksum")
        data = np.frombuffer(record, np.uint8)
        for span, where, name in zip(spans, self.layout.slices(), self.formats, strict=True):
            if not are_finite(name, data[where]):
                return span, "has values that are NaN or infinite"
        return None
