"""The GGUF reader and writer against the `gguf` package, and against damaged files."""

import struct
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import gguf as oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds4py.errors import WeightsError
from ds4py.formats import gguf
from ds4py.formats.gguf import Field
from ds4py.formats.gguf_write import NewTensor, write

Raw = np.ndarray[Any, Any]


def new(name: str, type_name: str, dims: tuple[int, ...], *parts: Raw) -> NewTensor:
    return NewTensor(name, type_name, dims, lambda: parts)


def integers(kind: str) -> st.SearchStrategy[int]:
    info = np.iinfo(gguf.STORAGE[kind])
    return st.integers(int(info.min), int(info.max))


WHOLE = [kind for kind in gguf.STORAGE if kind[0] in "ui"]
TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12)
SCALARS = st.one_of(
    [integers(kind).map(lambda v, k=kind: Field(k, v)) for kind in WHOLE]
    + [
        st.floats(width=32, allow_nan=False).map(lambda v: Field("f32", v)),
        st.floats(allow_nan=False).map(lambda v: Field("f64", v)),
        st.booleans().map(lambda v: Field("bool", v)),
        TEXT.map(lambda v: Field("string", v)),
    ]
)
ARRAYS = st.one_of(
    [
        st.lists(integers(kind), max_size=5).map(
            lambda v, k=kind: Field(f"{k}[]", np.array(v, gguf.STORAGE[k]))
        )
        for kind in WHOLE
    ]
    + [
        st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(
            lambda v: Field("f32[]", np.array(v, np.float32))
        ),
        st.lists(st.booleans(), max_size=5).map(lambda v: Field("bool[]", np.array(v, np.bool_))),
        st.lists(TEXT, max_size=5).map(lambda v: Field("string[]", v)),
    ]
)
METADATA = st.dictionaries(TEXT.map(lambda t: f"test.{t}"), SCALARS | ARRAYS, max_size=6)


def kind_of(field: Any) -> str:
    """Our name of what the package read."""
    names = {item: gguf.KINDS[item.value] for item in oracle.GGUFValueType}
    if field.types[0] != oracle.GGUFValueType.ARRAY:
        return names[field.types[0]]
    return names[field.types[1]] + "[]" if len(field.types) > 1 else "[]"


def equal(found: Any, expected: Any) -> bool:
    return bool(np.array_equal(np.asarray(found), np.asarray(expected)))


@given(metadata=METADATA)
def test_the_package_reads_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Field]
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    values = np.arange(12, dtype=np.float32)
    blocks = np.random.default_rng(0).integers(0, 256, 2 * 34, np.uint8)
    write(
        path,
        metadata,
        [
            new("a.weight", "F32", (4, 3), values[:5], values[5:]),
            new("b", "Q8_0", (32, 1, 2), blocks),
            new("c", "F16", (3,), np.ones(3, np.float16)),
        ],
    )
    package = oracle.GGUFReader(path)
    for key, (kind, value) in metadata.items():
        found = package.fields[key]
        if kind.endswith("[]") and len(value) == 0:
            assert kind_of(found) == "[]"
        else:
            assert kind_of(found) == kind
            assert equal(found.contents(), value)
    a, b, c = package.tensors
    assert (a.name, b.name, c.name) == ("a.weight", "b", "c")
    assert a.shape.tolist() == [4, 3] and b.shape.tolist() == [32, 1, 2]
    assert b.tensor_type.name == "Q8_0"
    np.testing.assert_array_equal(a.data, values.reshape(3, 4))
    np.testing.assert_array_equal(b.data.ravel(), blocks)
    np.testing.assert_array_equal(c.data, np.ones(3, np.float16))
    own = gguf.read(path)  # and so do we
    assert set(own.metadata) == set(metadata)
    for key, (kind, value) in metadata.items():
        assert own.metadata[key].kind == kind and equal(own.metadata[key].value, value)
    assert own.tensors["b"].read().tobytes() == blocks.tobytes()
    assert own.tensors["a.weight"].read(16, 8).view(np.float32).tolist() == [4, 5]


