"""The memory plan: where every byte of a budget goes, decided before anything is loaded.

A plan counts the process itself, the weights every token reads, one session at its full context,
the largest step's working memory, and the routed experts, all of them or as many as there is room
for. What the dense weights really take is measured once they are loaded; the experts' slots get
what is left.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from ds4py.cache.rows import FIRST_CAPACITY, LARGEST_STEP, RowFormat, RowFormats, row_formats
from ds4py.config import LayerPlan, ModelConfig
from ds4py.engine.checkpoints import MOST
from ds4py.engine.options import EngineOptions
from ds4py.errors import OptionsError
from ds4py.experts.streamed import SlotPlan, staging_slots
from ds4py.formats.bundle import LayerRecords
from ds4py.kernels import build
from ds4py.kernels.host import N_MULTIPLE
from ds4py.kernels.ops import Dtype, MlxOps, Ops
from ds4py.sizes import format_size, parse_size
from ds4py.weights import names
from ds4py.weights.bundle import ROUTED, layout_of
from ds4py.weights.files import ModelFiles
from ds4py.weights.source import Source

SHARE = (7, 8)
"""Without --memory, this part of what the machine reports as usable."""
LEAST_CONTEXT = 4096
"""Not halved further when nobody asked for a context."""
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

    @property
    def itemsize(self) -> int:
        """Bytes of an activation."""
        return int(self.ops.zeros((1,), self.dtype).nbytes)

    @property
    def wide(self) -> int:
        """Bytes of a sum."""
        return int(self.ops.zeros((1,), self.ops.wide).nbytes)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose."""

    budget: int
    context: int
    """Tokens a session may hold."""
    runtime: int
    """The process before the model: interpreter, libraries, tokenizer."""
    dense: int
    """Weights that every token reads."""
    kv: int
    """One session's rows, frontiers and checkpoints at the full context."""
    scratch: int
    """What the largest step needs besides."""
    all_experts: int
    """The routed experts, if all were in memory."""
    slots: tuple[SlotPlan, ...] = ()
    """Where experts are streamed: the slots for them. Empty: all are resident."""
    decoded: int = 0
    """Resident experts that numpy keeps decoded: all, as far as half of the rest holds them."""

    @property
    def streamed(self) -> bool:
        return bool(self.slots)

    @property
    def experts(self) -> int:
        """The routed experts in memory."""
        return sum(p.n_bytes for p in self.slots) if self.slots else self.all_experts

    @property
    def fixed(self) -> int:
        """Everything but the experts."""
        return self.runtime + self.dense + self.kv + self.scratch

    @property
    def total(self) -> int:
        return self.fixed + self.experts + self.decoded

    @property
    def spare(self) -> int:
        """Left of the budget; more live sessions may use it."""
        return self.budget - self.total


def usable_memory() -> int:
    """Bytes this process may use without hurting the machine, as the system reports them."""
    if platform.system() == "Darwin":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if not build.metal_available():
            return total
        return min(total, int(mx.device_info()["max_recommended_working_set_size"]))
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    found = [int(fields["MemAvailable"].split()[0]) * 1024 + resident_bytes()]
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.exists() and (value := path.read_text(encoding="ascii").strip()).isdigit():
            found.append(int(value))
    return min(found)


def resident_bytes() -> int:
    """What this process occupies now; on macOS what it occupied at most so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def release_free_memory() -> None:
    """Give pages of freed buffers back to the system, where the C library keeps them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def n_parameters(config: ModelConfig) -> int:
    """Values of the main model as loaded (draft layers apart)."""
    return sum(math.prod(shape) for shape in names.expected(config).values())


def dense_bytes(source: Source, n: Numerics) -> int:
    """The weights every token reads, as held in memory."""
    total = 0
    for name, shape in names.expected(source.config).items():
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
    """All routed experts of the main model, as held in memory when resident."""
    layers = range(len(config.layers))
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


def bytes_per_token(config: ModelConfig, rows: RowFormats) -> float:
    """What one more token of context adds to a session's compressed rows."""
    return sum(_row_bytes(config, rows, i) / plan.ratio for i, plan in _compressed(config))


def kv_bytes(config: ModelConfig, rows: RowFormats, n_tokens: int, wide: int = 4) -> int:
    """One session's state at `n_tokens`: rows with the room they grow into, and its frontier."""
    total = frontier_bytes(config, rows, wide)
    for i, plan in _compressed(config):
        capacity, need = 0, n_tokens // plan.ratio
        while capacity < need:
            capacity += min(max(capacity, FIRST_CAPACITY), LARGEST_STEP)
        total += capacity * _row_bytes(config, rows, i)
    return total


