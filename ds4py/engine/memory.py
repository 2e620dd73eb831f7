"""The memory plan: where every byte of a budget goes, decided before anything is loaded.

A plan counts the process itself, the weights every token reads, one session at its full context,
the largest step's working memory, and the routed experts, all of them or as many as there is room
for. What the dense weights really take is measured once they are loaded; the experts' slots get
what is left.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from ds4py.cache.rows import row_formats
from ds4py.config import ModelConfig
from ds4py.engine.footprint import (
    Numerics,
    Work,
    decoded_at_once,
    dense_bytes,
    expert_bytes,
    loading_bytes,
    session_bytes,
    step_bytes,
)
from ds4py.engine.options import EngineOptions
from ds4py.errors import OptionsError
from ds4py.experts.streamed import SlotPlan, staging_slots
from ds4py.formats.bundle import LayerRecords
from ds4py.kernels import build
from ds4py.kernels.ops import MlxOps, Ops
from ds4py.sizes import format_size, parse_size
from ds4py.weights.bundle import layout_of
from ds4py.weights.files import ModelFiles
from ds4py.weights.source import Source

SHARE = (7, 8)
"""Without --memory, this part of what the machine reports as usable."""
LEAST_CONTEXT = 4096
"""Not halved further when nobody asked for a context."""


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
    """What the largest step needs besides, or loading the model before there is a session."""
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
    all_experts, packed = expert_bytes(config, n, records), records is not None
    work = Work(loading_bytes(source, n, False), decoded_at_once(config, n, packed, False))
    plan = _plan(config, n, dense, all_experts, _budget(memory), context, work, runtime)
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
    work = Work(loading_bytes(source, n, True), decoded_at_once(config, n, packed, True))
    plan = replace(plan, scratch=work.scratch(config, n, plan.context, plan.kv))
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
    largest: int,
    context: int | None = None,
    memory: str | None = None,
) -> tuple[Numerics, MemoryPlan | OptionsError]:
    """The plan of a bundle that does not exist yet, as the Metal kernels would hold it.

    formats: of gate, up and down, by layer. dense: bytes of everything but the routed experts, and
    largest those of its largest tensor.
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
        work = Work(largest, decoded_at_once(config, n, True, False))
        plan = _plan(config, n, dense, expert_bytes(config, n, records), budget, context, work)
        if plan.spare >= 0:
            return n, plan
        work = replace(work, at_once=decoded_at_once(config, n, True, True))
        plan = replace(plan, scratch=work.scratch(config, n, plan.context, plan.kv))
        return n, fit(plan, config, records)
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
    work: Work,
    runtime: int | None = None,
) -> MemoryPlan:
    """With all experts in memory, whether or not they fit."""
    if context is None:
        context = _fitting_context(config, n, budget // 4)
    kv = session_bytes(config, n, context)
    return MemoryPlan(
        budget=budget,
        context=context,
        runtime=resident_bytes() if runtime is None else runtime,
        dense=dense,
        kv=kv,
        scratch=work.scratch(config, n, context, kv),
        all_experts=experts,
    )


def _fitting_context(config: ModelConfig, n: Numerics, room: int) -> int:
    """The model's own context, halved until rows and working memory fit into `room` bytes."""
    context = config.max_position_embeddings
    while context > LEAST_CONTEXT:
        if session_bytes(config, n, context) + step_bytes(config, n, context) <= room:
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
