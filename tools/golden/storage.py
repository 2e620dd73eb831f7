"""Weights in the storage formats of DeepSeek's checkpoints, and the float32 values they stand for.

`encode` stores a float32 tensor as E4M3 with 128x128 scales or as packed E2M1 with 32-wide scales,
and says what reads back. `fixture` is a handful of odd shapes and every code, decoded by torch.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.golden.files import Stored, bfloat16, coded, float32, from_bfloat16, to_bfloat16
from tools.golden.reference64 import power_of_two_at_least, round_to_grid

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
E4M3 = np.concatenate(
    [np.arange(8) * 2.0**-9]
    + [(1 + np.arange(8) / 8) * 2.0 ** (exponent - 7) for exponent in range(1, 16)]
)[:-1]  # the last code is NaN

Parts = dict[str, Stored]
"""Name suffix (`weight`, `scale`) -> what is stored."""


def codes_of(values: NDArray[Any], table: NDArray[Any], sign: int) -> NDArray[np.uint8]:
    """Index into the table of magnitudes, with the sign bit where the value is negative."""
    codes = np.searchsorted(table, np.abs(values))
    assert np.array_equal(table[codes], np.abs(values)), "values must lie on the grid"
    return (codes + sign * np.signbit(values)).astype(np.uint8)


def e8m0(scale: NDArray[Any]) -> NDArray[np.uint8]:
    return (np.frexp(scale)[1] - 1 + 127).astype(np.uint8)


def scales_of(largest: NDArray[Any], top: float) -> NDArray[Any]:
    """The smallest powers of two that bring every block's largest magnitude within `top`."""
    return np.clip(power_of_two_at_least(np.maximum(largest, 1e-30) / top), 2.0**-127, 2.0**127)


def encode_fp8(w: NDArray[np.float32], float_scale: bool) -> tuple[Parts, NDArray[np.float32]]:
    """[rows, cols] -> E4M3 codes, one scale per 128x128 block (the last ones ragged)."""
    rows, cols = w.shape
    padded = np.zeros((-(-rows // 128) * 128, -(-cols // 128) * 128))
    padded[:rows, :cols] = w
    blocks = np.abs(padded).reshape(len(padded) // 128, 128, -1, 128)
    scale = scales_of(blocks.max(axis=(1, 3)), 448.0)
    spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:rows, :cols]
    values = round_to_grid(w / spread, 3, -6)
    stored = float32(scale) if float_scale else coded("F8_E8M0", e8m0(scale))
    parts = {"weight": coded("F8_E4M3", codes_of(values, E4M3, 128)), "scale": stored}
    return parts, (values * spread).astype(np.float32)


def encode_fp4(w: NDArray[np.float32]) -> tuple[Parts, NDArray[np.float32]]:
    """[rows, cols], cols a multiple of 32 -> two E2M1 codes to a byte, the even column low."""
    rows, cols = w.shape
    blocks = w.reshape(rows, -1, 32).astype(np.float64)
    scale = scales_of(np.abs(blocks).max(-1), 6.0)
    values = round_to_grid(blocks / scale[..., None], 1, 0)
    codes = codes_of(values.reshape(rows, cols), E2M1, 8)
    parts = {
        "weight": coded("I8", codes[:, 0::2] | codes[:, 1::2] << 4),
        "scale": coded("F8_E8M0", e8m0(scale)),
    }
    return parts, (values * scale[..., None]).reshape(rows, cols).astype(np.float32)


def encode(w: NDArray[np.float32], kind: str) -> tuple[Parts, NDArray[np.float32]]:
    """Stored parts and the float32 values they mean; kind is fp8, fp8-f32-scale, fp4 or bf16."""
    if kind == "fp4":
        return encode_fp4(w)
    if kind == "bf16":
        return {"weight": bfloat16(w)}, from_bfloat16(to_bfloat16(w))
    return encode_fp8(w, float_scale=kind == "fp8-f32-scale")


def fixture() -> tuple[dict[str, Stored], dict[str, NDArray[np.float32]]]:
    """Tensors of every format and the values torch (E4M3) or the table (E2M1) gives them."""
    import torch

    random = np.random.default_rng(0)
    stored: dict[str, Stored] = {}
    expected: dict[str, NDArray[np.float32]] = {}
    every = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])[None]  # all but the NaNs
    for name, codes in {
        "fp8_every_code": np.concatenate([every, every[:, ::-1]]),
        "fp8_tall": random.integers(0, 0x7F, (130, 5)).astype(np.uint8),
        "fp8_wide": random.integers(0x80, 0xFF, (3, 300)).astype(np.uint8),
    }.items():
        blocks = [-(-n // 128) for n in codes.shape]
        exponents = random.integers(110, 140, blocks).astype(np.uint8)
        exponents[0, 0] = 0  # 2 ** -127, which is subnormal in float32
        values = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
        scale = np.exp2(exponents - 127.0).repeat(128, 0).repeat(128, 1)
        stored[f"{name}.weight"] = coded("F8_E4M3", codes)
        stored[f"{name}.scale"] = coded("F8_E8M0", exponents)
        expected[name] = (values * scale[: len(codes), : codes.shape[1]]).astype(np.float32)
    codes = random.integers(0, 16, (5, 96))
    codes[0, :16] = np.arange(16)
    exponents = random.integers(110, 140, (5, 3)).astype(np.uint8)
    exponents[0] = 127, 0, 252
    table = np.concatenate([E2M1, -E2M1])
    stored["fp4.weight"] = coded("I8", codes[:, 0::2] | codes[:, 1::2] << 4)
    stored["fp4.scale"] = coded("F8_E8M0", exponents)
    expected["fp4"] = (table[codes] * np.exp2(exponents - 127.0).repeat(32, 1)).astype(np.float32)
    return stored, expected
