"""The tensors of a GGUF file under the checkpoint's names, as float32 arrays.

All of a layer's experts are one 3-D tensor [in, out, expert] there; each is read by itself. The
table `slots` is the contract: name, dims and types of every tensor, which a reader checks and a
writer fills. Source: the files of antirez/ds4, which the layout was made for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.errors import WeightsError
from ds4py.formats import fp_blocks, gguf_blocks
from ds4py.formats.bundle import LayerRecords, Span
from ds4py.formats.gguf import GGUF, TensorInfo, size_of
from ds4py.formats.gguf_blocks.scales import are_finite
from ds4py.weights import names
from ds4py.weights.bundle import layout_of
from ds4py.weights.checkpoint import Progress
from ds4py.weights.gguf_config import is_dspark
from ds4py.weights.source import PackedLayer, StoredMatrix

F32 = npt.NDArray[np.float32]

GLOBAL = {
    "embed.weight": "token_embd.weight",
    "head.weight": "output.weight",
    "norm.weight": "output_norm.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
LAYER = {
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "hc_attn_fn": "hc_attn_fn.weight",
    "hc_attn_base": "hc_attn_base.weight",
    "hc_attn_scale": "hc_attn_scale.weight",
    "hc_ffn_fn": "hc_ffn_fn.weight",
    "hc_ffn_base": "hc_ffn_base.weight",
    "hc_ffn_scale": "hc_ffn_scale.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.experts.w1.weight": "ffn_gate_exps.weight",
    "ffn.experts.w2.weight": "ffn_down_exps.weight",
    "ffn.experts.w3.weight": "ffn_up_exps.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
}
DRAFT = {
    **{f"{name}.weight": f"{name}.weight" for name in ("e_proj", "h_proj")},
    **{f"{name}.weight": f"{name}.weight" for name in ("enorm", "hnorm", "norm")},
    **{f"hc_head_{part}": f"hc_head_{part}.weight" for part in ("fn", "base", "scale")},
}
"""Checkpoint name -> GGUF name, behind `layers.N.` and `blk.N.`, `mtp.N.` and `mtp.N.`."""

EXPERT = re.compile(r"(?P<layer>(?:layers|mtp)\.\d+)\.ffn\.experts\.(?P<expert>\d+)\.(?P<part>.*)")

RECORD = ("w1", "w3", "w2")
"""The order of gate, up and down in a record."""
PLAIN: dict[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I32": np.int32,
}
"""How numpy holds the types without blocks."""

# Types a class of tensors may have; the first is what the files of antirez/ds4 have.
NUMBERS = ("F32", "F16", "BF16")
HALVES = ("F16", "F32", "BF16")
SMALL = ("F16", "F32", "BF16", "Q8_0")
DENSE = ("Q8_0", "Q6_K", "Q4_K", "F16", "BF16", "F32")
EMBEDDING = ("F16", "BF16", "F32", "Q8_0", "Q6_K", "Q4_K")
EXPERTS = ("IQ2_XXS", "Q2_K", "Q4_K", "Q6_K", "MXFP4", "Q8_0", "F16", "BF16", "F32")
DOWN_EXPERTS = ("Q2_K", "IQ2_XXS", *EXPERTS[2:])

TYPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"ffn_gate_tid2eid\.", ("I32",)),
    (r"(ffn_gate|ffn_up)_exps\.", EXPERTS),
    (r"ffn_down_exps\.", DOWN_EXPERTS),
    (r"token_embd\.", EMBEDDING),
    (r"norm\.|_base\.|_scale\.|attn_sinks\.|\.bias$", NUMBERS),
    (r"_fn\.|_ape\.|ffn_gate_inp\.", HALVES),
    (r"_compressor_(kv|gate)\.|indexer\.", SMALL),
    (r"", DENSE),
)
"""The first pattern found in a GGUF name gives the types allowed."""


class Slot(NamedTuple):
    """One tensor of the contract."""

    name: str
    dims: tuple[int, ...]
    """Fastest first."""
    types: tuple[str, ...]
    """Types it may have, the usual one first."""
    holds: tuple[str, ...]
    """Checkpoint names of what it holds, one behind the other."""


def slots(config: ModelConfig, draft: bool = False) -> list[Slot]:
    """Every tensor of a model's file, in the checkpoint's order; of its draft layer if `draft`."""
    shapes = names.expected_draft(config) if draft else names.expected(config)
    held: dict[str, list[str]] = {}
    for name in shapes:
        held.setdefault(gguf_name(name), []).append(name)
    return [
        Slot(name, _dims(name, shapes[parts[0]], len(parts)), _types(name), tuple(parts))
        for name, parts in held.items()
    ]


def gguf_name(name: str) -> str:
    """What the GGUF file calls a checkpoint's tensor; the same for all experts of a layer."""
    expert = EXPERT.fullmatch(name)
    if expert is not None:
        name = f"{expert['layer']}.ffn.experts.{expert['part']}"
    if name in GLOBAL:
        return GLOBAL[name]
    root, layer, rest = name.split(".", 2)
    if root == "mtp":
        return f"mtp.{layer}.{DRAFT.get(rest) or LAYER[rest]}"
    return f"blk.{layer}.{LAYER[rest]}"


