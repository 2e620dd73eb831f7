"""Native rows: their layout byte by byte, and that packing loses nothing the rounding kept."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4py.cache import rows
from ds4py.cache.rows import RowLayout
from ds4py.config import ModelConfig
from ds4py.formats.fp_blocks import E2M1, E4M3
from ds4py.kernels import rounding
from ds4py.kernels.host import HostOps
from ds4py.kernels.ops import MlxOps, Ops

ALL = [
    pytest.param(cast(Ops, ops), id=name) for name, ops in (("host", HostOps()), ("mlx", MlxOps()))
]
FLASH = RowLayout(448, 8, 64, 64)
INDEX = RowLayout(128, 4, 32, 0)


def samples(width: int) -> Any:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((60, width)) * np.exp(rng.standard_normal((60, 1)) * 5)
    x[0], x[1], x[2], x[3] = 0, -448.0, 2.0**-40, -0.0
    x[4] = np.arange(width) / 16 - width / 32  # many exact ties
    return x.astype(np.float32)


def bits(x: Any) -> Any:
    return np.array(x).view(np.uint32)


def test_layouts_of_the_released_models() -> None:
    config = cast(ModelConfig, SimpleNamespace(head_dim=512, nope_head_dim=448, index_head_dim=128))
    assert rows.attention_layout(config) == FLASH
    assert rows.index_layout(config) == INDEX
    assert (FLASH.scales_at, FLASH.tail_at, FLASH.row_bytes) == (448, 456, 584)
    assert (INDEX.scales_at, INDEX.row_bytes) == (64, 68)
    # 21 layers of ratio 4 and 20 of ratio 128: what a token of context costs
    assert round(21 * (584 + 68) / 4 + 20 * 584 / 128) == 3514


@pytest.mark.parametrize("ops", ALL)
def test_the_bytes_of_a_row(ops: Ops) -> None:
    """By hand: 448 = code 0x7e at scale 1, and half of every smaller power of two below it."""
    x = np.zeros((1, 512), np.float32)
    x[0, :5] = 448, 1, -2, 2.0**-9, 25  # 25 is halfway between 24 and 26: the even code is 24's
    x[0, 64] = 896  # its block's scale is 2
    x[0, 448:451] = 1, -1.00390625, 3  # 1 + 2^-8 is halfway: the even one is 1
    stored = np.array(rows.pack(ops, FLASH, ops.array(x)))[0]
    assert stored[:5].tolist() == [0x7E, 0x38, 0xC0, 0x01, 0x5C]
    assert stored[64] == 0x7E
    assert stored[448:455].tolist() == [
        127,
        128,
        *[127 - 22] * 5,
    ]  # 2^-22 is the next above 1e-4 / 448
    assert stored[455] == 0
    assert stored[456:462].tolist() == [0x80, 0x3F, 0x80, 0xBF, 0x40, 0x40]


@pytest.mark.parametrize("ops", ALL)
def test_attention_rows_lose_nothing(ops: Ops) -> None:
    x = samples(512)
    stored = rows.pack(ops, FLASH, ops.array(x))
    read = np.array(rows.unpack(ops, FLASH, stored))
    rounded = np.array(rounding.fp8_round(ops, ops.array(x), 448))
    np.testing.assert_array_equal(bits(read[:, :448]), bits(rounded[:, :448]))
    tail = np.array(stored)[:, 456:].copy().view("<u2").astype(np.uint32) << 16
    np.testing.assert_array_equal(bits(read[:, 448:]), tail)
    error = np.abs(read[:, 448:] - x[:, 448:])
    assert (error <= np.abs(x[:, 448:]) * 2.0**-8).all()
    by_hand = E4M3[np.array(stored)[:, :448]].astype(np.float64).reshape(-1, 7, 64)
    by_hand = by_hand * np.exp2(np.array(stored)[:, 448:455, None] - 127.0)
    np.testing.assert_array_equal(by_hand.reshape(-1, 448), read[:, :448])
    again = rows.pack(ops, FLASH, ops.array(read))  # rounding twice is rounding once
    np.testing.assert_array_equal(bits(rows.unpack(ops, FLASH, again)), bits(read))


@pytest.mark.parametrize("ops", ALL)
def test_index_rows_lose_nothing(ops: Ops) -> None:
    x = samples(128)
    stored = rows.pack(ops, INDEX, ops.array(x))
    read = np.array(rows.unpack(ops, INDEX, stored))
    np.testing.assert_array_equal(bits(read), bits(rounding.fp4_round(ops, ops.array(x))))
    raw = np.array(stored)
    nibbles = np.stack([raw[:, :64] & 15, raw[:, :64] >> 4], axis=2).reshape(-1, 4, 32)
    by_hand = E2M1[nibbles].astype(np.float64) * np.exp2(raw[:, 64:, None] - 127.0)
    np.testing.assert_array_equal(by_hand.reshape(-1, 128), read)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=64, max_size=64))
def test_any_finite_values(values: list[float]) -> None:
    ops = cast(Ops, HostOps())
    layout = RowLayout(64, 8, 64, 64)
    x = np.array([values + values], np.float32)
    read = np.array(rows.unpack(ops, layout, rows.pack(ops, layout, x)))
    np.testing.assert_array_equal(bits(read[:, :64]), bits(rounding.fp8_round(ops, x, 64))[:, :64])
    assert np.isfinite(read).all()


def test_both_libraries_make_the_same_bytes() -> None:
    host, mlx = cast(Ops, HostOps()), cast(Ops, MlxOps())
    x = samples(512)
    np.testing.assert_array_equal(
        rows.pack(host, FLASH, x), np.array(rows.pack(mlx, FLASH, mlx.array(x)))
    )


def test_a_store_grows_in_steps_and_keeps_its_rows() -> None:
    store = rows.RowStore(cast(Ops, HostOps()), 2, 4, np.uint8)
    expected = np.arange(2 * 700 * 4).astype(np.uint8).reshape(2, 700, 4)
    capacities = []
    for at in range(0, 700, 7):
        store.write(at, expected[:, at : at + 7])
        capacities.append(store.data.shape[1])
    np.testing.assert_array_equal(store.data[:, :700], expected)
    assert sorted(set(capacities)) == [256, 512, 1024]
    assert rows.LARGEST_STEP % rows.FIRST_CAPACITY == 0
