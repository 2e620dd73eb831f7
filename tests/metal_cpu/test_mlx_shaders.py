"""MLX's own shaders, from the headers in its wheel, give here what MLX gives.

They run on Macs every day and were not written for this harness: a check of the shader header (the
language, simdgroup functions, the layout of simdgroup matrices) that does not come from us.
"""

import re
from importlib import resources

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("ziglang")
pytest.importorskip("ml_dtypes")

import ml_dtypes

from tools.metal_cpu import Kernel

pytestmark = pytest.mark.shader
HOW = [("fast", 0), ("fast", 1), ("check", 2)]
KERNELS = "mlx/backend/metal/kernels"
OURS = {f"{KERNELS}/utils.h", f"{KERNELS}/logging.h"}
"""What MLX's preamble holds; metal_cpu has its own."""
RNG = np.random.default_rng(5)


def mlx_header(*names: str) -> str:
    """Files of MLX's shader headers with what they include, as plain ASCII."""
    root = resources.files("mlx") / "include"
    seen = set(OURS)

    def resolve(match: re.Match[str]) -> str:
        if match[1] in seen:
            return ""
        seen.add(match[1])
        text = (root / match[1]).read_text(encoding="utf-8")
        text = text.encode("ascii", "replace").decode().replace("#pragma once", "")
        return re.sub(r'^#include "([^"]+)".*$', resolve, text, flags=re.MULTILINE) + "\n"

    return re.sub(r"(.+)\n", resolve, "".join(f"{KERNELS}/{name}\n" for name in names))


CONDITIONAL = """
template <bool c, typename A, typename B> struct ConditionalType { using type = B; };
template <typename A, typename B> struct ConditionalType<true, A, B> { using type = A; };
"""

QMV_BODY = """
  qmv_fast_impl<T, GROUP, BITS>(w, scales, biases, x, y, sizes[0], sizes[1],
                                threadgroup_position_in_grid, simdgroup_index_in_threadgroup,
                                thread_index_in_simdgroup);
"""


@pytest.mark.parametrize(("mode", "seed"), HOW)
@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(2, 32, "float16"), (4, 64, "bfloat16"), (8, 32, "float32")]
)
def test_the_quantised_matvec(bits: int, group: int, dtype: str, mode: str, seed: int) -> None:
    """quantized.h: qmv_fast_impl, which `mx.quantized_matmul` runs for one row."""
    header = mlx_header("steel/gemm/gemm.h", "quantized.h")
    header = re.sub(r"\[\[function_constant\(\d+\)\]\]", "= true", header)
    names = ["w", "scales", "biases", "x", "sizes"]
    kernel = Kernel("qmv", names, ["y"], QMV_BODY, CONDITIONAL + header)
    n, k = 24, 512
    kind = getattr(mx, dtype)
    w, scales, biases = mx.quantize(mx.array(RNG.normal(size=(n, k))).astype(kind), group, bits)
    x = mx.array(RNG.normal(size=(1, k))).astype(kind)
    sizes = mx.array([k, n], mx.int32)
    [y] = kernel(
        inputs=[w, scales, biases, x, sizes],
        template=[("T", kind), ("GROUP", group), ("BITS", bits)],
        grid=(32, 2 * n // 8, 1),
        threadgroup=(32, 2, 1),
        output_shapes=[(1, n)],
        output_dtypes=[kind],
        mode=mode,
        seed=seed,
    )
    weights = mx.dequantize(w, scales, biases, group, bits).astype(mx.float32)
    want = np.array(x.astype(mx.float32), np.float64) @ np.array(weights, np.float64).T
    tolerance = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
    scale = np.abs(want).max()
    np.testing.assert_allclose(np.array(y.astype(mx.float32)), want, atol=tolerance * scale)


GEMM_BODY = """
  using namespace mlx::steel;
  using gemm = GEMMKernel<T, T, 32, 32, 16, 2, 2, false, true, false, false>;
  threadgroup T tile_a[gemm::tgp_mem_size_a];
  threadgroup T tile_b[gemm::tgp_mem_size_b];
  gemm::run(a, b, c, &PARAMS, tile_a, tile_b, thread_index_in_simdgroup,
            simdgroup_index_in_threadgroup, threadgroup_position_in_grid,
            thread_position_in_threadgroup);
"""


@pytest.mark.parametrize(("mode", "seed"), HOW)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_steel_matrix_product(dtype: str, mode: str, seed: int) -> None:
    """steel/gemm: loaders, and simdgroup matrices filled through thread_elements()."""
    header = mlx_header("steel/gemm/gemm.h")
    m, n, k = 45, 37, 40
    sizes = [m, n, k, k, k, n, -(-n // 32), -(-m // 32), 0, 0, 0, 0, k // 16, 0]
    table = f"constant mlx::steel::GEMMParams PARAMS = {{{', '.join(map(str, sizes))}}};\n"
    kernel = Kernel("steel", ["a", "b"], ["c"], GEMM_BODY, header + table)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    a, b = (RNG.normal(size=s).astype(kind) for s in ((m, k), (n, k)))
    [c] = kernel(
        inputs=[a, b],
        template=[("T", dtype)],
        grid=(32 * -(-n // 32), 2 * -(-m // 32), 2),
        threadgroup=(32, 2, 2),
        output_shapes=[(m, n)],
        output_dtypes=[dtype],
        mode=mode,
        seed=seed,
    )
    want = a.astype(np.float64) @ b.astype(np.float64).T
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[dtype]
    np.testing.assert_allclose(c.astype(np.float64), want, atol=tolerance, rtol=tolerance / 4)
