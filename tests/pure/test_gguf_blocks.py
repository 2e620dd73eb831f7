"""The block decoders against the `gguf` package, bit for bit, and MLX against numpy."""

import warnings
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds4py.errors import WeightsError
from ds4py.formats import fp_blocks
from ds4py.formats.gguf_blocks import (
    BY_GGUF_TYPE,
    FORMATS,
    decode,
    decode_columns,
    decode_mlx,
    fp4_from_mxfp4,
    mxfp4_from_fp4,
)

gguf = pytest.importorskip("gguf")

NAMES = pytest.mark.parametrize("name", FORMATS)
# Offsets of the float16 scales in a block.
SCALES = {"Q8_0": [0], "Q2_K": [80, 82], "Q4_K": [0, 2], "Q6_K": [208], "IQ2_XXS": [0], "MXFP4": []}
# Zero, minus zero, subnormals, the largest, infinities, quiet and signalling NaN.
HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0xFC01]


def oracle(name: str, data: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its arithmetic on infinite scales
        return gguf.dequantize(data, getattr(gguf.GGMLQuantizationType, name))


def random_rows(name: str, seed: int, rows: int = 3, blocks: int = 5) -> Any:
    """Random bytes; every other block gets a special value as one of its scales."""
    fmt = FORMATS[name]
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks, fmt.block_bytes), dtype=np.uint8)
    for offset in SCALES[name]:
        special = rng.choice(np.array(HALVES, np.uint16), (rows, blocks, 1)).view(np.uint8)
        chosen = rng.random((rows, blocks, 1)) < 0.5
        data[..., offset : offset + 2] = np.where(chosen, special, data[..., offset : offset + 2])
    return data.reshape(rows, -1)


def assert_same_bits(a: Any, b: Any) -> None:
    """Equal bits; a NaN may carry any sign and payload, which processors choose differently."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.float32
    nan = np.isnan(b)
    np.testing.assert_array_equal(np.isnan(a), nan)
    np.testing.assert_array_equal(a[~nan].view(np.uint32), b[~nan].view(np.uint32))


@NAMES
def test_facts(name: str) -> None:
    fmt = FORMATS[name]
    number = getattr(gguf.GGMLQuantizationType, name)
    assert fmt.gguf_type == number and BY_GGUF_TYPE[number] is fmt
    assert (fmt.block_values, fmt.block_bytes) == gguf.GGML_QUANT_SIZES[number]
    assert fmt.row_values(fmt.row_bytes(4096)) == 4096


@NAMES
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_numpy_equals_the_gguf_package(name: str, seed: int) -> None:
    data = random_rows(name, seed)
    assert_same_bits(decode(name, data), oracle(name, data))


@NAMES
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_mlx_equals_numpy(name: str, seed: int) -> None:
    data = random_rows(name, seed)
    assert_same_bits(np.array(decode_mlx(name, mx.array(data))), decode(name, data))


@NAMES
def test_many_blocks(name: str) -> None:
    """More than are decoded at a time, and no multiple of it."""
    data = random_rows(name, 3, rows=7, blocks=80_000 // FORMATS[name].block_values)
    assert_same_bits(decode(name, data), oracle(name, data))


@NAMES
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_columns_are_the_rows_turned(name: str, kind: type[np.generic]) -> None:
    """Into part of a larger array, of several blocks and more rows than go at a time."""
    fmt = FORMATS[name]
    data = random_rows(name, 4, rows=70_000 // fmt.block_values, blocks=2)
    values = decode(name, data)
    out = np.full((values.shape[1], len(data) + 2), 7, kind)
    decode_columns(name, data, out[:, 1:-1])
    assert_same_bits(out[:, 1:-1].astype(np.float32).T, values)
    assert (out[:, [0, -1]] == 7).all()


def test_every_point_sign_and_scale_of_iq2_xxs() -> None:
    """A group for each of the 256 points, 128 sign indices and 16 scales."""
    group = np.arange(256, dtype=np.uint32)
    words = (group % 128) * (1 + (1 << 7) + (1 << 14) + (1 << 21)) | (group % 16) << 28
    data = np.zeros((32, 66), np.uint8)
    data[:, :2] = np.full((32, 1), 0.125, np.float16).view(np.uint8)
    groups = data[:, 2:].reshape(32, 8, 8)
    groups[..., :4] = group.astype(np.uint8).reshape(32, 8, 1)
    groups[..., 4:] = words.astype("<u4").reshape(32, 8, 1).view(np.uint8)
    assert_same_bits(decode("IQ2_XXS", data), oracle("IQ2_XXS", data))


@pytest.mark.parametrize("shape", [(0, 66), (66,), (2, 3, 132)])
def test_leading_axes(shape: tuple[int, ...]) -> None:
    data = np.zeros(shape, np.uint8)
    expected = (*shape[:-1], shape[-1] // 66 * 256)
    assert decode("IQ2_XXS", data).shape == expected
    assert tuple(decode_mlx("IQ2_XXS", mx.array(data)).shape) == expected


def test_rows_that_are_no_whole_blocks() -> None:
    with pytest.raises(WeightsError, match="85 bytes is not Q2_K"):
        decode("Q2_K", np.zeros((1, 85), np.uint8))
    with pytest.raises(WeightsError, match="200 values cannot be stored as Q4_K"):
        FORMATS["Q4_K"].row_bytes(200)
    with pytest.raises(WeightsError, match="'Q3_K' is no block format"):
        decode("Q3_K", np.zeros((1, 110), np.uint8))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_fp4_and_mxfp4_are_the_same_numbers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    packed = rng.integers(0, 256, (3, 48), dtype=np.uint8)
    scale = rng.integers(0, 255, (3, 3), dtype=np.uint8)
    data = mxfp4_from_fp4(packed, scale)
    again = fp4_from_mxfp4(data)
    np.testing.assert_array_equal(again[0], packed)
    np.testing.assert_array_equal(again[1], scale)
    with np.errstate(over="ignore"):
        theirs = fp_blocks.decode_fp4(packed, fp_blocks.decode_scale(scale))
    np.testing.assert_array_equal(decode("MXFP4", data), theirs)
    assert_same_bits(decode("MXFP4", data), oracle("MXFP4", data))


def test_mxfp4_back_and_forth_for_any_bytes() -> None:
    data = random_rows("MXFP4", 1)
    data[:, ::17] = np.minimum(data[:, ::17], 254)
    np.testing.assert_array_equal(mxfp4_from_fp4(*fp4_from_mxfp4(data)), data)


def test_a_nan_scale_is_refused() -> None:
    with pytest.raises(WeightsError, match="1 of 2 FP4 scales are NaN"):
        mxfp4_from_fp4(np.zeros((1, 32), np.uint8), np.array([[127, 255]], np.uint8))
