"""A record is read as it was written, or not at all."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds4py.cache import record
from ds4py.cache.record import RecordError

HEADER = {"identity": "m", "n": 3}
ARRAYS = {
    "a": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "none": np.zeros((2, 0, 5), np.float32),
    "b": np.array([1.5, -0.0, np.inf], np.float32),
    "ids": np.array([1, -2], np.int32),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    record.write(tmp_path / "r", HEADER, ARRAYS)
    return tmp_path / "r"


def test_reads_back_what_was_written(path: Path) -> None:
    header, arrays = record.read(path)
    assert header["identity"] == "m" and header["n"] == 3
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()
    assert record.read_header(path) == header
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["r"]


def test_the_layout_is_the_documented_one(path: Path) -> None:
    data = path.read_bytes()
    magic, version, n_header, n_payload, crc = struct.unpack_from("<8sIIQI", data)
    assert (magic, version, n_payload) == (b"ds4-kv\r\n", 1, 6 + 12 + 8)
    payload = data[32 + n_header :]
    assert zlib.crc32(payload) == crc and len(payload) == n_payload
    assert payload[-8:] == struct.pack("<ii", 1, -2)
    listed = json.loads(data[32 : 32 + n_header])["arrays"]
    assert listed[0] == ["a", "u1", [2, 3]]


def test_every_flipped_bit_is_seen(path: Path) -> None:
    data = path.read_bytes()
    with open(path, "r+b", buffering=0) as file:
        for bit in range(8 * len(data)):
            byte = data[bit // 8]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
            with pytest.raises(RecordError):
                record.read(path)
            os.pwrite(file.fileno(), bytes([byte]), bit // 8)
    record.read(path)


def test_every_cut_and_every_addition_is_seen(path: Path) -> None:
    data = path.read_bytes()
    for content in [data[:n] for n in range(len(data))] + [data + b"x", data * 2]:
        path.write_bytes(content)
        with pytest.raises(RecordError):
            record.read(path)


def test_another_version_says_so(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8] += 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match="of version 2; this program reads version 1"):
        record.read(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(max_size=3),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["arrays", "x"]), inner)
            ),
            max_leaves=12,
        ),
        st.fixed_dictionaries(
            {
                "arrays": st.lists(
                    st.tuples(
                        st.text(max_size=2),
                        st.sampled_from(["u1", "f4", "O8", "zz"]),
                        st.lists(st.integers(-2, 2**70), max_size=3),
                    ),
                    max_size=3,
                )
            }
        ),
    )
)
def test_no_length_of_a_malicious_header_is_believed(path: Path, header: object) -> None:
    """The checksums are right, the header is not: nothing is allocated from it."""
    text = json.dumps(header).encode()
    prefix = struct.pack("<8sIIQI", record.MAGIC, 1, len(text), 4, zlib.crc32(b"1234"))
    path.write_bytes(prefix + struct.pack("<I", zlib.crc32(prefix + text)) + text + b"1234")
    try:
        _, arrays = record.read(path)
    except RecordError:
        return
    assert sum(array.nbytes for array in arrays.values()) == 4


def test_a_failed_write_leaves_what_was_there(path: Path) -> None:
    before = path.read_bytes()
    (path.parent / "folder").mkdir()
    with pytest.raises(OSError):
        record.write(path.parent / "folder", HEADER, ARRAYS)
    with pytest.raises(OSError):
        record.write(path.parent / "absent" / "r", HEADER, ARRAYS)
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["folder", "r"]
