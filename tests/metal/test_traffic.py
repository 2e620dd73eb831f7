"""One decoded token of the embedded model in check mode: no findings, and every weight read once.

How well lines are used is tested at the widths of V4-Flash, kernel by kernel (tests/kernels): rows
of 128 values are shorter than what a simdgroup loads.
"""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from ds4py.bench import kernels
from ds4py.bench.traffic import bytes_per_token
from ds4py.kernels.build import Launcher
from ds4py.model.moe import ResidentExperts

pytest.importorskip("ziglang")
from tools.metal_cpu import Kernel

pytestmark = pytest.mark.shader

WEIGHTS = {
    "dense_project": {f"w{i}" for i in range(8)},
    "dense_expand": {"w"},
    "moe_gate_up": {"records", "shared_gate", "shared_up"},
    "moe_down": {"records", "shared_down"},
}
"""The inputs of each kernel that are weights."""
CLASSES = (
    "attention",
    "compressors, indexers",
    "router",
    "shared expert",
    "routed experts",
    "head",
)


class Checked:
    """Stands in for `mx.fast.metal_kernel`; counts what is loaded while `mode` is check."""

    def __init__(self) -> None:
        self.mode = "fast"
        self.read: Counter[str] = Counter()

    def __call__(self, **names: Any) -> Any:
        kernel = Kernel(**names)
        name = re.sub(r"_\d+$", "", kernel.name)  # a variant's number

        def call(**how: Any) -> list[Any]:
            made = kernel(mode=self.mode, **how)
            for buffer, traffic in kernel.last.traffic.items():
                if buffer in WEIGHTS.get(name, ()):
                    self.read[name] += traffic.useful
            return made

        return call


def test_a_token_reads_its_weights_once() -> None:
    checked = Checked()
    engine = Engine.open("tiny", EngineOptions(kernels="metal"), launcher=Launcher(checked))
    ids = [int(i) for i in np.random.default_rng(0).integers(20, 2048, 10)]
    session = engine.session()
    session.sync(ids[:9])
    checked.mode = "check"
    session.sync(ids)
    assert isinstance(engine.experts, ResidentExperts)
    must = bytes_per_token(engine.model, engine.experts, engine.model.new_state())
    needed = sum(must[name] for name in CLASSES)
    total = checked.read.total()
    assert 1 <= total / needed <= 1.03, (needed, checked.read)


def test_a_token_is_timed() -> None:
    engine = Engine.open("tiny", EngineOptions(kernels="metal"), launcher=Launcher(Checked()))
    timed = kernels.time_token(engine, 10, 3)
    assert timed.ms > 0 and 0 < timed.gb_per_s < 10
    assert 1e8 < kernels.memory_rate(1 << 24) < 1e12
