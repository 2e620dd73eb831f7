"""A kernel that runs on the CPU: compile a variant once, launch it many times."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tools.metal_cpu import arrays, launch
from tools.metal_cpu.compiler import Compilations
from tools.metal_cpu.report import Launch, Reader, ShaderError, Traffic
from tools.metal_cpu.source import Argument, Signature

COMPILATIONS = Compilations()
MAX_THREADS = 1024
WORTH_A_WORKER = 4096
"""Threads in a launch below which waking a second worker costs more than it saves."""


@dataclass(frozen=True)
class Variant:
    """A compiled kernel for one set of argument types and template values."""

    signature: Signature
    library: Path
    entry: int
    buffers: Any
    """An array of CBuffer, reused by every launch."""


class Kernel:
    """A kernel given as MLX takes it: names, helper functions, and the body of the function.

    name: as in `mx.fast.metal_kernel`, like all the parameters. Arrays are numpy or MLX arrays;
    bfloat16 in numpy is `ml_dtypes.bfloat16`.
    """

    def __init__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
    ):
        if not output_names:
            raise ValueError(f"kernel {name} has no outputs")
        self.name, self.source, self.header = name, source, header
        self.input_names, self.output_names = tuple(input_names), tuple(output_names)
        self.ensure_row_contiguous, self.atomic_outputs = ensure_row_contiguous, atomic_outputs
        self.last = Launch(name, "", ())
        """The last launch: `last.reports`, `last.report` (text), `last.traffic` by buffer."""
        self._variants: dict[Any, Variant] = {}

    def signature(
        self,
        inputs: Sequence[np.ndarray],
        template: Sequence[tuple[str, Any]],
        output_dtypes: Sequence[Any],
    ) -> Signature:
        """What MLX would generate for these arguments."""
        values = tuple(
            (n, v if isinstance(v, bool | int) else arrays.dtype_name(v)) for n, v in template
        )
        return Signature(
            self.name,
            self.input_names,
            self.output_names,
            self.source,
            self.header,
            self.atomic_outputs,
            tuple(Argument(arrays.dtype_name(x.dtype), x.size, x.ndim) for x in inputs),
            tuple(map(arrays.dtype_name, output_dtypes)),
            values,
        )

    def compile(self, signature: Signature, mode: str) -> Variant:
        """A variant, checked and compiled. Raises ShaderError with the kernel's lines."""
        library = COMPILATIONS.get(signature, mode)
        buffers = (launch.CBuffer * len(signature.buffers))()
        for buffer, described in zip(buffers, signature.buffers, strict=True):
            buffer.is_output = described.is_output
        return Variant(signature, library, launch.load(library), buffers)

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        seed: int = 0,
        mode: str = "fast",
        workers: int | None = None,
        sampled: int = 0,
    ) -> list[Any]:
        """One launch; the outputs, as numpy arrays or, if any input is one, as MLX arrays.

        grid counts threads. seed: order of lanes, simdgroups and threadgroups, and the garbage in
        fresh memory; 0 is the natural order. mode: "fast", or "check" for races, bounds,
        uninitialised memory and counters. init_value: outputs start with it, not with garbage.
        workers: threads to use; None: as many as pay off. sampled: run so many threadgroups only,
        spread over the grid, to count what a large launch reads; 0: all.
        Raises ShaderError for text that does not compile and for everything the launch finds.
        """
        given = [arrays.as_numpy(x) for x in inputs]
        if len(given) != len(self.input_names):
            raise ValueError(f"{self.name} takes {len(self.input_names)} inputs, got {len(given)}")
        if not len(output_shapes) == len(output_dtypes) == len(self.output_names):
            raise ValueError(f"{self.name} has {len(self.output_names)} outputs")
        if self.ensure_row_contiguous:
            given = [np.ascontiguousarray(x).reshape(x.shape) for x in given]
        template = template or ()
        key = (
            mode,
            tuple([(x.dtype, min(x.size, 8), x.ndim) for x in given]),
            tuple([(n, type(v), v) for n, v in template]),
            tuple(output_dtypes),
        )
        variant = self._variants.get(key)
        if variant is None:
            variant = self.compile(self.signature(given, template, output_dtypes), mode)
            self._variants[key] = variant
        outputs = [
            np.empty(shape, arrays.numpy_dtype(dtype))
            for shape, dtype in zip(output_shapes, variant.signature.output_dtypes, strict=True)
        ]
        if init_value is not None:
            for output in outputs:
                output.fill(init_value)
        hosts = self._hosts(variant.signature, given, outputs)
        how = (seed, mode, workers, sampled)
        self._run(variant, hosts, init_value is not None, grid, threadgroup, how)
        if any(isinstance(x, mx.array) for x in inputs):
            return [arrays.as_mlx(x) for x in outputs]
        return outputs

    def _hosts(
        self, signature: Signature, given: list[np.ndarray], outputs: list[np.ndarray]
    ) -> list[np.ndarray]:
        """The memory behind every buffer of the signature, in its order."""
        inputs = dict(zip(self.input_names, given, strict=True))
        results = dict(zip(self.output_names, outputs, strict=True))
        hosts = []
        for buffer in signature.buffers:
            if buffer.is_output:
                hosts.append(results[buffer.name])
            elif buffer.part == "data":
                hosts.append(arrays.memory(inputs[buffer.name]))
            elif buffer.part == "shape":
                hosts.append(np.array(inputs[buffer.name].shape, np.int32))
            elif buffer.part == "strides":
                x = inputs[buffer.name]
                hosts.append(np.array([s // x.itemsize for s in x.strides], np.int64))
            else:
                hosts.append(np.array(inputs[buffer.name].ndim, np.int32))
        return hosts

    def _run(
        self,
        variant: Variant,
        hosts: list[np.ndarray],
        initialised: bool,
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        how: tuple[int, str, int | None, int],
    ) -> None:
        group = tuple(min(t, g) for t, g in zip(threadgroup, grid, strict=True))
        if min(group) < 1:
            raise ValueError(f"{self.name}: grid {grid}, threadgroup {threadgroup}: need >= 1")
        if group[0] * group[1] * group[2] > MAX_THREADS:
            raise ValueError(f"{self.name}: threadgroup {group} has over {MAX_THREADS} threads")
        seed, mode, workers, sampled = how
        if workers is None:
            n_threads = grid[0] * grid[1] * grid[2]
            workers = 1 if n_threads < WORTH_A_WORKER else os.cpu_count() or 1
        run = launch.runtime().msl_run
        with launch.LOCK:
            for buffer, host in zip(variant.buffers, hosts, strict=True):
                buffer.host = host.ctypes.data
                buffer.size = host.nbytes
                buffer.copy_in = initialised or not buffer.is_output
            state = launch.launch_structure()
            state.entry, state.buffers = variant.entry, c.addressof(variant.buffers)
            state.n_buffers, state.check = len(hosts), mode == "check"
            state.grid[:], state.group[:] = grid, group
            state.seed, state.n_workers, state.n_sampled = seed, workers, sampled
            run(c.addressof(state))
            reports = ()
            if state.n_reports:
                sizes = [h.nbytes for h in hosts]
                reports = Reader(variant.signature, variant.library, state, sizes).read()
            self.last = Launch(self.name, mode, reports)
            if mode == "check":
                traffic, used = self._traffic(variant), sum(state.array_sizes)
                self.last = Launch(self.name, mode, reports, traffic, used)
        if reports:
            raise ShaderError("\n".join(map(str, reports)), reports)

    def _traffic(self, variant: Variant) -> dict[str, Traffic]:
        return {
            described.name: Traffic(b.loaded, b.stored, b.touched, b.useful, b.lines)
            for described, b in zip(variant.signature.buffers, variant.buffers, strict=True)
            if described.part == "data"
        }


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: Any = None,
) -> Callable[..., list[Any]]:
    """Stands in for `mx.fast.metal_kernel`: the same arguments, executed at once on the CPU.

    compile_options, and `stream` and `verbose` of the callable, make no difference here; the
    callable also takes `seed` and `mode`.
    """
    kernel = Kernel(
        name, input_names, output_names, source, header, ensure_row_contiguous, atomic_outputs
    )

    def call(*, stream: Any = None, verbose: bool = False, **arguments: Any) -> list[Any]:
        return kernel(**arguments)

    return call
