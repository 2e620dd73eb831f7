"""Whether blocks have scales that make numbers, seen without decoding them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ds4py.formats.fp_blocks import TOP_E8M0
from ds4py.formats.gguf_blocks import block_format

HALVES = {
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q4_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
}
"""Where the float16 scales of a block begin."""


def are_finite(name: str, data: npt.NDArray[np.uint8]) -> bool:
    """Whether no block of `data`, uint8 [..., bytes of a row], decodes to NaN or infinity."""
    blocks = data.reshape(-1, block_format(name).block_bytes)
    if name == "MXFP4":
        return bool((blocks[:, 0] <= TOP_E8M0).all())
    tops = (blocks[:, at + 1] & 0x7C for at in HALVES[name])  # a float16's exponent, all ones
    return not any((top == 0x7C).any() for top in tops)
