"""Scales that are no numbers are seen in the blocks exactly when decoding would show them."""

import numpy as np
import pytest

from ds4py.formats.gguf_blocks import FORMATS, decode
from ds4py.formats.gguf_blocks.scales import HALVES, TOP_E8M0, are_finite

# Zero, subnormal, the largest, both infinities, NaN of either sign.
HALF = [0x0000, 0x8001, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0xFC01]


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("bits", HALF)
def test_half_scales(name: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for at in HALVES[name]:
        data = rng.integers(0, 256, (3, 4, FORMATS[name].block_bytes), np.uint8)
        for other in HALVES[name]:
            data[..., other : other + 2] = np.array([1], np.float16).view(np.uint8)
        assert are_finite(name, data.reshape(3, -1))
        data[1, 2, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
        rows = data.reshape(3, -1)
        assert are_finite(name, rows) == np.isfinite(decode(name, rows)).all()


def test_mxfp4_scales() -> None:
    largest = np.full((1, 17), 0x77, np.uint8)  # every value 6 times the scale
    for scale in range(256):
        largest[0, 0] = scale
        finite = bool(np.isfinite(decode("MXFP4", largest)).all())
        assert are_finite("MXFP4", largest) == finite == (scale <= TOP_E8M0)


def test_every_format_is_known() -> None:
    assert {*HALVES, "MXFP4"} == set(FORMATS)
