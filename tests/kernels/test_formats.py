"""What Python and the shaders must agree on about packed matrices, and the decoders of both kinds
of arrays."""

import re

import mlx.core as mx
import numpy as np
import pytest

from ds4py import assets
from ds4py.errors import WeightsError
from ds4py.formats import fp_blocks
from ds4py.formats.gguf_blocks import FORMATS
from ds4py.formats.gguf_blocks.tables import IQ2XXS_CODES
from ds4py.kernels.formats import CODES, row_bytes, unpack
from tests.kernels.packed import random_rows

HEADER = assets.path("metal", "include", "formats.h").read_text(encoding="ascii")


def test_the_shaders_know_the_same_formats() -> None:
    codes = {name: int(code) for name, code in re.findall(r"FORMAT_(\w+) = (\d+)", HEADER)}
    assert codes == CODES
    numbers = re.search(r"IQ2_XXS_POINTS\[256\] = \{(.*?)\}", HEADER, re.DOTALL)
    assert numbers is not None
    points = [int(number, 16) for number in re.findall(r"0x\w+", numbers[1])]
    codes_of = (np.array(points)[:, None] >> np.arange(0, 16, 2)) & 3
    np.testing.assert_array_equal(codes_of, IQ2XXS_CODES)


@pytest.mark.parametrize("name", CODES)
def test_rows_decode_alike_in_both_libraries(name: str) -> None:
    rows = random_rows(name, 5, 512, np.random.default_rng(0))
    assert rows.shape == (5, row_bytes(name, 512)) and rows.dtype == np.uint8
    values = unpack(name, rows, 512)
    np.testing.assert_array_equal(np.array(unpack(name, mx.array(rows), 512)), values)
    assert 0.1 < np.abs(values).mean() < 10
    np.testing.assert_array_equal(unpack(name, rows[None, 2:4], 512)[0], values[2:4])


def test_fp8_rows_are_the_checkpoints() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 127, (130, 192), dtype=np.uint8)
    scale = rng.integers(120, 130, (2, 2)).astype(np.uint8)
    rows = fp_blocks.fp8_rows(codes, scale)
    assert rows.shape[1] == row_bytes("FP8", 192)
    expected = fp_blocks.decode_fp8(codes, fp_blocks.decode_scale(scale))
    np.testing.assert_array_equal(unpack("FP8", rows, 192), expected)


def test_a_row_that_is_no_whole_number_of_blocks_is_an_error() -> None:
    assert [row_bytes(name, 256) for name in FORMATS] == [272, 84, 144, 210, 66, 136]
    with pytest.raises(WeightsError, match="192 values cannot be stored as Q2_K"):
        row_bytes("Q2_K", 192)
