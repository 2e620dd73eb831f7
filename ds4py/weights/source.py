"""What a model is built from: named tensors as float32, wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.formats.bundle import LayerRecords, RecordLayout

PLAIN = ("F32", "F16", "BF16")
"""Formats of rows without blocks."""
FP8 = "FP8"
"""A row's E4M3 codes and then its E8M0 scales, one per 128 columns."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix in the bytes it is stored in, rows apart from each other."""

    format: str
    """A GGUF block format, one of PLAIN, or FP8."""
    rows: npt.NDArray[np.uint8]
    """[out, bytes of a row]"""


@dataclass(frozen=True)
class PackedLayer:
    """The routed experts of one layer."""

    records: npt.NDArray[np.uint8]
    """[E, record_bytes]"""
    layout: RecordLayout
    formats: tuple[str, str, str]
    """Of gate, up and down."""


SAMPLES, SAMPLE_BYTES = 64, 4096


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 over each file's size and evenly spaced samples: tells one quantisation of a model
    from another without reading 80 GB."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as stream:
            for i in range(SAMPLES):
                stream.seek(i * size // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


class Entry(Protocol):
    """A stored tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def n_bytes(self) -> int: ...

    def read(self) -> npt.NDArray[Any]:
        """Its bits."""
        ...


class Source(Protocol):
    """A checkpoint that was checked as a whole. Names are those of `weights/names.py`."""

    config: ModelConfig
    has_draft: bool

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is stored, by name."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The weight files, in a fixed order."""
        ...

    def matrix(self, name: str) -> npt.NDArray[np.float32]:
        """`name`.weight, dequantised, [out, in]."""
        ...

    def stored(self, name: str) -> StoredMatrix:
        """`name`.weight as it lies in the file, FP8 and FP4 with their scales in the rows."""
        ...

    def packed(self, layer: int, mapped: bool = False) -> PackedLayer | None:
        """One layer's experts as records of blocks, where the file has blocks. mapped: the file's
        own pages, where it has whole records."""
        ...

    def records(self) -> Mapping[int, LayerRecords] | None:
        """Where the routed experts of all layers lie, unread, for reading one at a time; None
        where they are not stored as blocks."""
        ...

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor of numbers."""
        ...

    def integers(self, name: str) -> npt.NDArray[np.int32]:
        """A table of ids."""
        ...
