"""A matrix in its own bytes says the same as the decoded one, whatever file it comes from."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.config import ModelConfig
from ds4py.formats import fp_blocks
from ds4py.formats.gguf_blocks import FORMATS, decode
from ds4py.kernels import build
from ds4py.quant.convert import Converter
from ds4py.quant.recipe import Recipe
from ds4py.weights.bundle import Bundle
from ds4py.weights.checkpoint import Checkpoint
from ds4py.weights.files import ModelFiles
from ds4py.weights.maps import PackedMaps
from ds4py.weights.source import FP8, Source, StoredMatrix
from tests.golden import gguf_files, sets
from tests.golden.test_storage import BASE, RELEASED
from tools.golden import files, storage


def values(stored: StoredMatrix, n_columns: int) -> np.ndarray:
    """Decoded row by row."""
    rows = np.ascontiguousarray(stored.rows)
    assert rows.dtype == np.uint8 and rows.ndim == 2
    match stored.format:
        case "F32" | "F16":
            return rows.view({"F32": np.float32, "F16": np.float16}[stored.format])
        case "BF16":
            return fp_blocks.decode_bf16(rows.view(np.uint16))
        case name if name in FORMATS:
            return decode(name, rows)
        case _:
            assert stored.format == FP8
            block = np.arange(n_columns) // fp_blocks.FP8_BLOCK
            codes = rows[:, np.arange(n_columns) + block + 1]
            scales = rows[:, block * (fp_blocks.FP8_BLOCK + 1)]
            return fp_blocks.E4M3[codes] * fp_blocks.E8M0[scales]


def checkpoint(folder: Path, layout: tuple[tuple[str, str], ...]) -> Source:
    c, tensors = sets.checkpoint("fast")
    stored: dict[str, files.Stored] = {}
    for name, weights in tensors.items():
        kind = next((k for pattern, k in layout if re.fullmatch(pattern, name)), None)
        if kind is None:
            stored[name] = sets.plain(weights)
            continue
        stem = name.removesuffix("weight")
        for suffix, tensor in storage.encode(weights, kind)[0].items():
            stored[stem + suffix] = tensor
    sets.write(folder, c, stored)
    return ModelFiles.at(folder).source(None)


def bundle(folder: Path) -> Source:
    plain = gguf_files.build(folder, gguf_files.Q2).values
    parsed = ModelConfig.load(plain)
    plan = Recipe.from_dict({}, len(parsed.layers))
    Converter(Checkpoint(plain, parsed), folder / "bundle", plan).run()
    return Bundle(folder / "bundle", parsed)


def gguf(folder: Path) -> Source:
    return ModelFiles.at(gguf_files.build(folder, gguf_files.MIXED).path).source(None)


SOURCES: dict[str, Callable[[Path], Source]] = {
    "released": lambda folder: checkpoint(folder, RELEASED),
    "base": lambda folder: checkpoint(folder, BASE),
    "bundle": bundle,
    "gguf": gguf,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_stored_is_matrix(kind: str, tmp_path: Path) -> None:
    source, formats = SOURCES[kind](tmp_path), set()
    for name in source.entries:
        if name.endswith(".weight") and "norm" not in name:
            matrix = source.matrix(name.removesuffix(".weight"))
            stored = source.stored(name.removesuffix(".weight"))
            formats.add(stored.format)
            np.testing.assert_array_equal(values(stored, matrix.shape[1]), matrix, name)
    assert len(formats) > 1


def test_records_can_be_the_files_own_pages(tmp_path: Path) -> None:
    """Whole pages, so that a GPU can take them without a copy; elsewhere they are copied."""
    source = bundle(tmp_path)
    read, mapped = source.packed(1), source.packed(1, mapped=True)
    assert read is not None and mapped is not None and isinstance(mapped.records, np.memmap)
    np.testing.assert_array_equal(mapped.records, read.records)
    assert mapped.records.ctypes.data % 4096 == 0
    assert mapped.records.nbytes % build.PAGE_BYTES == 0
    for host in (mapped.records, read.records[:, 1:]):
        np.testing.assert_array_equal(np.array(build.adopt(host)), host)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1.5, -(2.0**-100)], mx.bfloat16),
        ([1 + 2.0**-10, 2.0**-24], mx.float16),
        ([1 + 2.0**-10, 2.0**-26], mx.float32),
        ([1 + 2.0**-10, 65536], mx.float32),
    ],
)
def test_kernels_read_fn_in_two_bytes_where_those_are_exact(
    values: list[float], dtype: mx.Dtype
) -> None:
    class Numbers:
        def floats(self, name: str) -> np.ndarray:
            return np.array([values], np.float32)

    (fn,) = PackedMaps(cast(Source, Numbers()), mx.float32, mx.array).mix("hc_head_fn").arrays
    assert fn.dtype == dtype
    np.testing.assert_array_equal(np.array(fn.astype(mx.float32)), [values])
