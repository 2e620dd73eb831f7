"""What the parts of a model take in memory, computed before any of them is there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ds4py.cache.rows import FIRST_CAPACITY, LARGEST_STEP, RowFormat, RowFormats
from ds4py.config import LayerPlan, ModelConfig
from ds4py.engine.checkpoints import MOST
from ds4py.experts.section import DECODED
from ds4py.formats.bundle import LayerRecords
from ds4py.kernels import build
from ds4py.kernels.host import N_MULTIPLE
from ds4py.kernels.ops import Dtype, Ops
from ds4py.weights import names
from ds4py.weights.bundle import ROUTED
from ds4py.weights.source import Source

OVERHEAD = 8 << 20
"""Buffers of the BLAS library and Python's own objects."""


@dataclass(frozen=True)
class Numerics:
    """In what form weights, rows and activations are held."""

    ops: Ops
    dtype: Dtype
    rows: RowFormats
    prefill_chunk: int
    packed: bool = False
    """Matrices stay in the bytes of the file: the Metal kernels read them so."""
    draft: bool = False
    """The draft layer is loaded, and its window runs along."""

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return int(self.ops.zeros((1,), self.dtype).nbytes)

    @property
    def wide(self) -> int:
        """Bytes of a sum."""
        return int(self.ops.zeros((1,), self.ops.wide).nbytes)


def n_parameters(config: ModelConfig) -> int:
    """Values of the main model as loaded (draft layers apart)."""
    return sum(math.prod(shape) for shape in names.expected(config).values())


def dense_bytes(source: Source, n: Numerics) -> int:
    """The weights every token reads, as held in memory."""
    total, shapes = 0, names.expected(source.config)
    if n.draft:
        drafts = names.expected_draft(source.config)
        shapes |= {name: shape for name, shape in drafts.items() if name.startswith("mtp.0.")}
    for name, shape in shapes.items():
        if ROUTED.search(name):
            continue
        if n.packed and name.endswith(".weight") and len(shape) == 2:
            parts = (name, f"{name.removesuffix('.weight')}.scale")
            total += sum(source.entries[part].n_bytes for part in parts if part in source.entries)
        else:
            total += _weight_bytes(name, shape, n)
    return total


