"""The trained round trips against a search through all values of the formats, in float64."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.formats.fp_blocks import E2M1, E4M3, E8M0
from ds4py.kernels import rounding
from ds4py.kernels.host import HostOps
from ds4py.kernels.ops import MlxOps, Ops

ALL = [
    pytest.param(cast(Ops, ops), id=name)
    for name, ops in (("host", HostOps()), ("exact", HostOps(np.float64)), ("mlx", MlxOps()))
]


def nearest(x: Any, codes: Any) -> Any:
    """Nearest of the format's non-negative values with even code on ties; sign kept."""
    values = codes.astype(np.float64)
    distance = np.abs(np.abs(x)[..., None] - values)
    best = distance.min(-1, keepdims=True)
    tied = distance == best
    even = np.arange(len(values)) % 2 == 0
    pick = np.where((tied & even).any(-1), (tied & even).argmax(-1), tied.argmax(-1))
    return np.copysign(values[pick], x)


def reference(x: Any, block: int, codes: Any, most: float, lowest: float) -> Any:
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, block)
    amax = np.maximum(np.abs(blocks).max(-1, keepdims=True), lowest)
    scale = np.exp2(np.ceil(np.log2(amax / most)))
    return (nearest(np.clip(blocks / scale, -most, most), codes) * scale).reshape(x.shape)


def samples() -> Any:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 128)) * np.exp(rng.standard_normal((200, 1)) * 5)
    x[0], x[1, :64], x[2] = 0, 448.0, 2.0**-40
    x[3] = np.arange(128) / 16 - 4  # many exact ties
    return x.astype(np.float32)


@pytest.mark.parametrize("ops", ALL)
def test_fp8(ops: Ops) -> None:
    x = samples()
    out = np.array(rounding.fp8_round(ops, ops.array(x), 64))
    np.testing.assert_array_equal(out[:, 64:], x[:, 64:])
    expected = reference(x[:, :64], 64, E4M3[:127], 448.0, 1e-4)
    np.testing.assert_array_equal(out[:, :64], expected.astype(np.float32))


@pytest.mark.parametrize("ops", ALL)
def test_fp4(ops: Ops) -> None:
    """The input is a Hadamard transform of the samples, so that the transform gives them back."""
    d = 128
    h = np.array([[(-1) ** bin(i & j).count("1") for j in range(d)] for i in range(d)])
    integers = np.random.default_rng(1).integers(-60, 61, (50, d)).astype(np.float64) / 4
    x = ((integers @ h) / np.sqrt(d)).astype(np.float32)
    turned = (x.astype(np.float64) @ h) / np.sqrt(d)
    below, expected, above = (
        reference(turned * (1 + e), 32, E2M1[:8], 6.0, 6 * 2.0**-126) for e in (-1e-5, 0, 1e-5)
    )
    boundary = ~np.isclose(below, above, rtol=1e-4)  # float32 sums land a bit beside exact ties
    out = np.array(rounding.fp4_round(ops, ops.array(x)))
    np.testing.assert_allclose(out[~boundary], expected[~boundary], rtol=1e-6)
    assert boundary.mean() < 0.2


def test_tables() -> None:
    """Spot values by the formats' definitions, and MLX's own E4M3 decoder for all bytes."""
    assert E4M3[[0x08, 0x7E, 0x01, 0x81]].tolist() == [2.0**-6, 448.0, 2.0**-9, -(2.0**-9)]
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all()
    theirs = np.array(mx.from_fp8(mx.arange(256).astype(mx.uint8), mx.float32))
    finite = ~np.isnan(E4M3)
    np.testing.assert_array_equal(theirs[finite], E4M3[finite])
    assert E8M0[127] == 1 and E8M0[0] == 2.0**-127 and np.isnan(E8M0[255])
    assert E8M0.view(np.uint32)[0] == 0x00400000
