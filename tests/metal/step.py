"""The launches of one step of a model without weights, and what they read.

One launch of each kind is executed in check mode at its full shapes, a few threadgroups of it where
they are alike; its reads are scaled to the grid and counted once for every launch of that kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import mlx.core as mx
import numpy as np

from ds4py.bench import kernels
from ds4py.bench.blank import Blank, FormatOf, unallocated
from ds4py.bench.kernels import state_at
from ds4py.config import ModelConfig
from ds4py.kernels.build import Grid, Launcher
from ds4py.kernels.ops import Array, MlxOps, Ops
from ds4py.weights.load import Loader
from tools.metal_cpu import Kernel
from tools.metal_cpu.arrays import dtype_name, numpy_dtype

SAMPLED = 2
"""Threadgroups that are executed, where they are alike."""
CHOSEN = {"slots", "ids"}
"""Inputs that name what is read, each once."""
WHOLE = {"attend_split", "index_candidates"}
"""Kernels whose threadgroups read different numbers of rows."""
SLOTS = 8
"""Expert records that stand for all of a layer's."""


@dataclass(frozen=True)
class Kind:
    """All that tells the launches of one kernel apart."""

    name: str
    inputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]
    template: tuple[tuple[str, Any], ...]
    grid: Grid
    threadgroup: Grid
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]

    @property
    def groups(self) -> int:
        return prod(-(-g // t) for g, t in zip(self.grid, self.threadgroup, strict=True))


class Step:
    """One token after `position` others, and its commit."""

    def __init__(self, config: ModelConfig, format_of: FormatOf, position: int):
        self.launches: Counter[Kind] = Counter()
        self._kernels: dict[str, Kernel] = {}
        self._integers: dict[Kind, dict[int, np.ndarray]] = {}
        """Inputs that say what is to be read."""
        launcher = Launcher(
            self._make, adopt=lambda host: unallocated(host.shape, getattr(mx, host.dtype.name))
        )
        ops = cast(Ops, MlxOps())
        loader = Loader(Blank(config, format_of), ops, mx.bfloat16, True, True, launcher)
        self.model = loader.transformer()
        self.resident = loader.resident
        tokens = unallocated((1,), mx.int32)
        kernels.step(self.model, [state_at(self.model, position)], tokens, launcher)

    def _make(self, **text: Any) -> Any:
        self._kernels[text["name"]] = Kernel(**text)

        def call(
            inputs: Sequence[Array],
            template: Sequence[tuple[str, Any]],
            grid: Grid,
            threadgroup: Grid,
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
        ) -> list[mx.array]:
            outputs = tuple(zip(output_shapes, output_dtypes, strict=True))
            shapes = tuple((tuple(x.shape), x.dtype) for x in inputs)
            kind = Kind(text["name"], shapes, tuple(template), grid, threadgroup, outputs)
            if kind not in self.launches:
                wanted = {i: x for i, x in enumerate(inputs) if x.dtype == mx.int32}
                self._integers[kind] = {i: np.array(x) for i, x in wanted.items()}
            self.launches[kind] += 1
            return [unallocated(shape, dtype) for shape, dtype in outputs]

        return call

    def reads(self, kind: Kind) -> dict[str, int]:
        """Bytes that one launch reads of each input: a simdgroup's lanes share what they load."""
        kernel, template, integers = self._kernels[kind.name], kind.template, self._integers[kind]
        inputs = []
        for i, (shape, dtype) in enumerate(kind.inputs):
            name = kernel.input_names[i]
            if name == "records":
                shape = (SLOTS, *shape[1:])
                template = tuple((n, SLOTS if n == "SLOTS" else v) for n, v in template)
            given = np.zeros(shape, numpy_dtype(dtype_name(dtype)))
            chosen = name in CHOSEN and len(shape) == 2
            if chosen:
                given[:] = np.arange(shape[1])
            inputs.append(integers[i] if i in integers and not chosen else given)
        sampled = kind.groups if kind.name in WHOLE else min(kind.groups, SAMPLED)
        kernel(
            inputs=inputs,
            template=template,
            grid=kind.grid,
            threadgroup=kind.threadgroup,
            output_shapes=[shape for shape, _ in kind.outputs],
            output_dtypes=[dtype for _, dtype in kind.outputs],
            mode="check",
            sampled=sampled,
        )
        share = kind.groups / sampled
        return {
            name: round(kernel.last.traffic[name].useful * share)
            for name in kernel.input_names
            if name in kernel.last.traffic
        }