def _dims(name: str, shape: tuple[int, ...], n_parts: int) -> tuple[int, ...]:
    return (*reversed(shape), n_parts) if "_exps." in name else tuple(reversed(shape))


def _types(name: str) -> tuple[str, ...]:
    return next(types for pattern, types in TYPES if re.search(pattern, name))


@dataclass(frozen=True)
class Part:
    """A checkpoint's tensor inside a file: a whole tensor, or one expert of it."""

    name: str
    """The checkpoint's."""
    tensor: TensorInfo
    shape: tuple[int, ...]
    """[out, in]"""
    start: int
    n_bytes: int

    @property
    def file(self) -> Path:
        return self.tensor.file

    @property
    def dtype(self) -> str:
        return self.tensor.type

    def read(self) -> npt.NDArray[Any]:
        """Plain numbers in `shape`, BF16 as uint16; blocks as uint8 [rows, bytes of a row].

        Raises WeightsError, also for blocks that decode to NaN or infinity.
        """
        data = self.tensor.read(self.start, self.n_bytes)
        plain = PLAIN.get(self.dtype)
        if plain is not None:
            return data.view(np.dtype(plain).newbyteorder("<")).reshape(self.shape)
        rows = data.reshape(prod(self.shape[:-1]), -1)
        if not are_finite(self.dtype, rows):
            raise self.not_finite()
        return rows

    def not_finite(self) -> WeightsError:
        """What to say of damaged numbers."""
        return WeightsError(
            f"{self.file}: {self.tensor.name} ({self.name}) has values that are NaN or infinite; "
            "the file is damaged, fetch it again"
        )