def frontier_bytes(config: ModelConfig, rows: RowFormats, wide: int = 4) -> int:
    """The part of a state that does not grow, which is also what a checkpoint keeps."""
    total = len(config.layers) * (config.sliding_window - 1) * _width(rows.attention)
    for _, plan in _compressed(config):
        width = config.head_dim + (config.index_head_dim if plan.indexed else 0)
        total += (plan.overlap * plan.ratio - 1) * 2 * plan.overlap * width * wide
    return total


def _compressed(config: ModelConfig) -> list[tuple[int, LayerPlan]]:
    return [(plan.index, plan) for plan in config.layers if plan.compressed]


def _row_bytes(config: ModelConfig, rows: RowFormats, layer: int) -> int:
    """A compressed row of one layer, with its index row."""
    index = _width(rows.index) if config.layers[layer].indexed else 0
    return _width(rows.attention) + index


def _width(row: RowFormat) -> int:
    return row.width * int(row.ops.zeros((1,), row.stored_dtype).nbytes)


def scratch_bytes(config: ModelConfig, n: Numerics, context: int) -> int:
    """Working memory of a prefill chunk at the end of the context, of decoding one expert, and of
    loading the largest tensor, whichever is most: with plain array operations, where every
    intermediate result is an array. Metal's kernels keep scores to themselves."""
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
    step = streams + queries + max(attention, index, pairs)
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    logits = 4 * c.vocab_size
    largest = max(math.prod(shape) for shape in names.expected(c).values())
    return max((step + logits) * n.wide, 2 * largest * n.wide) + expert * n.wide + OVERHEAD


