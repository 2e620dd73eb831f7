"""A checkpoint's tensors as float32 arrays, checked as a whole before any data is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.errors import WeightsError
from ds4py.formats import fp_blocks
from ds4py.formats.bundle import LayerRecords
from ds4py.formats.gguf_blocks import mxfp4_from_fp4
from ds4py.formats.safetensors import TensorEntry, read_directory
from ds4py.weights import names
from ds4py.weights.source import FP8, PackedLayer, StoredMatrix

F32 = npt.NDArray[np.float32]
Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""

FLOATS = ("F32", "BF16", "F16")
INTEGERS = ("I64", "I32")
BLOCKS = ("F8_E4M3", "I8")


class Checkpoint:
    """DeepSeek's own layout in one directory; tensors are read one at a time."""

    def __init__(self, directory: Path, config: ModelConfig, progress: Progress | None = None):
        """Raises WeightsError for missing, left over or misshapen tensors, naming them."""
        self.directory, self.config, self.progress = directory, config, progress
        self.entries = {
            name: entry
            for name, entry in read_directory(directory).items()
            if not names.is_set_aside(name, config)
        }
        self.has_draft = any(name.startswith("mtp.") for name in self.entries)
        shapes = names.expected(config)
        if self.has_draft:
            shapes |= names.expected_draft(config)
        check_tensors(directory, self.entries, shapes)
        self.done_bytes = 0
        self.total_bytes = sum(
            e.n_bytes for name, e in self.entries.items() if not name.startswith("mtp.")
        )

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return sorted({entry.file for entry in self.entries.values()})

    def matrix(self, name: str) -> F32:
        """`name`.weight, dequantised, [out, in] float32."""
        entry = self.entries[f"{name}.weight"]
        if entry.dtype not in BLOCKS:
            return self.floats(f"{name}.weight")
        return self._decode(entry, self._read(f"{name}.weight"), self._read(f"{name}.scale"))

    def _decode(
        self, entry: TensorEntry, codes: npt.NDArray[np.uint8], scale: npt.NDArray[Any]
    ) -> F32:
        decode = fp_blocks.decode_fp8 if entry.dtype == "F8_E4M3" else fp_blocks.decode_fp4
        return decode(codes, fp_blocks.decode_scale(scale))

    def stored(self, name: str) -> StoredMatrix:
        """`name`.weight in its own bytes. Scales that are no powers of two make it F32."""
        entry = self.entries[f"{name}.weight"]
        data = self._read(f"{name}.weight")
        if entry.dtype not in BLOCKS:
            return StoredMatrix(entry.dtype, data.view(np.uint8))
        scale = self._read(f"{name}.scale")
        exponents = fp_blocks.e8m0(scale)
        if exponents is None:
            return StoredMatrix("F32", self._decode(entry, data, scale).view(np.uint8))
        if entry.dtype == "F8_E4M3":
            return StoredMatrix(FP8, fp_blocks.fp8_rows(data, exponents))
        return StoredMatrix("MXFP4", mxfp4_from_fp4(data, exponents))

    def packed(self, layer: int, mapped: bool = False) -> PackedLayer | None:
        """A checkpoint has no records."""
        return None

    def records(self) -> dict[int, LayerRecords] | None:
        """A checkpoint has no records."""
        return None

    def floats(self, name: str) -> F32:
        """A tensor stored as F32, BF16 or F16, as float32."""
        data = self._read(name)
        if self.entries[name].dtype == "BF16":
            return fp_blocks.decode_bf16(data)
        return data.astype(np.float32, copy=False)

    def integers(self, name: str) -> npt.NDArray[np.int32]:
        return self._read(name).astype(np.int32)

    def _read(self, name: str) -> npt.NDArray[Any]:
        entry = self.entries[name]
        data = entry.read()
        if not fp_blocks.are_finite(entry.dtype, data):
            raise not_finite(entry.file, name)
        self._report(0 if name.startswith("mtp.") else entry.n_bytes)
        return data

    def _report(self, n_bytes: int) -> None:
        """Count bytes of the main model as read; draft layers are loaded when first asked for."""
        self.done_bytes += n_bytes
        if self.progress is not None and n_bytes:
            self.progress("load", self.done_bytes, self.total_bytes)


def not_finite(file: Path, name: str) -> WeightsError:
    """What to say of damaged numbers."""
    return WeightsError(
        f"{file}: {name} has values that are NaN or infinite; the file is damaged, fetch it again"
    )


def check_tensors(directory: Path, entries: dict[str, TensorEntry], shapes: names.Shapes) -> None:
    """Raise WeightsError unless exactly these tensors are there, in shapes and types we read.

    All faults of one kind are counted, the first few named.
    """
    missing = [name for name in shapes if name not in entries]
    if missing:
        raise WeightsError(
            f"{directory} lacks {len(missing)} of {len(shapes)} tensors: {_few(missing)}; the "
            "download looks incomplete, or config.json belongs to another model"
        )
    scales = set()
    for name, shape in shapes.items():
        scale = _check_tensor(name, shape, entries)
        if scale is not None:
            scales.add(scale)
    left_over = [name for name in entries if name not in shapes and name not in scales]
    if left_over:
        raise WeightsError(
            f"{directory} has {len(left_over)} tensors this config does not call for: "
            f"{_few(left_over)}; is config.json that of this model?"
        )


def _check_tensor(name: str, shape: tuple[int, ...], entries: dict[str, TensorEntry]) -> str | None:
    """Shape and dtype of one tensor; the name of its scale tensor if it has one."""
    entry = entries[name]
    allowed: tuple[str, ...] = INTEGERS if name.endswith("tid2eid") else FLOATS
    if name.endswith(".weight") and len(shape) == 2:
        allowed = FLOATS + BLOCKS
    if entry.dtype not in allowed:
        raise WeightsError(
            f"{entry.file}: {name} has dtype {entry.dtype}; need {' or '.join(allowed)}"
        )
    stored = (shape[0], shape[1] // 2) if entry.dtype == "I8" else shape
    if entry.shape != stored:
        raise WeightsError(
            f"{entry.file}: {name} has shape {list(entry.shape)}; config.json calls for "
            f"{list(stored)}"
        )
    if entry.dtype not in BLOCKS:
        return None
    scale_name = name.removesuffix("weight") + "scale"
    scale = entries.get(scale_name)
    need = fp_blocks.scale_shape(entry.dtype, (shape[0], shape[1]))
    if scale is None or scale.shape != need or scale.dtype not in ("F8_E8M0", "F32"):
        seen = "is missing" if scale is None else f"is {scale.dtype}{list(scale.shape)}"
        raise WeightsError(
            f"{entry.file}: {scale_name} {seen}; {name} is {entry.dtype} and needs an F8_E8M0 or "
            f"F32 scale of shape {list(need)}"
        )
    return scale_name


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
