"""The text MLX itself generates for a kernel, to hold ours against it.

MLX prints it when a launch is traced for export, which works on a machine without Metal.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from tools.metal_cpu import arrays
from tools.metal_cpu.kernel import Kernel


@contextmanager
def captured_stdout() -> Iterator[Path]:
    """What the process writes to file descriptor 1, C++ streams included, lands in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stdout"
        sys.stdout.flush()
        saved = os.dup(1)
        try:
            with path.open("wb") as file:
                os.dup2(file.fileno(), 1)
            yield path
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def mlx_dtype(dtype: Any) -> Any:
    name = arrays.dtype_name(dtype)
    return mx.bool_ if name == "bool" else getattr(mx, name)


def mlx_source(
    kernel: Kernel,
    inputs: Sequence[Any],
    template: Sequence[tuple[str, Any]],
    output_dtypes: Sequence[Any],
) -> str:
    """The text `mx.fast.metal_kernel` prints for these arguments."""
    made: Any = mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        source=kernel.source,
        header=kernel.header,
        ensure_row_contiguous=kernel.ensure_row_contiguous,
        atomic_outputs=kernel.atomic_outputs,
    )
    values = [(n, v if isinstance(v, bool | int) else mlx_dtype(v)) for n, v in template]

    def launch(*given: mx.array) -> Any:
        return made(
            inputs=list(given),
            template=values,
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(1,)] * len(kernel.output_names),
            output_dtypes=list(map(mlx_dtype, output_dtypes)),
            verbose=True,
        )

    given = [arrays.as_mlx(arrays.as_numpy(x)) for x in inputs]
    with captured_stdout() as path:
        with tempfile.TemporaryDirectory() as folder:
            mx.export_function(os.path.join(folder, "kernel.mlxfn"), launch, *given)
        printed = path.read_text(encoding="utf-8")
    return printed.partition("```\n")[2].rpartition("\n```\n")[0]


def assert_same_source(
    kernel: Kernel,
    inputs: Sequence[Any],
    template: Sequence[tuple[str, Any]] | None = None,
    output_dtypes: Sequence[Any] = ("float32",),
) -> None:
    """Hold the text this harness compiles against MLX's own, byte for byte."""
    ours = kernel.signature([arrays.as_numpy(x) for x in inputs], template or (), output_dtypes)
    theirs = mlx_source(kernel, inputs, template or (), output_dtypes)
    assert ours.text == theirs, f"{kernel.name}: MLX generates another text:\n{theirs}"