@pytest.mark.parametrize("version", [2, 3])
def test_reads_what_the_package_wrote(tmp_path: Path, version: int) -> None:
    path, rng = tmp_path / "m.gguf", np.random.default_rng(1)
    writer = oracle.GGUFWriter(path, "deepseek4")
    writer.add_custom_alignment(64)
    writer.add_uint32("u", 2**32 - 1)
    writer.add_int8("i", -3)
    writer.add_float32("f", 1e-6)
    writer.add_float64("d", 0.1)
    writer.add_uint64("q", 2**63)
    writer.add_bool("b", True)
    writer.add_array("strings", ["a", "", "日本"])
    writer.add_array("ints", [1, -2, 3])
    tensors = {
        "x": rng.standard_normal((3, 5)).astype(np.float32),
        "h": rng.standard_normal((2, 4, 8)).astype(np.float16),
        "t": rng.integers(0, 9, (4, 6)).astype(np.int32),
    }
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    blocks = rng.integers(0, 256, (3, 2 * 66), np.uint8)
    writer.add_tensor("q2", blocks, raw_dtype=oracle.GGMLQuantizationType.IQ2_XXS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    data[4] = version
    path.write_bytes(data)
    file = gguf.read(path)
    assert (file.version, file.alignment) == (version, 64)
    read_back = {key: tuple(item) for key, item in file.metadata.items()}
    ints = read_back.pop("ints")
    assert ints[0] == "i32[]" and ints[1].tolist() == [1, -2, 3]
    assert read_back == {
        "general.architecture": ("string", "deepseek4"),
        "general.alignment": ("u32", 64),
        "u": ("u32", 2**32 - 1),
        "i": ("i8", -3),
        "f": ("f32", float(np.float32(1e-6))),
        "d": ("f64", 0.1),
        "q": ("u64", 2**63),
        "b": ("bool", True),
        "strings": ("string[]", ["a", "", "日本"]),
    }
    assert [*file.tensors] == [*tensors, "q2"]
    for name, values in tensors.items():
        assert file.tensors[name].dims == values.shape[::-1]
        assert file.tensors[name].read().tobytes() == values.tobytes()
    assert (file.tensors["q2"].type, file.tensors["q2"].dims) == ("IQ2_XXS", (512, 3))
    assert file.tensors["q2"].read(132, 132).tobytes() == blocks[1].tobytes()


def test_tensor_types_have_the_sizes_of_the_package() -> None:
    for name, (code, values, n_bytes) in gguf.FORMATS.items():
        item = oracle.GGMLQuantizationType(code)
        assert (item.name, oracle.GGML_QUANT_SIZES[item]) == (name, (values, n_bytes))


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def header(
    *fields: bytes, tensors: Iterable[bytes] = (), counts: tuple[int, int] | None = None
) -> bytes:
    tensors = [*tensors]
    n_tensors, n_fields = counts or (len(tensors), len(fields))
    start = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_fields)
    data = start + b"".join(fields) + b"".join(tensors)
    return data + bytes(-len(data) % 32)


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(key: str, kind: int, count: int, values: bytes) -> bytes:
    return field(key, 9, struct.pack("<IQ", kind, count) + values)


def row(
    name: str | bytes = "x",
    dims: tuple[int, ...] = (8,),
    code: int = 0,
    offset: int = 0,
    n_dims: int | None = None,
) -> bytes:
    n = len(dims) if n_dims is None else n_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", n, *dims, code, offset)


