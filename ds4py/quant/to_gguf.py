"""Any model -> a GGUF file in the layout of antirez/ds4.

One matrix is in memory at a time. A recipe's "keep" becomes the plain type that layout has for the
tensor, F16 or F32; blocks that the source has in the wanted format are copied, not encoded again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.errors import InputError, WeightsError
from ds4py.formats.gguf import FORMATS, Field, size_of
from ds4py.formats.gguf_write import NewTensor, write
from ds4py.quant.encode import encode
from ds4py.quant.recipe import KEEP, Recipe
from ds4py.weights.files import ModelFiles
from ds4py.weights.gguf import PLAIN, Slot, slots
from ds4py.weights.gguf_config import DRAFT_LAYERS, PREFIX, metadata_of
from ds4py.weights.gguf_tokenizer import fields_beside

Progress = Callable[[str, int, int], None]
"""Called with ("quantize", bytes done, bytes in all), counting the source's bytes."""
Importance = Mapping[str, npt.NDArray[np.float32]]

SPARE_BYTES = 64 << 20


@dataclass
class Exporter:
    """One conversion. `run` may be called again after any interruption."""

    files: ModelFiles
    target: Path
    recipe: Recipe
    importance: Importance = field(default_factory=dict)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Raises InputError: a damaged source, a recipe that the layout has no place for."""
        self.source, self.config = self.files.parts(), self.files.config
        self.slots = slots(self.config)
        if self.source.has_draft:
            self.slots += slots(self.config, draft=True)
        self.types = {slot.name: type_of(slot, self.recipe) for slot in self.slots}
        self._check_pairs()
        self.done_bytes = 0
        self.total_bytes = sum(entry.n_bytes for entry in self.source.entries.values())

    def run(self) -> None:
        """Make the file. Raises InputError; there is a whole one then, or none."""
        self._check_space()
        tensors = [
            NewTensor(slot.name, self.types[slot.name], slot.dims, partial(self._parts, slot))
            for slot in self.slots
        ]
        write(self.target, self._metadata(), tensors, self._identity())

    @property
    def tensor_bytes(self) -> int:
        """What the file's tensors will take."""
        return sum(size_of(self.types[slot.name], slot.dims) for slot in self.slots)

    def _metadata(self) -> dict[str, Field]:
        config, file = self.config, self.files.gguf
        fields = metadata_of(config, self.files.path.stem)
        if self.source.has_draft:
            fields[PREFIX + DRAFT_LAYERS] = Field("u32", len(config.mtp_layers))
        if file is None:
            ends = config.bos_token_id, config.eos_token_id
            return fields | fields_beside(self.files.path, config.vocab_size, *ends)
        return fields | {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.")}

    def _check_pairs(self) -> None:
        for name, kind in self.types.items():
            pair = name.replace("ffn_gate_exps", "ffn_up_exps")
            if self.types[pair] != kind:
                raise InputError(
                    f"recipe: {name} would be {kind} and {pair} {self.types[pair]}; a GGUF file "
                    "needs one format for both"
                )

    def _parts(self, slot: Slot) -> Iterator[npt.NDArray[Any]]:
        for name in slot.holds:
            yield self._data(slot, name)
            entries = self.source.entries
            scale = entries.get(f"{name.removesuffix('.weight')}.scale")
            self._report(entries[name].n_bytes + (scale.n_bytes if scale is not None else 0))

    def _data(self, slot: Slot, name: str) -> npt.NDArray[Any]:
        kind = self.types[slot.name]
        entry = self.source.entries[name]
        if entry.dtype == kind:
            return entry.read()
        if kind == "I32":
            return self.source.integers(name)
        matrix = name.endswith(".weight") and len(entry.shape) > 1
        stem = name.removesuffix(".weight")
        values = self.source.matrix(stem) if matrix else self.source.floats(name)
        if kind in PLAIN:
            return _plain(values, kind, name)
        return encode(kind, values, self.importance.get(name))

    def _identity(self) -> str:
        """Names the inputs of this conversion."""
        digest = hashlib.sha256(json.dumps(self.config.raw, sort_keys=True).encode())
        digest.update(json.dumps(self.types, sort_keys=True).encode())
        for name, entry in sorted(self.source.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape} {entry.n_bytes}".encode())
        digest.update(self.source.floats("norm.weight").tobytes())  # another training of the same
        for name, weights in sorted(self.importance.items()):
            digest.update(name.encode() + weights.tobytes())
        return digest.hexdigest()

    def _check_space(self) -> None:
        folder = self.target.absolute().parent
        if not folder.is_dir():
            raise InputError(f"the folder of {self.target} does not exist; make it first")
        if self.target.exists():
            raise InputError(f"{self.target} already exists; name another file or remove it")
        begun = folder / f".{self.target.name}.partial"
        present = begun.stat().st_size if begun.exists() else 0
        need, free = self.tensor_bytes + SPARE_BYTES - present, shutil.disk_usage(folder).free
        if need > free:
            raise InputError(
                f"{folder} has {free / 1e9:.1f} GB free; the file needs {need / 1e9:.1f} GB more"
            )

    def _report(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        if self.progress is not None:
            self.progress("quantize", self.done_bytes, self.total_bytes)


def type_of(slot: Slot, recipe: Recipe) -> str:
    """The type a recipe gives a tensor of the layout. Raises InputError."""
    chosen = recipe.format_of(slot.holds[0])
    kind = chosen
    if chosen == KEEP or slot.types[0] == "I32" or len(slot.dims) == 1:
        kind = next((t for t in slot.types if t in PLAIN), chosen)
    if kind not in slot.types or (kind in PLAIN and "_exps." in slot.name):
        allowed = [t for t in slot.types if t not in PLAIN] or [KEEP]
        raise InputError(
            f"recipe: {slot.name} cannot be {chosen} in a GGUF file; choose "
            f"{' or '.join(allowed)}"
        )
    if slot.dims[0] % FORMATS[kind].values:
        raise InputError(
            f"recipe: {slot.name} cannot be {kind}, whose blocks hold {FORMATS[kind].values} "
            f"values, as its rows have {slot.dims[0]}; choose another format"
        )
    return kind


def _plain(values: npt.NDArray[np.float32], kind: str, name: str) -> npt.NDArray[Any]:
    if kind == "F32":
        return values
    assert kind == "F16", kind
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    if not np.isfinite(halves).all():
        raise WeightsError(
            f"{name} has values up to {np.abs(values).max():g}, which float16 does not hold; a "
            "GGUF file cannot carry this model"
        )
    return halves
