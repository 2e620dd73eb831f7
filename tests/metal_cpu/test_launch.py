"""Grids, attributes, buffers and the stand-in for MLX's own function."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("ziglang")
pytest.importorskip("ml_dtypes")

import ml_dtypes

from tools.metal_cpu import Kernel, metal_kernel, toolchain
from tools.metal_cpu.compiler import entry_point
from tools.metal_cpu.rewrite import rewrite
from tools.metal_cpu.source import ATTRIBUTES

pytestmark = pytest.mark.shader
ROOT = Path(__file__).resolve().parents[2]


def expected_attributes(grid: tuple[int, int, int], group: tuple[int, int, int]) -> dict:
    """Attribute -> value of every thread, by position [z, y, x]; vectors are stacked x, y, z."""
    z, y, x = np.indices(grid[::-1])
    position = np.stack([x, y, z])
    size = np.array(group).reshape(3, 1, 1, 1)
    total = np.array(grid).reshape(3, 1, 1, 1)
    which, inside = position // size, position % size
    actual = np.minimum(size, total - which * size)
    index = inside[0] + actual[0] * (inside[1] + actual[1] * inside[2])
    count = actual.prod(axis=0)
    dispatched = group[0] * group[1] * group[2]
    return {
        "dispatch_quadgroups_per_threadgroup": (dispatched + 3) // 4,
        "dispatch_simdgroups_per_threadgroup": (dispatched + 31) // 32,
        "dispatch_threads_per_threadgroup": size,
        "grid_origin": 0 * size,
        "grid_size": total,
        "quadgroup_index_in_threadgroup": index // 4,
        "quadgroups_per_threadgroup": (count + 3) // 4,
        "simdgroup_index_in_threadgroup": index // 32,
        "simdgroups_per_threadgroup": (count + 31) // 32,
        "thread_execution_width": 32,
        "thread_index_in_quadgroup": index % 4,
        "thread_index_in_simdgroup": index % 32,
        "thread_index_in_threadgroup": index,
        "thread_position_in_grid": position,
        "thread_position_in_threadgroup": inside,
        "threadgroup_position_in_grid": which,
        "threadgroups_per_grid": -(-total // size),
        "threads_per_grid": total,
        "threads_per_simdgroup": 32,
        "threads_per_threadgroup": actual,
    }


@pytest.mark.parametrize("seed", [0, 1])
def test_every_attribute_also_in_groups_at_the_edge(seed: int) -> None:
    grid, group = (37, 5, 3), (16, 2, 2)
    names = list(ATTRIBUTES)
    lines = ["uint at = thread_position_in_grid.x + 37 * (thread_position_in_grid.y"]
    lines[0] += " + 5 * thread_position_in_grid.z);"
    for k, name in enumerate(names):
        for c in range(3):
            value = f"{name}.{'xyz'[c]}" if ATTRIBUTES[name] == "uint3" else name
            lines.append(f"o[{3 * k + c} * 555 + at] = {value};")
    kernel = Kernel("attributes", [], ["o"], "\n".join(lines))
    [out] = kernel(
        inputs=[],
        grid=grid,
        threadgroup=group,
        output_shapes=[(len(names), 3, 3, 5, 37)],
        output_dtypes=["uint32"],
        seed=seed,
        mode="check",
    )
    want = expected_attributes(grid, group)
    for name, got in zip(names, out, strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(want[name], got.shape), name)


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_strided_inputs_come_with_their_strides(mode: str) -> None:
    kernel = Kernel(
        "strided",
        ["a"],
        ["o"],
        """
        uint i = thread_position_in_grid.x;
        o[i] = a[elem_to_loc(i, a_shape, a_strides, a_ndim)];
        """,
        ensure_row_contiguous=False,
    )
    base = np.arange(4 * 6 * 5, dtype=np.int32).reshape(4, 6, 5)
    for a in (base[1:, ::2].transpose(2, 0, 1), np.broadcast_to(base[0, :1], (3, 4, 5)), base):
        [out] = kernel(
            inputs=[a],
            grid=(a.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[a.shape],
            output_dtypes=["int32"],
            mode=mode,
        )
        np.testing.assert_array_equal(out, a)


def test_contiguity_is_ensured_when_asked_for() -> None:
    kernel = Kernel("copy", ["a"], ["o"], "uint i = thread_position_in_grid.x; o[i] = a[i];")
    a = np.arange(60, dtype=np.int16).reshape(6, 10)[::2, 1:]
    [out] = kernel(
        inputs=[a], grid=(27, 1, 1), threadgroup=(27, 1, 1), output_shapes=[(3, 9)],
        output_dtypes=["int16"],
    )  # fmt: skip
    np.testing.assert_array_equal(out, a)


@pytest.mark.parametrize("mode", ["fast", "check"])
def test_outputs_start_with_the_given_value(mode: str) -> None:
    kernel = Kernel("some", ["n"], ["o"], "o[n] += 2;")
    [out] = kernel(
        inputs=[3], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(5,)],
        output_dtypes=["float32"], init_value=7, mode=mode,
    )  # fmt: skip
    np.testing.assert_array_equal(out, [7, 7, 7, 9, 7])


def test_it_stands_in_for_mlx() -> None:
    """The call of mx.fast.metal_kernel, on MLX arrays of MLX types."""
    double = metal_kernel(
        name="double",
        input_names=["x", "k"],
        output_names=["o", "n"],
        source="uint i = thread_position_in_grid.x; o[i] = T(float(x[i]) * k + (B ? 1 : 0));"
        " if (i == 0) n[0] = N;",
        header="// nothing\n",
        ensure_row_contiguous=False,
    )
    x = mx.arange(40).astype(mx.bfloat16)
    out, n = double(
        inputs=[x, 2.0],
        template=[("T", mx.bfloat16), ("B", True), ("N", -4)],
        grid=(40, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[(40,), (1,)],
        output_dtypes=[mx.bfloat16, mx.int32],
        verbose=False,
        stream=mx.cpu,
    )
    assert out.dtype == mx.bfloat16 and n.dtype == mx.int32 and n.item() == -4
    assert mx.array_equal(out, x * 2 + 1)


def test_bfloat16_arrays_of_numpy() -> None:
    kernel = Kernel("half_", ["x"], ["o"], "uint i = thread_position_in_grid.x; o[i] = x[i];")
    x = np.linspace(-3, 3, 20).astype(ml_dtypes.bfloat16)
    for dtype in ("bfloat16", ml_dtypes.bfloat16, mx.bfloat16):
        [out] = kernel(
            inputs=[x], grid=(20, 1, 1), threadgroup=(20, 1, 1), output_shapes=[(20,)],
            output_dtypes=[dtype],
        )  # fmt: skip
        assert out.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(out, x)


def test_float_to_bfloat_rounds_to_nearest_even() -> None:
    kernel = Kernel(
        "round_", ["x"], ["o"], "uint i = thread_position_in_grid.x; o[i] = bfloat16_t(x[i]);"
    )
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    bits[:6] = [0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x00008000, 0x80000001]
    x = bits.view(np.float32)
    with np.errstate(invalid="ignore"):
        want = x.astype(ml_dtypes.bfloat16)
    [out] = kernel(
        inputs=[x], grid=(x.size, 1, 1), threadgroup=(64, 1, 1), output_shapes=[x.shape],
        output_dtypes=["bfloat16"],
    )  # fmt: skip
    np.testing.assert_array_equal(out.astype(np.float32), want.astype(np.float32))


def test_a_second_process_compiles_nothing() -> None:
    program = """