HUGE = 2**63
ALIGNMENT = field("general.alignment", 4, struct.pack("<I", 48))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(counts=(0, HUGE)), "the metadata claims"),
        (header(counts=(HUGE, 0)), "the tensor table claims"),
        (header(struct.pack("<Q", HUGE) + bytes(8)), "metadata key 0 claims"),
        (header(struct.pack("<Q", 70000) + bytes(70000)), "need at most 65535"),
        (header(field("key", 8, struct.pack("<Q", HUGE))), "key claims"),
        (header(field("key", 13, b"1234")), "key has the unknown kind 13"),
        (header(array("key", 8, HUGE, b"")), "key claims"),
        (header(array("key", 8, 2, text("a") + struct.pack("<Q", HUGE))), r"key\[1\] claims"),
        (header(array("key", 5, HUGE, b"")), "key claims"),
        (header(array("key", 9, 1, bytes(12))), "key is an array of arrays"),
        (header(array("key", 99, 1, b"1")), "key has the unknown kind 99"),
        (header(field("key", 7, b"\2")), "key is 2; a bool"),
        (header(field("key", 8, text(b"\xff"))), "key is not UTF-8"),
        (header(array("key", 8, 2, text("a") + text(b"\xc3"))), r"key\[1\] is not UTF-8"),
        (header(field(b"\xff", 7, b"\1")), "metadata key 0 is not UTF-8"),
        (header(field("k\ney", 7, b"\2")), r"k\\ney is 2"),
        (header(field("key", 7, b"\1"), field("key", 7, b"\1")), "key key twice"),
        (header(ALIGNMENT), "general.alignment is u32 48"),
        (header(field("general.alignment", 10, struct.pack("<Q", 32))), "alignment is u64 32"),
        (header(field("general.alignment", 4, bytes(4))), "general.alignment is u32 0"),
        (header(tensors=[row(b"\xff\xfe")]), "name of tensor 0 is not UTF-8"),
        (header(tensors=[row(dims=(8,), n_dims=5)]), "x has 5 dims"),
        (header(tensors=[row(dims=(8,), n_dims=0)]), "x has 0 dims"),
        (header(tensors=[row(dims=(0,))]), r"x has dims \[0\]"),
        (header(tensors=[row(dims=(33, 2), code=8)]), r"x has dims \[33, 2\]; Q8_0 .* of 32"),
        (header(tensors=[row(code=4)]), "x has the unknown tensor type 4"),
        (header(tensors=[row(code=2**32 - 1)]), "x has the unknown tensor type"),
        (header(tensors=[row()]), r"x \(F32\[8\]\) ends at byte 96; .*incomplete"),
        (header(tensors=[row(dims=(HUGE, HUGE, HUGE, HUGE))]), "x .*ends at byte"),
        (header(tensors=[row(offset=HUGE)]), "x .*ends at byte"),
        (header(tensors=[row(offset=8)]) + bytes(64), "x lies at offset 8"),
        (header(tensors=[row(), row()]) + bytes(64), "the tensor x twice"),
        (
            header(tensors=[row(dims=(16,)), row("y", offset=32)]) + bytes(64),
            "x .* overlaps y, which begins at byte",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_faults_are_named(tmp_path: Path, data: bytes, named: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=named) as caught:
        gguf.read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def sample() -> bytes:
    """A small file with everything in it."""
    fields = [
        field("general.architecture", 8, text("deepseek4")),
        array("tokens", 8, 2, text("a") + text("bc")),
        array("ratios", 5, 3, struct.pack("<3i", 0, 4, 128)),
        field("flag", 7, b"\1"),
    ]
    return header(*fields, tensors=[row(), row("y", (32, 2), 8, 32)]) + bytes(32 + 96)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole, path = sample(), tmp_path / "m.gguf"
    path.write_bytes(whole)
    assert [*gguf.read(path).tensors] == ["x", "y"]
    for length in range(len(whole) - 96 + 68):  # the padding behind the last tensor may be missing
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            gguf.read(path)


@given(
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    tail=st.binary(max_size=40),
)
def test_damaged_files_are_refused_or_read_within_their_bounds(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int]], tail: bytes
) -> None:
    data = bytearray(sample()) + tail
    for position, value in edits:
        data[position % len(data)] = value
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    path.write_bytes(data)
    try:
        file = gguf.read(path)
    except WeightsError as error:
        assert "m.gguf" in str(error) and "\n" not in str(error)
    else:
        for tensor in file.tensors.values():
            assert len(tensor.read()) == tensor.n_bytes <= len(data)


@given(st.binary(max_size=300))
def test_random_bytes_after_the_counts(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 2) + data)
    with pytest.raises(WeightsError):
        gguf.read(path)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(sample())
    tensor = gguf.read(path).tensors["y"]
    path.write_bytes(sample()[:-60])
    with pytest.raises(WeightsError, match="ends inside y"):
        tensor.read()
    path.unlink()
    with pytest.raises(WeightsError, match="cannot be read"):
        tensor.read()
    with pytest.raises(WeightsError, match="cannot be read"):
        gguf.read(path)


def failing() -> Iterable[Raw]:
    yield np.zeros(4, np.float32)
    raise RuntimeError("no more")


