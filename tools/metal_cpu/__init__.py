"""Runs Metal kernels on a CPU, as MLX would compile them; see README.md in this folder."""

from tools.metal_cpu.kernel import Kernel, metal_kernel
from tools.metal_cpu.mlx_text import assert_same_source
from tools.metal_cpu.report import Launch, Report, ShaderError, Traffic
from tools.metal_cpu.toolchain import CompilerError

__all__ = [
    "CompilerError",
    "Kernel",
    "Launch",
    "Report",
    "ShaderError",
    "Traffic",
    "assert_same_source",
    "metal_kernel",
]
