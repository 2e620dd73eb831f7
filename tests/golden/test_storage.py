"""The storage formats of DeepSeek's checkpoints: single tensors, then whole models.

A model stored in FP8, FP4 and BF16 must give the logits of the float32 values those bytes stand
for; the bytes and the values come from tools/golden/storage.py, which shares nothing with the
package's decoder.
"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ds4py import Engine, EngineOptions, assets
from ds4py.errors import WeightsError
from ds4py.formats import fp_blocks
from ds4py.formats.safetensors import read_directory
from tests.golden import sets
from tools.golden import files, storage

EXACT = EngineOptions(dtype="float32", trained_rounding=False)
PREFIX = r"(layers\.\d+|mtp\.0)\."
# What the released checkpoints store how; every other tensor stays as it is (F32, I64).
RELEASED = (
    (PREFIX + r"ffn\.experts\.\d+\.w[123]\.weight", "fp4"),
    (PREFIX + r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight", "fp8"),
    (PREFIX + r"(ffn\.shared_experts\.w[123]|[eh]_proj)\.weight", "fp8"),
    (r".*\.weight", "bf16"),
)
# The Base checkpoints keep the experts in FP8, their scales in F32.
BASE = ((PREFIX + r"ffn\.experts\.\d+\.w[123]\.weight", "fp8-f32-scale"), *RELEASED[1:])


@pytest.mark.parametrize("name", ["fp8_every_code", "fp8_tall", "fp8_wide", "fp4"])
def test_a_tensor_reads_as_the_values_it_stands_for(name: str) -> None:
    folder = sets.DATA / "storage"
    with np.load(folder / "expected.npz") as arrays:
        expected = arrays[name]
    entries = files_of(folder / "storage.safetensors", folder)
    scale = fp_blocks.decode_scale(entries[f"{name}.scale"])
    decode = fp_blocks.decode_fp4 if name == "fp4" else fp_blocks.decode_fp8
    values = decode(entries[f"{name}.weight"].view(np.uint8), scale)
    np.testing.assert_array_equal(values, expected)


def files_of(path: Path, folder: Path) -> dict[str, np.ndarray]:
    assert path.is_file()
    return {name: entry.read() for name, entry in read_directory(folder).items()}


@pytest.mark.parametrize("layout", [RELEASED, BASE], ids=["released", "base"])
def test_a_stored_model_gives_the_logits_of_its_values(
    tmp_path: Path, layout: tuple[tuple[str, str], ...]
) -> None:
    c, tensors = sets.checkpoint("fast")
    stored: dict[str, files.Stored] = {}
    meant: dict[str, files.Stored] = {}
    for name, values in tensors.items():
        kind = next((k for pattern, k in layout if re.fullmatch(pattern, name)), None)
        if kind is None:
            stored[name] = meant[name] = sets.plain(values)
            continue
        parts, read_back = storage.encode(values, kind)
        stem = name.removesuffix("weight")
        stored |= {stem + suffix: tensor for suffix, tensor in parts.items()}
        meant[name] = files.float32(read_back)
    ids = sets.load("fast")["input_ids"].tolist()
    small = Engine.open(sets.write(tmp_path / "stored", c, stored), EXACT)
    wide = Engine.open(sets.write(tmp_path / "meant", c, meant), EXACT)
    np.testing.assert_array_equal(small.score(ids), wide.score(ids))
    np.testing.assert_array_equal(small.score_mtp(ids), wide.score_mtp(ids))


def test_a_sharded_model_is_the_same_model(tmp_path: Path) -> None:
    c, tensors = sets.checkpoint("prolike")
    stored = {name: sets.plain(values) for name, values in tensors.items()}
    ids = sets.load("prolike")["input_ids"].tolist()
    whole = Engine.open(sets.write(tmp_path / "whole", c, stored), EXACT)
    parts = Engine.open(sets.write_sharded(tmp_path / "parts", c, stored, shards=3), EXACT)
    np.testing.assert_array_equal(parts.score(ids), whole.score(ids))


def test_the_draft_layer_may_be_missing(tmp_path: Path) -> None:
    c, tensors = sets.checkpoint("prolike")
    kept = {n: sets.plain(t) for n, t in tensors.items() if not n.startswith("mtp.")}
    expected = sets.load("prolike")
    options = EngineOptions(dtype="float32", trained_rounding=False)
    logits = Engine.open(sets.write(tmp_path, c, kept), options).score(
        expected["input_ids"].tolist()
    )
    assert np.abs(logits - expected["logits_prefill"]).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("layers.1.ffn.experts.3.w2.scale", b"\xff"),
        ("layers.0.attn.wq_a.scale", b"\xff"),
        ("layers.0.attn.wq_a.weight", b"\xff"),
        ("embed.weight", b"\xc0\x7f"),
        ("layers.2.attn.attn_sink", b"\x00\x00\x80\xff"),
    ],
)
def test_numbers_that_are_none_are_told_by_name(tmp_path: Path, name: str, bits: bytes) -> None:
    """NaN as a scale of FP4 and FP8, as an FP8 code and a BF16 value; minus infinity as F32."""
    folder = shutil.copytree(assets.path("models", "tiny-parent"), tmp_path / "m")
    entry = read_directory(folder)[name]
    with open(entry.file, "r+b") as stream:
        stream.seek(entry.offset + entry.n_bytes // 2)
        stream.write(bits)
    with pytest.raises(WeightsError, match=rf"{name} has values that are NaN or infinite"):
        Engine.open(folder)