class GGUFCheckpoint:
    """A GGUF file as a source of weights; tensors are read and decoded one at a time."""

    def __init__(
        self,
        file: GGUF,
        config: ModelConfig,
        progress: Progress | None = None,
        draft: GGUF | None = None,
    ):
        """draft: a second file with the MTP layer's tensors, where the first has none.

        Raises WeightsError for missing, left over or misshapen tensors, naming them.
        """
        self.file, self.config, self.progress = file, config, progress
        tensors = {t.name: t for t in _wanted(file)}
        for tensor in _wanted(draft) if draft is not None else ():
            if tensor.name in tensors:
                raise WeightsError(f"{tensor.name} stands in both {file.path} and {tensor.file}")
            if tensor.name.startswith("mtp."):
                tensors[tensor.name] = tensor
        wanted = slots(config)
        self.has_draft = any(name.startswith("mtp.") for name in tensors)
        if self.has_draft:
            wanted += slots(config, draft=True)
        _check(file.path, tensors, wanted)
        self.entries = {
            name: part for slot in wanted for name, part in _parts(slot, tensors[slot.name])
        }
        self.files = [file.path] if draft is None else [file.path, draft.path]
        self.done_bytes = 0
        self.total_bytes = sum(
            t.n_bytes for name, t in tensors.items() if not name.startswith("mtp.")
        )

    def matrix(self, name: str) -> F32:
        """`name`.weight, decoded, [out, in] float32. Raises WeightsError."""
        return self.floats(f"{name}.weight")

    def stored(self, name: str) -> StoredMatrix:
        """`name`.weight in its own bytes. Raises WeightsError."""
        part, data = self.entries[f"{name}.weight"], self._read(f"{name}.weight")
        return StoredMatrix(part.dtype, data.view(np.uint8))

    def floats(self, name: str) -> F32:
        """A tensor of any numeric type, decoded. Raises WeightsError, also for NaN or infinity."""
        part, data = self.entries[name], self._read(name)
        if part.dtype not in PLAIN:
            return gguf_blocks.decode(part.dtype, data).reshape(part.shape)
        values = data if part.dtype != "BF16" else fp_blocks.decode_bf16(data)
        values = values.astype(np.float32, copy=False)
        with np.errstate(invalid="ignore"):  # comparisons with NaN
            if not (np.isfinite(values.min()) and np.isfinite(values.max())):
                raise part.not_finite()
        return values

    def packed(self, layer: int, mapped: bool = False) -> PackedLayer | None:
        """One layer's experts as records of blocks, None where they are plain numbers.

        layer: its number, draft layers behind those of the main model. Raises WeightsError.
        """
        found = self._layer_records(layer)
        if found is None:
            return None
        records = np.zeros((found.n_experts, found.record_bytes), np.uint8)
        for which, where in zip(RECORD, found.layout.slices(), strict=True):
            for expert in range(found.n_experts):
                records[expert, where] = self._read(self._expert(layer, expert, which)).ravel()
        return PackedLayer(records, found.layout, found.formats)

    def records(self) -> dict[int, LayerRecords] | None:
        """Where every layer's experts lie, unread, draft layers behind the main ones; None where
        any are plain numbers."""
        n_draft = len(self.config.mtp_layers) if self.has_draft else 0
        layers = range(len(self.config.layers) + n_draft)
        found = {n: records for n in layers if (records := self._layer_records(n)) is not None}
        return found if len(found) == len(layers) else None

    def _layer_records(self, layer: int) -> LayerRecords | None:
        """A record in parts, as gate, up and down are tensors of their own."""
        parts = [self.entries[self._expert(layer, 0, which)] for which in RECORD]
        gate, up, down = (part.dtype for part in parts)
        if {gate, up, down} & PLAIN.keys():
            return None
        layout = layout_of(self.config, (gate, up, down))
        spans = tuple(
            Span(part.file, part.tensor.offset, part.n_bytes, where.start)
            for part, where in zip(parts, layout.slices(), strict=True)
        )
        n_experts = self.config.n_routed_experts
        return LayerRecords(layer, spans, n_experts, layout, (gate, up, down), None)

    def _expert(self, layer: int, expert: int, which: str) -> str:
        n_main = len(self.config.layers)
        root = f"layers.{layer}" if layer < n_main else f"mtp.{layer - n_main}"
        return f"{root}.ffn.experts.{expert}.{which}.weight"

    def integers(self, name: str) -> npt.NDArray[np.int32]:
        """A table of expert ids, checked. Raises WeightsError."""
        part, ids = self.entries[name], self._read(name).astype(np.int32, copy=False)
        if ids.min() < 0 or ids.max() >= self.config.n_routed_experts:
            raise WeightsError(
                f"{part.file}: {part.tensor.name} has ids from {ids.min()} to {ids.max()}; need "
                f"experts 0 to {self.config.n_routed_experts - 1}"
            )
        return ids

    def _read(self, name: str) -> npt.NDArray[Any]:
        part = self.entries[name]
        data = part.read()
        if not name.startswith("mtp."):  # draft layers are loaded when first asked for
            self.done_bytes += part.n_bytes
            if self.progress is not None:
                self.progress("load", self.done_bytes, self.total_bytes)
        return data


def _wanted(file: GGUF) -> Iterable[TensorInfo]:
    """The file's tensors without those of a DSpark draft."""
    dspark = is_dspark(file)
    return (t for t in file.tensors.values() if not (dspark and t.name.startswith("mtp.")))


def _parts(slot: Slot, tensor: TensorInfo) -> Iterable[tuple[str, Part]]:
    n_bytes = tensor.n_bytes // len(slot.holds)
    dims = slot.dims[:-1] if len(slot.holds) > 1 or "_exps." in slot.name else slot.dims
    shape = tuple(reversed(dims))
    assert size_of(tensor.type, dims) == n_bytes
    for i, name in enumerate(slot.holds):
        yield name, Part(name, tensor, shape, i * n_bytes, n_bytes)


def _check(path: Path, tensors: dict[str, TensorInfo], wanted: list[Slot]) -> None:
    missing = [slot.name for slot in wanted if slot.name not in tensors]
    if missing:
        raise WeightsError(
            f"{path} lacks {len(missing)} of {len(wanted)} tensors: {_few(missing)}; its metadata "
            "calls for them"
        )
    left_over = sorted(set(tensors) - {slot.name for slot in wanted})
    if left_over:
        raise WeightsError(
            f"{path} has {len(left_over)} tensors its metadata does not call for: {_few(left_over)}"
        )
    for slot in wanted:
        tensor = tensors[slot.name]
        if tensor.dims != slot.dims:
            raise WeightsError(
                f"{path}: {slot.name} has dims {list(tensor.dims)}; the metadata calls for "
                f"{list(slot.dims)}"
            )
        if tensor.type not in slot.types:
            raise WeightsError(
                f"{path}: {slot.name} has type {tensor.type}; need {' or '.join(slot.types)}"
            )
        pair = tensors.get(slot.name.replace("ffn_gate_exps", "ffn_up_exps"), tensor)
        if pair.type != tensor.type:
            raise WeightsError(
                f"{path}: {tensor.name} is {tensor.type} and {pair.name} {pair.type}; need one "
                "type for both"
            )


def _few(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
