"""The reader equals the safetensors package on good files and names the fault of bad ones."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from ds4py.errors import WeightsError
from ds4py.formats.safetensors import read_directory, read_header


def write(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    n = len(header) if length is None else length
    path.write_bytes(n.to_bytes(8, "little") + header + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def test_equals_the_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.integers(0, 9, (4,)),
        "c": rng.integers(-9, 9, (2, 2, 2)).astype(np.int8),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, np.float32),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "m.safetensors")
    assert set(entries) == set(tensors)
    for name, expected in tensors.items():
        found = entries[name].read()
        if expected.dtype == np.int8:  # packed FP4 travels as I8: read as raw bytes
            found = found.view(np.int8)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("header", "data", "named"),
    [
        (b"not json", b"", "not JSON"),
        (b"[]", b"", "not an object"),
        (entry(), b"1234567", "incomplete"),
        (entry(offsets=(0, 4)), b"12345678", "spans 4 bytes"),
        (entry(offsets=(8, 0)), b"12345678", "spans"),
        (entry(shape=(-2, -1)), b"12345678", r"F32\[-2, -1\]"),
        (entry(dtype="F8_E5M2"), b"12345678", "F8_E5M2"),
        (entry(shape="ab"), b"12345678", "malformed"),
        (b'{"x": 3}', b"", "malformed"),
        (entry(shape=(2.0,)), b"12345678", "malformed"),
        (entry(shape=(1 << 62, 4), offsets=(0, 1 << 66)), b"12345678", "incomplete"),
        (entry(dtype=["F32"]), b"12345678", "dtype"),
        (
            entry()[:-1] + b"," + entry(offsets=(4, 12))[1:].replace(b"x", b"y"),
            b"123456789012",
            r"x \(8 bytes from byte \d+\) overlaps y",
        ),
        (
            entry()[:-1] + b"," + entry(offsets=(8, 16))[1:],
            b"1234567812345678",
            "names x twice in its header",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, header: bytes, data: bytes, named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        read_header(write(tmp_path / "m.safetensors", header, data))


@pytest.mark.parametrize("length", [2**63, 1000])
def test_header_length_is_checked_before_it_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(WeightsError, match=f"claims {length} bytes"):
        read_header(write(tmp_path / "m.safetensors", b"{}", length=length))


def test_file_that_shrinks_after_the_header_was_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", entry(), b"12345678")
    found = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="incomplete"):
        found.read()


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_empty(
    tmp_path_factory: pytest.TempPathFactory, b: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m.safetensors"
    path.write_bytes(b)
    try:
        assert read_header(path) == {}
    except WeightsError as error:
        assert "m.safetensors" in str(error)


def test_directory_faults(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no \*\.safetensors"):
        read_directory(tmp_path)
    one = {"x": np.zeros(2, np.float32)}
    save_file(one, tmp_path / "a.safetensors")
    save_file(one, tmp_path / "b.safetensors")
    with pytest.raises(WeightsError, match="stands in both"):
        read_directory(tmp_path)
    save_file(one, tmp_path / "model.safetensors")  # the name of a whole model: others are not it
    assert read_directory(tmp_path)["x"].file.name == "model.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "c.safetensors"}}))
    with pytest.raises(WeightsError, match=r"lacks 1 of 1 shards \(c\.safetensors"):
        read_directory(tmp_path)
    index.write_text(json.dumps({"weight_map": {"y": "a.safetensors"}}))
    with pytest.raises(WeightsError, match=r"places y in a\.safetensors"):
        read_directory(tmp_path)
    index.write_text("{")
    with pytest.raises(WeightsError, match="weight_map"):
        read_directory(tmp_path)
