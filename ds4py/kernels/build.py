"""The only place that asks what the machine can do."""

from __future__ import annotations

import mlx.core as mx

from ds4py.errors import OptionsError
from ds4py.kernels.dense import BlasDense, Dense, MlxDense

KERNELS = ("auto", "metal", "reference")


def metal_available() -> bool:
    """Whether MLX runs on an Apple GPU here."""
    return bool(mx.metal.is_available())


def default_dtype() -> mx.Dtype:
    """bfloat16 where the hardware has it; float32 on a CPU, whose BLAS knows nothing else."""
    return mx.bfloat16 if metal_available() else mx.float32


def dense_for(kernels: str) -> Dense:
    """How matrix products are computed for a `kernels` option. Raises OptionsError.

    "reference" is plain MLX everywhere; "auto" uses the host's BLAS where there is no GPU.
    """
    if kernels not in KERNELS:
        raise OptionsError(f"kernels is {kernels!r}; need one of {', '.join(KERNELS)}")
    if kernels == "metal":
        raise OptionsError(
            "kernels is 'metal', but this version has no Metal shaders of its own; use 'auto', "
            "which runs MLX's operations on the GPU where there is one"
        )
    return MlxDense() if kernels == "reference" or metal_available() else BlasDense()