def plan_memory(
    source: Source,
    n: Numerics,
    records: Mapping[int, LayerRecords] | None,
    context: int | None = None,
    memory: str | None = None,
    experts: str = "auto",
    slots: int | None = None,
    runtime: int | None = None,
) -> MemoryPlan:
    """Divide a budget such as "24GB" (None: SHARE of the usable memory).

    context: None = the model's own, or as much of it as a quarter of the budget holds. experts:
    "resident", "streamed" or "auto". slots: a wish for the number of expert slots. runtime: the
    process without the model, now by default. Raises OptionsError with the shortfall when it does
    not fit, or when experts cannot be streamed from this kind of file.
    """
    config, dense = source.config, dense_bytes(source, n)
    all_experts = expert_bytes(config, n, records)
    plan = _plan(config, n, dense, all_experts, _budget(memory), context, runtime)
    if experts != "streamed" and plan.spare >= 0:
        if records is None or n.ops.lazy:
            return plan
        return replace(plan, decoded=min(expert_bytes(config, n, None), plan.spare // 2))
    if experts == "resident" or records is None:
        if experts == "streamed":
            raise OptionsError(
                "experts is 'streamed', but they can be read from disk only where they are "
                "quantised: in a bundle or a GGUF file; make one with `ds4 quantize`"
            )
        raise OptionsError(
            f"{_lacks(plan, 'the routed experts', plan.all_experts)}"
            + (
                "; make a bundle with `ds4 quantize`, whose experts can stay on disk"
                if records is None
                else "; without --experts resident they can stay on disk"
            )
        )
    if slots is not None:
        return replace(plan, slots=divide(config, records, slots))
    return fit(plan, config, records)


def plan_files(
    files: ModelFiles, context: int | None, memory: str | None
) -> tuple[Numerics, MemoryPlan | OptionsError]:
    """The plan of a model that is not loaded, under default options; or why there is none."""
    ops, dtype, launcher = build.choose("auto", "auto")
    rows = row_formats(ops, files.config, dtype, rounded=True, native=True)
    chunk, source = EngineOptions().prefill_chunk, files.source()
    numerics = Numerics(ops, dtype, rows, chunk, launcher is not None)
    records = source.records()
    try:
        return numerics, plan_memory(source, numerics, records, context, memory)
    except OptionsError as exc:
        return numerics, exc


def plan_recipe(
    config: ModelConfig,
    formats: Sequence[tuple[str, str, str]],
    dense: int,
    context: int | None = None,
    memory: str | None = None,
) -> tuple[Numerics, MemoryPlan | OptionsError]:
    """The plan of a bundle that does not exist yet, as the Metal kernels would hold it.

    formats: of gate, up and down, by layer. dense: bytes of everything but the routed experts.
    """
    ops = cast(Ops, MlxOps())
    rows = row_formats(ops, config, mx.bfloat16, rounded=True, native=True)
    n = Numerics(ops, mx.bfloat16, rows, EngineOptions().prefill_chunk, packed=True)
    records = {
        layer: LayerRecords(layer, (), config.n_routed_experts, layout_of(config, each), each, None)
        for layer, each in enumerate(formats)
    }
    try:
        budget = _budget(memory)
        plan = _plan(config, n, dense, expert_bytes(config, n, records), budget, context)
        return n, plan if plan.spare >= 0 else fit(plan, config, records)
    except OptionsError as exc:
        return n, exc


def _budget(memory: str | None) -> int:
    return parse_size(memory) if memory else usable_memory() * SHARE[0] // SHARE[1]


def _plan(
    config: ModelConfig,
    n: Numerics,
    dense: int,
    experts: int,
    budget: int,
    context: int | None,
    runtime: int | None = None,
) -> MemoryPlan:
    """With all experts in memory, whether or not they fit."""
    if context is None:
        context = _fitting_context(config, n, budget // 4)
    return MemoryPlan(
        budget=budget,
        context=context,
        runtime=resident_bytes() if runtime is None else runtime,
        dense=dense,
        kv=_session_bytes(config, n, context),
        scratch=scratch_bytes(config, n, context),
        all_experts=experts,
    )


def _session_bytes(config: ModelConfig, n: Numerics, context: int) -> int:
    """One session at its full context, with its checkpoints."""
    checkpoints = MOST * frontier_bytes(config, n.rows, n.wide)
    return kv_bytes(config, n.rows, context, n.wide) + checkpoints


def _fitting_context(config: ModelConfig, n: Numerics, room: int) -> int:
    """The model's own context, halved until rows and working memory fit into `room` bytes."""
    context = config.max_position_embeddings
    while context > LEAST_CONTEXT:
        if _session_bytes(config, n, context) + scratch_bytes(config, n, context) <= room:
            break
        context //= 2
    return context


def fit(plan: MemoryPlan, config: ModelConfig, records: Mapping[int, LayerRecords]) -> MemoryPlan:
    """The plan with as many slots as the rest of its budget holds. Raises OptionsError."""
    least = config.num_experts_per_tok * len(records)
    if _slot_bytes(config, records, least) > plan.budget - plan.fixed:
        what = f"{config.num_experts_per_tok} experts for each of {len(records)} layers"
        raise OptionsError(_lacks(plan, what, _slot_bytes(config, records, least)))
    low, high = least, sum(r.n_experts for r in records.values())
    while low < high:
        middle = (low + high + 1) // 2
        if _slot_bytes(config, records, middle) <= plan.budget - plan.fixed:
            low = middle
        else:
            high = middle - 1
    return replace(plan, slots=divide(config, records, low))


def refit(plan: MemoryPlan, config: ModelConfig, records: Mapping[int, LayerRecords]) -> MemoryPlan:
    """The plan once the dense weights are loaded: what they and the process take is measured."""
    release_free_memory()
    dense = max(0, resident_bytes() - plan.runtime)
    if platform.system() == "Darwin":  # where pages of the GPU's buffers may not be counted
        dense = max(dense, plan.dense)
    return fit(replace(plan, dense=dense, slots=()), config, records)


def divide(
    config: ModelConfig, records: Mapping[int, LayerRecords], n_slots: int
) -> tuple[SlotPlan, ...]:
    """Slots for each size of record: at least one token's, the rest evenly by layers."""
    sizes = sorted({r.record_bytes for r in records.values()})
    layers = {s: tuple(i for i, r in records.items() if r.record_bytes == s) for s in sizes}
    shares = np.array([len(layers[size]) for size in sizes], float) * n_slots / len(records)
    counts = np.floor(shares).astype(int)
    counts[: n_slots - int(counts.sum())] += 1
    return tuple(
        SlotPlan(
            layers[size],
            size,
            min(int(count), config.n_routed_experts * len(layers[size])),
            staging_slots(config.n_routed_experts),
        )
        for size, count in zip(sizes, counts, strict=True)
    )


def _slot_bytes(config: ModelConfig, records: Mapping[int, LayerRecords], n_slots: int) -> int:
    return sum(p.n_bytes for p in divide(config, records, n_slots))


def _lacks(plan: MemoryPlan, what: str, needed: int) -> str:
    """Where the memory would go and how much is missing."""
    parts: Sequence[tuple[int, str]] = (
        (plan.runtime, "the program"),
        (plan.dense, "weights every token reads"),
        (plan.kv, f"{plan.context} tokens of context"),
        (plan.scratch, "working memory"),
        (needed, what),
    )
    listed = ", ".join(f"{format_size(size)} for {purpose}" for size, purpose in parts)
    short = plan.fixed + needed - plan.budget
    return (
        f"memory is {format_size(plan.budget)}, {format_size(short)} too little: {listed}; give "
        "more memory or a smaller context"
    )
