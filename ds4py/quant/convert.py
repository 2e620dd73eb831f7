"""Checkpoint or GGUF file -> bundle, file by file, resumable.

One tensor is in memory at a time. A file is there whole or not at all (written beside, synced,
renamed), and a finished file is recorded with its hash, so that a killed run goes on where it
was. `recipe.json` comes last: without it the directory is no bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.errors import InputError
from ds4py.formats import bundle as files
from ds4py.formats.gguf_blocks import FORMATS, block_format
from ds4py.quant.encode import encode
from ds4py.quant.recipe import KEEP, Recipe
from ds4py.weights import names
from ds4py.weights.bundle import DENSE, RECIPE, ROUTED, VERSION, experts_file, layout_of
from ds4py.weights.checkpoint import Checkpoint
from ds4py.weights.gguf import GGUFCheckpoint
from ds4py.weights.gguf_tokenizer import write_beside
from ds4py.weights.source import Source

Progress = Callable[[str, int, int], None]
"""Called with ("quantize", bytes done, bytes in all), counting the source's bytes."""
Importance = dict[str, npt.NDArray[np.float32]]
"""Per expert and projection, e.g. "layers.3.ffn.experts.7.w2.weight": [in], see `imatrix`."""

Finished = dict[str, dict[str, Any]]
"""Per file its sha256 and, of expert files, the CRC-32 of every record."""

STATE = ".quantize.json"
"""What a killed run finished; removed at the end."""
CARRIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")
SPARE_BYTES = 64 << 20


