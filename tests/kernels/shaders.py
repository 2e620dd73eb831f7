"""Runs a wrapper's kernels from their text on the CPU: every order of threads, and the checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels.build import (
    KernelText,
    Launcher,
    metal_available,
    metal_launcher,
    read_kernel,
)

pytest.importorskip("ziglang")
from tools.metal_cpu import Kernel, ShaderError, assert_same_source

Run = Callable[[Launcher], Any]
SEEDS = (1, 2, 3)
LATER = pytest.mark.long
"""Variants that only `pytest -m long` runs: each is compiled twice, 0.4 s on a new machine."""
DTYPES = [mx.float32, pytest.param(mx.bfloat16, marks=LATER)]
_made: dict[KernelText, Kernel] = {}
_compared: set[Any] = set()


def launcher(mode: str = "fast", seed: int = 0, changes: dict[str, Any] | None = None) -> Launcher:
    """Kernels on the CPU. changes: kernel name -> (text, text in its place)."""

    def read(name: str) -> KernelText:
        text = read_kernel(name)
        if changes is not None and name in changes:
            old, new = changes[name]
            assert (text.header + text.body).count(old) == 1, f"{old!r} is not once in {name}"
            text = replace(
                text, header=text.header.replace(old, new), body=text.body.replace(old, new)
            )
        return text

    def make(**names: Any) -> Any:
        key = KernelText(names["name"], (), (), names["header"], names["source"])
        kernel = _made.setdefault(key, Kernel(**names))

        def call(**arguments: Any) -> list[Any]:
            if mode == "check":
                compare_with_mlx(kernel, **arguments)
            return kernel(mode=mode, seed=seed, **arguments)

        return call

    return Launcher(make, read=read, strip=False)  # reports name lines as they are written


def compare_with_mlx(
    kernel: Kernel, inputs: Any, template: Any, output_dtypes: Any, **_: Any
) -> None:
    """MLX would generate the same source, once for every variant."""
    types = tuple((x.dtype, min(x.size, 8), x.ndim) for x in inputs)
    variant = (kernel.name, kernel.source, types, tuple(template), tuple(output_dtypes))
    if variant not in _compared:
        assert_same_source(kernel, inputs, template, output_dtypes)
        _compared.add(variant)


def shader_runs(run: Run) -> list[Any]:
    """What `run` gives in the natural order, which every other order must repeat bit for bit, and
    in check mode, which must find nothing. On a Mac also what its GPU gives."""
    natural = run(launcher())
    for seed in SEEDS:
        for x, y in zip(host(natural), host(run(launcher(seed=seed))), strict=True):
            np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8))
    on_gpu = [run(metal_launcher())] if metal_available() else []
    return [natural, run(launcher("check")), *on_gpu]


def host(made: Any) -> list[np.ndarray]:
    """The arrays of a result, a sequence or a dataclass, as numpy; bfloat16 as float32."""
    if is_dataclass(made):
        made = [getattr(made, field.name) for field in fields(made)]
    return [
        np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)
        for x in made
        if x is not None
    ]


def close(run: Run, expected: Any, rtol: float, atol: float) -> None:
    """Every way of running agrees with the reference."""
    wanted = host(expected)
    for made in shader_runs(run):
        for x, y in zip(host(made), wanted, strict=True):
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def caught(check: Callable[[Launcher], None], changes: dict[str, Any], mode: str = "fast") -> None:
    """`check` passes with the kernels as they are and fails with a planted bug, which compiles."""
    check(launcher(mode))
    for name, (old, _) in changes.items():  # else its absence would pass for a failure
        text = read_kernel(name)
        assert (text.header + text.body).count(old) == 1, f"{old!r} is not once in {name}"
    with pytest.raises((AssertionError, ShaderError)) as failure:
        for seed in SEEDS:
            check(launcher(mode, seed, changes))
    assert "does not compile" not in str(failure.value)


def run_only(run: Run) -> Callable[[Launcher], None]:
    """A check that a launch reports nothing, whatever it computes."""

    def check(launcher: Launcher) -> None:
        run(launcher)

    return check
