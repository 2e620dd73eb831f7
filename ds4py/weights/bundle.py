"""Our own model directory: dense tensors in block formats, routed experts as records.

`recipe.json` says every tensor's format; it is written last, so a directory without it is no bundle
yet. Reads like a `Checkpoint`, and hands out the packed records of a layer as they lie on disk.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ds4py.config import ModelConfig
from ds4py.errors import WeightsError
from ds4py.formats.bundle import LayerRecords, RecordLayout, Span
from ds4py.formats.gguf_blocks import FORMATS, U8, block_format, decode
from ds4py.formats.gguf_blocks.scales import are_finite
from ds4py.formats.safetensors import TensorEntry, read_header
from ds4py.weights import names
from ds4py.weights.checkpoint import F32, Checkpoint, Progress, check_tensors, not_finite
from ds4py.weights.source import PackedLayer, StoredMatrix

RECIPE = "recipe.json"
DENSE = "dense.safetensors"
VERSION = 1
ROUTED = re.compile(r"(layers|mtp)\.(\d+)\.ffn\.experts\.(\d+)\.w([123])\.weight$")


def experts_file(layer: int) -> str:
    """The file with one layer's records; draft layers follow the main model's."""
    return f"experts-{layer:02d}.safetensors"


def layout_of(config: ModelConfig, formats: tuple[str, str, str]) -> RecordLayout:
    """Record layout for the block formats of gate, up and down."""
    d, inner = config.hidden_size, config.moe_intermediate_size
    gate, up, down = (block_format(name) for name in formats)
    return RecordLayout(
        inner * gate.row_bytes(d), inner * up.row_bytes(d), d * down.row_bytes(inner)
    )


class Bundle(Checkpoint):
    """A bundle directory. Raises WeightsError naming what does not fit."""

    def __init__(self, directory: Path, config: ModelConfig, progress: Progress | None = None):
        self.directory, self.config, self.progress = directory, config, progress
        self.recipe = read_recipe(directory)
        self.formats: dict[str, str] = self.recipe["tensors"]
        self.entries = read_header(directory / DENSE)
        self.has_draft = any(name.startswith("mtp.") for name in self.entries)
        self.layers = len(config.layers) + (len(config.mtp_layers) if self.has_draft else 0)
        shapes = names.expected(config)
        if self.has_draft:
            shapes |= names.expected_draft(config)
        dense = {name: shape for name, shape in shapes.items() if not ROUTED.search(name)}
        self._check(dense)
        self._records = {layer: self._record_entry(layer) for layer in range(self.layers)}
        self.done_bytes = 0
        self.total_bytes = sum(
            e.n_bytes for name, e in self.entries.items() if not name.startswith("mtp.")
        ) + sum(self._records[plan.index].n_bytes for plan in config.layers)

    @property
    def files(self) -> list[Path]:
        return [*super().files, *(entry.file for entry in self._records.values())]

    def matrix(self, name: str) -> F32:
        """`name`.weight, decoded, [out, in] float32."""
        fmt = self.formats.get(f"{name}.weight")
        if fmt not in FORMATS:
            return super().matrix(name)
        return decode(fmt, self._blocks_of(name, fmt))

    def stored(self, name: str) -> StoredMatrix:
        """`name`.weight in its own bytes."""
        fmt = self.formats.get(f"{name}.weight")
        if fmt not in FORMATS:
            return super().stored(name)
        return StoredMatrix(fmt, self._blocks_of(name, fmt))

    def _blocks_of(self, name: str, fmt: str) -> U8:
        """`name`.weight as rows of blocks with finite scales."""
        rows = self._read(f"{name}.weight")
        if not are_finite(fmt, rows):
            raise not_finite(self.entries[f"{name}.weight"].file, f"{name}.weight")
        return rows

    def packed(self, layer: int, mapped: bool = False) -> PackedLayer:
        """One layer's records, read into memory or mapped."""
        formats = self._layer_formats(layer)
        entry, layout = self._records[layer], layout_of(self.config, formats)
        data = entry.map() if mapped else entry.read()
        for where, fmt in zip(layout.slices(), formats, strict=True):
            for expert, record in enumerate(data):
                if not are_finite(fmt, record[where]):
                    raise not_finite(entry.file, f"the {fmt} map of expert {expert}")
        self._report(entry.n_bytes if layer < len(self.config.layers) else 0)
        return PackedLayer(data, layout, formats)

    def records(self) -> dict[int, LayerRecords]:
        """Where every layer's records lie, unread; draft layers behind the main ones.

        Raises WeightsError when the recipe has no checksums of them.
        """
        return {layer: self._layer_records(layer) for layer in range(self.layers)}

    def _layer_records(self, layer: int) -> LayerRecords:
        entry, formats = self._records[layer], self._layer_formats(layer)
        layout, n_experts = layout_of(self.config, formats), self.config.n_routed_experts
        crc32 = self.recipe.get("files", {}).get(entry.file.name, {}).get("crc32")
        if not isinstance(crc32, list) or len(crc32) != n_experts:
            raise WeightsError(
                f"{self.directory / RECIPE} has no checksums of {entry.file.name}'s {n_experts} "
                "records; make the bundle again with `ds4 quantize`"
            )
        span = Span(entry.file, entry.offset, layout.record_bytes, 0)
        return LayerRecords(layer, (span,), n_experts, layout, formats, tuple(crc32))

    def _layer_formats(self, layer: int) -> tuple[str, str, str]:
        try:
            gate, up, down = self.recipe["experts"][str(layer)]
            for name in (gate, up, down):
                block_format(name)
        except (KeyError, TypeError, ValueError) as exc:
            raise WeightsError(
                f"{self.directory / RECIPE} has no formats for layer {layer}'s experts ({exc})"
            ) from exc
        return gate, up, down

    def _record_entry(self, layer: int) -> TensorEntry:
        path = self.directory / experts_file(layer)
        entry = read_header(path).get("experts")
        layout = layout_of(self.config, self._layer_formats(layer))
        need = (self.config.n_routed_experts, layout.record_bytes)
        if entry is None or entry.dtype != "U8" or entry.shape != need:
            seen = "no such tensor" if entry is None else f"{entry.dtype}{list(entry.shape)}"
            raise WeightsError(f"{path}: experts is {seen}; recipe.json calls for U8{list(need)}")
        return entry

    def _check(self, shapes: names.Shapes) -> None:
        """Block tensors by their own shape, the others as in a checkpoint."""
        plain: names.Shapes = {}
        for name, shape in shapes.items():
            fmt = self.formats.get(name)
            entry = self.entries.get(name)
            if fmt not in FORMATS or entry is None:
                plain[name] = shape
                continue
            need = (shape[0], block_format(fmt).row_bytes(shape[1]))
            if entry.dtype != "U8" or entry.shape != need:
                raise WeightsError(
                    f"{entry.file}: {name} is {entry.dtype}{list(entry.shape)}; {fmt} of "
                    f"{list(shape)} is U8{list(need)}"
                )
        blocks = {name for name in shapes if name not in plain}
        others = {name: e for name, e in self.entries.items() if name not in blocks}
        check_tensors(self.directory, others, plain)


def is_bundle(directory: Path) -> bool:
    """Whether the directory holds a finished bundle."""
    return (directory / RECIPE).is_file()


def read_recipe(directory: Path) -> dict[str, Any]:
    """recipe.json of a bundle. Raises WeightsError."""
    path = directory / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        tensors, experts = recipe["tensors"], recipe["experts"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise WeightsError(f"{path} is no readable recipe of a bundle ({exc!r})") from exc
    if recipe.get("version") != VERSION or not isinstance(tensors, dict):
        raise WeightsError(
            f"{path} has version {recipe.get('version')!r}; this program reads {VERSION}"
        )
    if not isinstance(experts, dict):
        raise WeightsError(f"{path}: experts is {experts!r}; need an object")
    return dict(recipe)