@pytest.mark.parametrize(
    ("metadata", "tensors", "error", "says"),
    [
        ({"k": Field("u8", 256)}, [], WeightsError, "k cannot be written as u8"),
        ({"k": Field("u32", -1)}, [], WeightsError, "k cannot be written as u32"),
        ({"k": Field("i32[]", [1.5])}, [], WeightsError, "k cannot be written"),
        ({"k": Field("f32", "x")}, [], WeightsError, "k cannot be written as f32"),
        ({"k": Field("string", "\ud800")}, [], WeightsError, "k cannot be written as string"),
        ({"general.alignment": Field("u32", 3)}, [], WeightsError, "power of two"),
        ({}, [new("x" * 64, "F32", (1,))], WeightsError, "at most 63 bytes"),
        ({}, [new("x", "Q8_0", (31,))], WeightsError, "multiple of 32"),
        ({}, [new("x", "F32", ())], WeightsError, "needs 1 to 4"),
        ({}, [new("x", "F32", (2,), np.ones(1, np.float32))], WeightsError, "came as 4 bytes"),
        ({}, [NewTensor("x", "F32", (8,), failing)], RuntimeError, "no more"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(
    tmp_path: Path,
    metadata: dict[str, Field],
    tensors: list[NewTensor],
    error: type[Exception],
    says: str,
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error, match=says):
        write(path, metadata, tensors)
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


def test_names_are_written_once(tmp_path: Path) -> None:
    ones = np.ones(1, np.float32)
    twice = [new("x", "F32", (1,), ones), new("x", "F32", (1,), ones)]
    with pytest.raises(WeightsError, match="need a new name"):
        write(tmp_path / "m.gguf", {}, twice)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be written"):
        write(tmp_path / "none" / "m.gguf", {}, [])


def test_tensors_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def tensor(name: str) -> NewTensor:
        def parts() -> Iterable[Raw]:
            order.append(f"{name} begins")
            yield np.zeros(3, np.float32)
            order.append(f"{name} ends")

        return NewTensor(name, "F32", (3,), parts)

    write(tmp_path / "m.gguf", {}, [tensor("a"), tensor("b")])
    assert order == ["a begins", "a ends", "b begins", "b ends"]
    assert gguf.is_gguf(tmp_path / "m.gguf") and not gguf.is_gguf(tmp_path)
    assert all(t.offset % 32 == 0 for t in gguf.read(tmp_path / "m.gguf").tensors.values())


class Interrupted(Exception):
    pass


def counted(asked: list[str], stop_at: str = "") -> list[NewTensor]:
    """Three tensors that note when they are asked for."""

    def parts(name: str, values: Raw) -> Iterable[Raw]:
        asked.append(name)
        yield values[:3]
        if name == stop_at:
            raise Interrupted
        yield values[3:]

    return [
        NewTensor(n, "F32", (5,), partial(parts, n, np.arange(5, dtype=np.float32) + i))
        for i, n in enumerate("abc")
    ]


@pytest.mark.parametrize(
    ("between", "asked_again"),
    [
        (lambda folder: None, "bc"),
        (lambda folder: (folder / ".m.gguf.done").write_text("{"), "abc"),
        (lambda folder: (folder / ".m.gguf.done").unlink(), "abc"),
        (lambda folder: (folder / ".m.gguf.partial").write_bytes(b"GGUF"), "abc"),
        (lambda folder: write(folder / "m.gguf", {}, counted([])), "abc"),
    ],
    ids=["at once", "journal cut", "journal gone", "part gone", "another run"],
)
def test_an_interrupted_file_is_taken_up_again(
    tmp_path: Path, between: Callable[[Path], object], asked_again: str
) -> None:
    path, whole, metadata = tmp_path / "m.gguf", tmp_path / "w.gguf", {"k": Field("u8", 1)}
    write(whole, metadata, counted([]))
    with pytest.raises(Interrupted):
        write(path, metadata, counted([], stop_at="b"), identity="x")
    assert not path.exists()
    between(tmp_path)
    asked: list[str] = []
    write(path, metadata, counted(asked), identity="x")
    assert "".join(asked) == asked_again and path.read_bytes() == whole.read_bytes()
    assert {*tmp_path.iterdir()} == {path, whole}


def test_what_another_run_left_is_not_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for identity, metadata in (("y", {}), ("x", {"k": Field("u8", 1)})):
        with pytest.raises(Interrupted):
            write(path, {}, counted([], stop_at="c"), identity="x")
        asked: list[str] = []
        write(path, metadata, counted(asked), identity=identity)
        assert asked == ["a", "b", "c"]
