"""A bundle as the source of a conversion: every expert's map is a tensor of its own again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.formats.bundle import LayerRecords
from ds4py.formats.gguf_blocks import FORMATS, decode
from ds4py.formats.safetensors import TensorEntry
from ds4py.weights import names
from ds4py.weights.bundle import ROUTED, Bundle
from ds4py.weights.checkpoint import F32, Progress

PARTS = {"1": 0, "3": 1, "2": 2}
"""Where w1, w3 and w2 stand in a record."""


@dataclass(frozen=True)
class Blocks(TensorEntry):
    """A matrix [out, in] in a block format, which `dtype` names."""

    def read(self) -> npt.NDArray[Any]:
        """uint8 [out, bytes of a row]. Raises WeightsError."""
        rows = self.shape[0], self.n_bytes // self.shape[0]
        return TensorEntry(self.file, "U8", rows, self.offset, self.n_bytes).read()


class Apart(Bundle):
    """Its entries are those of a checkpoint, in block formats."""

    def __init__(self, directory: Path, config: ModelConfig, progress: Progress | None = None):
        """Raises WeightsError, also for a bundle without the checksums of its records."""
        super().__init__(directory, config, progress)
        shapes = names.expected(config)
        if self.has_draft:
            shapes |= names.expected_draft(config)
        records = self.records()
        self.entries |= {
            name: self._blocks(name, shape, records)
            for name, shape in shapes.items()
            if ROUTED.search(name) or self.formats.get(name) in FORMATS
        }

    def _blocks(
        self, name: str, shape: tuple[int, ...], records: Mapping[int, LayerRecords]
    ) -> Blocks:
        expert = ROUTED.search(name)
        if expert is None:
            e = self.entries[name]
            return Blocks(e.file, self.formats[name], shape, e.offset, e.n_bytes)
        root, layer, number, which = expert.groups()
        found = records[int(layer) + (len(self.config.layers) if root == "mtp" else 0)]
        (span,), where = found.spans, found.layout.slices()[PARTS[which]]
        start = span.offset + int(number) * span.n_bytes + where.start
        fmt = found.formats[PARTS[which]]
        return Blocks(span.file, fmt, shape, start, where.stop - where.start)

    @property
    def files(self) -> list[Path]:
        return sorted({entry.file for entry in self.entries.values()})

    def matrix(self, name: str) -> F32:
        """`name`.weight, decoded, [out, in] float32."""
        entry = self.entries[f"{name}.weight"]
        if entry.dtype not in FORMATS:
            return super().matrix(name)
        return decode(entry.dtype, np.asarray(entry.read()))