@dataclass
class Converter:
    """One conversion. `run` may be called again after any interruption."""

    source: Source
    target: Path
    recipe: Recipe
    importance: Importance = field(default_factory=dict)
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.config: ModelConfig = self.source.config
        self.shapes = names.expected(self.config)
        if self.source.has_draft:
            self.shapes |= names.expected_draft(self.config)
        self.formats = {name: self._format(name) for name in self.shapes}
        self._crc32: list[int] = []  # of the records of the file being written
        self.done_bytes = 0
        self.total_bytes = sum(entry.n_bytes for entry in self.source.entries.values())

    def run(self) -> None:
        """Make what is missing. Raises InputError; the target then holds whole files only."""
        self._check_space()
        self.target.mkdir(parents=True, exist_ok=True)
        finished = self._finished()
        for layer, prefix in self._expert_layers():
            self._file(finished, experts_file(layer), [self._experts(prefix)])
        self._file(finished, DENSE, self._dense())
        self._carry_tokenizer()
        _write_json(self.target / "config.json", self.config.raw)
        _write_json(self.target / RECIPE, self._recipe(finished))
        (self.target / STATE).unlink(missing_ok=True)

    def _carry_tokenizer(self) -> None:
        if isinstance(self.source, GGUFCheckpoint):
            write_beside(self.source.file, self.target)
        elif isinstance(self.source, Checkpoint):
            for file in CARRIED:
                if (self.source.directory / file).exists():
                    shutil.copyfile(self.source.directory / file, self.target / file)

    @property
    def bundle_bytes(self) -> int:
        """What the bundle's weights will take."""
        dense = sum(self._stored(name)[2] for name in self.shapes if not ROUTED.search(name))
        experts = self.config.n_routed_experts
        return dense + sum(
            experts * layout_of(self.config, self._layer_formats(prefix)).record_bytes
            for _, prefix in self._expert_layers()
        )

    def _format(self, name: str) -> str:
        """The recipe's format, or "keep" for what has no blocks: vectors and tables."""
        chosen, stored = self.recipe.format_of(name), self.source.entries[name].dtype
        if chosen == KEEP and stored in FORMATS:  # blocks of a GGUF file
            return stored
        matrix = name.endswith(".weight") and len(self.shapes[name]) == 2
        if not matrix or chosen == KEEP:
            if ROUTED.search(name):
                raise InputError(
                    f"recipe: routed experts are {chosen!r}; records need a block format "
                    f"({', '.join(FORMATS)})"
                )
            return KEEP
        block_format(chosen).row_bytes(self.shapes[name][1])
        return chosen

    def _layer_formats(self, prefix: str) -> tuple[str, str, str]:
        gate, up, down = (self.formats[f"{prefix}.0.w{i}.weight"] for i in (1, 3, 2))
        return gate, up, down

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """dtype, shape and bytes of a dense tensor in the bundle."""
        fmt = self.formats[name]
        if fmt == KEEP:
            entry = self.source.entries[name]
            return entry.dtype, entry.shape, entry.n_bytes
        rows, row_bytes = self.shapes[name][0], block_format(fmt).row_bytes(self.shapes[name][1])
        return "U8", (rows, row_bytes), rows * row_bytes

    def _dense(self) -> list[files.NewTensor]:
        """Everything but the routed experts, with the scales of kept tensors."""
        tensors = []
        for name in self.shapes:
            if ROUTED.search(name):
                continue
            tensors.append(self._new(name, partial(self._dense_data, name)))
            scale = f"{name.removesuffix('.weight')}.scale"
            if self.formats[name] == KEEP and scale in self.source.entries:
                entry = self.source.entries[scale]
                tensors.append(
                    files.NewTensor(
                        scale, entry.dtype, entry.shape, entry.n_bytes, partial(_once, entry.read)
                    )
                )
        return tensors

    def _new(self, name: str, data: Callable[[], npt.NDArray[Any]]) -> files.NewTensor:
        dtype, shape, n_bytes = self._stored(name)
        return files.NewTensor(name, dtype, shape, n_bytes, partial(_once, data))

    def _dense_data(self, name: str) -> npt.NDArray[Any]:
        fmt = self.formats[name]
        self._report(self.source.entries[name].n_bytes)
        if fmt == KEEP:
            return self.source.entries[name].read()
        return self._encoded(name)

    def _encoded(self, name: str) -> npt.NDArray[np.uint8]:
        """Blocks of the wanted format: the source's own, which nothing could better, or new."""
        fmt, entry = self.formats[name], self.source.entries[name]
        if entry.dtype == fmt:
            return entry.read()
        matrix = self.source.matrix(name.removesuffix(".weight"))
        return encode(fmt, matrix, self.importance.get(name))

    def _experts(self, prefix: str) -> files.NewTensor:
        layout = layout_of(self.config, self._layer_formats(prefix))
        n = self.config.n_routed_experts
        size = layout.record_bytes

        def records() -> Iterator[npt.NDArray[np.uint8]]:
            for expert in range(n):
                record = self._record(f"{prefix}.{expert}", layout)
                self._crc32.append(zlib.crc32(record.data))
                yield record

        return files.NewTensor("experts", "U8", (n, size), n * size, records)

    def _record(self, expert: str, layout: files.RecordLayout) -> npt.NDArray[np.uint8]:
        """gate | up | down | zeros of one expert."""
        record = np.zeros(layout.record_bytes, np.uint8)
        for where, w in zip(layout.slices(), ("w1", "w3", "w2"), strict=True):
            name = f"{expert}.{w}.weight"
            record[where] = self._encoded(name).ravel()
            self._report(self.source.entries[name].n_bytes)
        return record

    def _file(self, finished: Finished, file: str, tensors: list[files.NewTensor]) -> None:
        """Write one file unless a run before this one did."""
        if file in finished and (self.target / file).is_file():
            return
        self._crc32 = []
        finished[file] = {"sha256": files.write(self.target / file, tensors, files.RECORD_ALIGN)}
        if self._crc32:
            finished[file]["crc32"] = self._crc32
        _write_json(self.target / STATE, {"identity": self._identity(), "files": finished})

    def _finished(self) -> Finished:
        """Files of an earlier run with the same source, recipe and importance."""
        try:
            state = json.loads((self.target / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if (self.target / RECIPE).exists():
                raise InputError(
                    f"{self.target} already holds a bundle; name another place or remove it"
                ) from None
            return {}
        if state.get("identity") != self._identity():
            raise InputError(
                f"{self.target} holds part of another conversion; name another place or remove it"
            )
        return dict(state["files"])

    def _identity(self) -> str:
        """Names the inputs of this conversion."""
        digest = hashlib.sha256(json.dumps(self.config.raw, sort_keys=True).encode())
        digest.update(json.dumps(self.formats, sort_keys=True).encode())
        for name, entry in sorted(self.source.entries.items()):
            digest.update(f"{name} {entry.dtype} {entry.shape} {entry.n_bytes}".encode())
        for name, weights in sorted(self.importance.items()):
            digest.update(name.encode() + weights.tobytes())
        return digest.hexdigest()

    def _recipe(self, finished: Finished) -> dict[str, Any]:
        dense = {n: f for n, f in self.formats.items() if not ROUTED.search(n) and f != KEEP}
        experts = {
            str(layer): list(self._layer_formats(prefix)) for layer, prefix in self._expert_layers()
        }
        return {
            "version": VERSION,
            "recipe": dict(self.recipe.raw),
            "imatrix": bool(self.importance),
            "tensors": dense,
            "experts": experts,
            "files": finished,
        }

    def _expert_layers(self) -> Iterator[tuple[int, str]]:
        """Number and name prefix of every layer's experts; draft layers follow the main ones."""
        for plan in self.config.layers:
            yield plan.index, f"layers.{plan.index}.ffn.experts"
        if self.source.has_draft:
            for i, plan in enumerate(self.config.mtp_layers):
                yield plan.index, f"mtp.{i}.ffn.experts"

    def _check_space(self) -> None:
        place = next(p for p in (self.target, *self.target.resolve().parents) if p.exists())
        present = sum(f.stat().st_size for f in self.target.glob("*.safetensors"))
        need, free = self.bundle_bytes + SPARE_BYTES - present, shutil.disk_usage(place).free
        if need > free:
            raise InputError(
                f"{place} has {free / 1e9:.1f} GB free; the bundle needs {need / 1e9:.1f} GB more"
            )

    def _report(self, n_bytes: int) -> None:
        self.done_bytes += n_bytes
        if self.progress is not None:
            self.progress("quantize", self.done_bytes, self.total_bytes)


def _once(read: Callable[[], npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """A tensor that is written in one piece."""
    return [read()]


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)