import time, numpy as np
from tools.metal_cpu import Kernel, toolchain
toolchain.run = None
k = Kernel("again", ["x"], ["o"], "uint i = thread_position_in_grid.x; o[i] = x[i] + 1;")
[out] = k(inputs=[np.zeros(9, np.float32)], grid=(9, 1, 1), threadgroup=(9, 1, 1),
          output_shapes=[(9,)], output_dtypes=["float32"])
assert out.sum() == 9
"""
    first = program.replace("toolchain.run = None\n", "")
    for text in (first, program):
        subprocess.run([sys.executable, "-c", text], cwd=ROOT, check=True)


@pytest.mark.parametrize("missing", ["ziglang", "ml_dtypes"])
def test_a_missing_package_is_named_with_the_extra(missing: str) -> None:
    program = f"""
import sys
sys.modules[{missing!r}] = None
from tools.metal_cpu import Kernel
Kernel("k", [], ["o"], "o[0] = 1;")(
    inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(1,)], output_dtypes=["int8"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().split("\n")[-1]
    assert missing in last and "pip install" in last and "[shaders]" in last


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos"])
def test_the_sources_compile_for_other_machines(target: str, tmp_path: Path) -> None:
    """Compiled only: no such machine is at hand here."""
    for source in toolchain.RUNTIME.glob("*.cpp"):
        made = str(tmp_path / f"{source.stem}.o")
        toolchain.run(
            ["cc", "-target", target, *toolchain.RUNTIME_FLAGS, "-c", str(source), "-o", made]
        )
    kernel = Kernel("k", ["x"], ["o"], "half h = x[1]; o[0] = T(simd_sum(x[0]) * T(2.0) + h);")
    call = kernel.signature([np.zeros(9, np.float32)], [("T", "bfloat16")], ["bfloat16"])
    text = rewrite(call.text)
    file = tmp_path / "k.cl"
    file.write_text(f'#include "msl.h"\n#line 1 "kernel"\n{text}{entry_point(call)}')
    triple = {"aarch64-macos": "arm64-apple-macos13"}.get(target, target)
    for mode in toolchain.MODES.values():
        toolchain.run(
            ["clang", "-x", "cl", "-target", triple, *toolchain.LANGUAGE, *mode, "-I",
             str(toolchain.MSL), "-c", str(file), "-o", str(tmp_path / "k.o")]
        )  # fmt: skip