def _weight_bytes(name: str, shape: tuple[int, ...], n: Numerics) -> int:
    *lead, width = shape
    if name.endswith("tid2eid"):
        return math.prod(shape) * 4
    if name.endswith(".ape"):  # beside it stand zeros for the values
        return 2 * math.prod(shape) * n.wide
    matrix = len(shape) == 2
    wide = not matrix or name.endswith(("_fn", "ffn.gate.weight", "wgate.weight", "head.weight"))
    wide = wide or name.endswith("compressor.wkv.weight")
    rows = math.prod(lead)
    if matrix and name != "embed.weight" and not n.ops.lazy:
        rows = -(-rows // N_MULTIPLE) * N_MULTIPLE
    return rows * width * (n.wide if wide or not n.ops.lazy else n.itemsize)


def expert_bytes(
    config: ModelConfig, n: Numerics, records: Mapping[int, LayerRecords] | None
) -> int:
    """All routed experts, as held in memory when resident."""
    layers = range(n_layers(config, n))
    if records is not None:
        return sum(records[i].record_bytes * records[i].n_experts for i in layers)
    d, inner = config.hidden_size, config.moe_intermediate_size
    if n.ops.lazy:
        return (
            len(layers)
            * config.n_routed_experts
            * 3
            * d
            * inner
            * (
                n.itemsize
                if build.metal_available()
                else 4  # its CPU back end gathers float32 only
            )
        )
    padded = sum(-(-out // N_MULTIPLE) * N_MULTIPLE * i for out, i in ((2 * inner, d), (d, inner)))
    return len(layers) * config.n_routed_experts * padded * n.wide


def n_layers(config: ModelConfig, n: Numerics) -> int:
    """Those that are loaded."""
    return len(config.layers) + n.draft


def bytes_per_token(config: ModelConfig, rows: RowFormats) -> float:
    """What one more token of context adds to a session's compressed rows."""
    return sum(_row_bytes(config, rows, i) / plan.ratio for i, plan in _compressed(config))


def kv_bytes(config: ModelConfig, n: Numerics, n_tokens: int) -> int:
    """One session's state at `n_tokens`: rows with the room they grow into, and its frontier."""
    total = frontier_bytes(config, n)
    for i, plan in _compressed(config):
        capacity, need = 0, n_tokens // plan.ratio
        while capacity < need:
            capacity += min(max(capacity, FIRST_CAPACITY), LARGEST_STEP)
        total += capacity * _row_bytes(config, n.rows, i)
    return total


def frontier_bytes(config: ModelConfig, n: Numerics) -> int:
    """The part of a state that does not grow, which is also what a checkpoint keeps."""
    rows = n.rows
    total = n_layers(config, n) * (config.sliding_window - 1) * _width(rows.attention)
    for _, plan in _compressed(config):
        width = config.head_dim + (config.index_head_dim if plan.indexed else 0)
        total += (plan.overlap * plan.ratio - 1) * 2 * plan.overlap * width * n.wide
    one = rows.attention.ops.zeros((1,), rows.attention.dtype)
    return total + config.hc_mult * config.hidden_size * int(one.nbytes)


def _compressed(config: ModelConfig) -> list[tuple[int, LayerPlan]]:
    return [(plan.index, plan) for plan in config.layers if plan.compressed]


def _row_bytes(config: ModelConfig, rows: RowFormats, layer: int) -> int:
    """A compressed row of one layer, with its index row."""
    index = _width(rows.index) if config.layers[layer].indexed else 0
    return _width(rows.attention) + index


def _width(row: RowFormat) -> int:
    return row.width * int(row.ops.zeros((1,), row.stored_dtype).nbytes)


@dataclass(frozen=True)
class Work:
    """What the steps and the loading of a model need for a while."""

    loading: int
    """Bytes besides what is kept."""
    at_once: int
    """Experts held decoded at a time."""

    def scratch(self, config: ModelConfig, n: Numerics, context: int, kv: int) -> int:
        """The most of it; while the model is loaded the session's `kv` bytes are still free."""
        step = step_bytes(config, n, context) + self.at_once * decoding_bytes(config, n)
        return max(step, self.loading - kv) + OVERHEAD


def decoding_bytes(config: ModelConfig, n: Numerics) -> int:
    """What an expert takes while it is decoded and computed with: its three maps, and by MLX's
    operations what lies between them and the blocks: 2.2 to 2.6 times as much, measured."""
    maps = 3 * config.hidden_size * config.moe_intermediate_size * n.wide
    return maps * 8 // 3 if n.ops.lazy else maps


def step_bytes(config: ModelConfig, n: Numerics, context: int) -> int:
    """Working memory of a prefill chunk at the end of the context: with plain array operations,
    where every intermediate result is an array. Metal's kernels keep scores to themselves."""
    c, s = config, min(n.prefill_chunk, context)
    streams = 5 * s * c.hc_mult * c.hidden_size
    queries = 5 * s * c.num_attention_heads * c.head_dim
    pairs = s * c.num_experts_per_tok * (3 * c.moe_intermediate_size + 2 * c.hidden_size)
    seen = scored = 0
    for _, plan in _compressed(c):
        n_rows = context // plan.ratio
        seen = max(seen, min(n_rows, c.index_topk) if plan.indexed else n_rows)
        if plan.indexed and n_rows > c.index_topk:
            scored = max(scored, n_rows)
    attention = index = 0
    if not n.packed:
        keys = c.sliding_window + seen
        attention = s * keys * (3 * c.num_attention_heads + 2 * c.head_dim)
        index = s * scored * (4 * c.index_n_heads + 4)
    return (streams + queries + max(attention, index, pairs) + 4 * c.vocab_size) * n.wide


def loading_bytes(source: Source, n: Numerics, streamed: bool) -> int:
    """What loading takes besides what is kept, at most: the largest tensor decoded and in the order
    of its product, or where tensors stay as stored that and a layer's experts once more."""
    if not n.packed:
        shapes = names.expected(source.config).items()
        return 2 * max(math.prod(s) for k, s in shapes if not ROUTED.search(k)) * n.wide
    largest, layers = 0, Counter[str]()
    for name, entry in source.entries.items():
        routed = ROUTED.search(name)
        if routed is None:
            largest = max(largest, entry.n_bytes)
        elif not streamed:
            layers[f"{routed[1]}.{routed[2]}"] += entry.n_bytes
    return max(largest, *layers.values(), 0)


def decoded_at_once(config: ModelConfig, n: Numerics, packed: bool, streamed: bool) -> int:
    """Experts held decoded at a time: none where kernels read them as they lie (but to collect
    importance, which no plan is made for), one by numpy; by MLX's operations all packed ones of a
    layer, or a few of those that are streamed."""
    if n.packed:
        return 0
    if streamed:
        return min(DECODED, config.n_routed_experts) if n.ops.lazy else 1
    return (config.n_routed_experts if packed else 0) if n.ops.lazy else 1


def session_bytes(config: ModelConfig, n: Numerics, context: int) -> int:
    """One session at its full context, with its checkpoints."""
    return kv_bytes(config, n, context) + MOST * frontier_bytes(config, n)
