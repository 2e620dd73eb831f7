"""The only place that asks what the machine can do."""

from __future__ import annotations

from typing import cast

import mlx.core as mx
import numpy as np

from ds4py.errors import OptionsError
from ds4py.kernels.host import HostOps
from ds4py.kernels.ops import Dtype, MlxOps, Ops

KERNELS = ("auto", "metal", "reference")


def metal_available() -> bool:
    """Whether MLX runs on an Apple GPU here."""
    return bool(mx.metal.is_available())


def choose(kernels: str, dtype: str) -> tuple[Ops, Dtype]:
    """The operations and the activation type for two options. Raises OptionsError.

    kernels: "reference" is MLX everywhere; "auto" is MLX on a GPU and numpy on a CPU. dtype:
    "auto" is bfloat16 on a GPU and float32 on a CPU; numpy has no bfloat16, so asking for it on a
    CPU means MLX. Asking for float32 by name on a CPU means results good to float32: sums are
    taken in float64, at half the speed, because the trained rounding of rows turns the last bit of
    a float32 sum into a visible step wherever a value sits on a rounding boundary.
    """
    if kernels not in KERNELS:
        raise OptionsError(f"kernels is {kernels!r}; need one of {', '.join(KERNELS)}")
    if kernels == "metal":
        raise OptionsError(
            "kernels is 'metal', but this version has no Metal shaders of its own; use 'auto', "
            "which runs MLX's operations on the GPU where there is one"
        )
    if kernels == "reference" or metal_available() or dtype == "bfloat16":
        wanted = {"auto": "bfloat16" if metal_available() else "float32"}.get(dtype, dtype)
        gather = None if metal_available() else mx.float32  # its CPU back end gathers no other
        return cast(Ops, MlxOps(gather)), getattr(mx, wanted)
    ops = HostOps(np.float64 if dtype == "float32" else np.float32)
    return cast(Ops, ops), ops.wide  # the libraries' own signatures say more than Ops does
