"""What a pull fetches, and what one file's parts on disk are worth after a kill."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ds4py.errors import PullError
from ds4py.hub import manifest
from ds4py.hub.fetch import TRIES, Crew, Hiccup
from ds4py.hub.manifest import Manifest
from ds4py.hub.parts import PartialFile
from ds4py.hub.place import FileRecord
from ds4py.hub.pull import choose_files


def test_manifests_name_what_they_know() -> None:
    assert {"flash", "flash-gguf", "pro"} <= set(manifest.names())
    for name in manifest.names():
        known = manifest.load(name)
        assert known is not None and known.repo.count("/") == 1 and known.files
        assert known.revision is None or len(known.revision) == 40
        assert known.weight_bytes > 0
    flash = manifest.choose("flash")
    assert flash.wants("model-00001-of-00046.safetensors") and flash.wants("config.json")
    assert not flash.wants("inference/config.json") and not flash.wants("README.md")
    assert flash.weight_bytes == 159_609_485_896


LISTED = [FileRecord("a.gguf", 5, "1" * 64), FileRecord("b.gguf", 7, "2" * 64)]


@pytest.mark.parametrize(
    ("known", "listed", "told"),
    [
        (Manifest("x/y", "x/y"), LISTED, "x/y/FILE: a.gguf, b.gguf"),
        (Manifest("x/y", "x/y"), [FileRecord("README.md", 5)], "no .*safetensors and no .*gguf"),
        (Manifest("m", "x/y", files=("a.gguf",), weight_bytes=6), LISTED, "is incomplete"),
        (Manifest("m", "x/y", files=("a.gguf",), sha256={"a.gguf": "2"}), LISTED, "been replaced"),
    ],
)
def test_files_that_do_not_make_the_model(
    known: Manifest, listed: list[FileRecord], told: str
) -> None:
    with pytest.raises(PullError, match=told):
        choose_files(known, listed, "c" * 40)


def test_the_files_that_do() -> None:
    assert choose_files(Manifest("x/y", "x/y"), LISTED[:1], "c" * 40) == LISTED[:1]
    one = Manifest("x/y/b.gguf", "x/y", files=("b.gguf",), sha256={"b.gguf": "2" * 64})
    assert choose_files(one, LISTED, "c" * 40) == LISTED[1:]


DATA = bytes(range(256)) * 10
FILE = FileRecord("deep/x.bin", len(DATA), hashlib.sha256(DATA).hexdigest())


def parts_of(folder: Path) -> PartialFile:
    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    return PartialFile(folder, notes, FILE, part_bytes=1000)


def fill(file: PartialFile, part: int, n_bytes: int) -> None:
    start = file.next_byte(part)
    assert file.write(part, DATA[start : start + n_bytes]) == n_bytes


def checked(file: PartialFile) -> bool:
    return file.check(lambda n: None)


def test_parts_are_taken_up_where_they_were(tmp_path: Path) -> None:
    file = parts_of(tmp_path)
    assert not file.recover() and file.pending() == [0, 1, 2]
    fill(file, 1, 1000)
    fill(file, 2, 7)
    file = parts_of(tmp_path)
    assert not file.recover() and file.pending() == [0, 2]
    assert (file.n_bytes, file.next_byte(2), file.missing(2)) == (1007, 2007, 553)
    fill(file, 0, 1000)
    assert not file.finish_part()
    fill(file, 2, 553)
    assert file.finish_part() and checked(file)
    assert (tmp_path / "deep" / "x.bin").read_bytes() == DATA
    assert parts_of(tmp_path).recover()


def test_a_part_takes_no_more_than_its_own(tmp_path: Path) -> None:
    file = parts_of(tmp_path)
    file.recover()
    assert file.write(2, DATA[2000:] + b"more") == 560
    assert file.missing(2) == 0 and file.data.stat().st_size == len(DATA)


def test_killed_between_the_hash_and_the_move(tmp_path: Path) -> None:
    file = parts_of(tmp_path)
    file.recover()
    for part in range(3):
        fill(file, part, file.length(part))
    file.table.rename(file.done)
    assert parts_of(tmp_path).recover() and file.final.read_bytes() == DATA


@pytest.mark.parametrize("damage", ["table", "count", "data", "final"])
def test_notes_that_cannot_be_right_are_not_believed(tmp_path: Path, damage: str) -> None:
    file = parts_of(tmp_path)
    file.recover()
    for part in range(3):
        fill(file, part, file.length(part))
    if damage == "table":
        file.table.write_bytes(file.table.read_bytes()[:-1])
    elif damage == "count":
        file.table.write_bytes(b"\xff" * 24)
    elif damage == "data":
        file.data.write_bytes(DATA[:-1])
    else:
        assert checked(file)
        file.final.write_bytes(DATA[:-1])
    file = parts_of(tmp_path)
    assert not file.recover() and file.n_bytes == 0
    assert not checked(file)


def test_an_empty_file(tmp_path: Path) -> None:
    empty = FileRecord("empty", 0, git_sha1="e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")
    file = PartialFile(tmp_path, tmp_path, empty)
    assert not file.recover() and file.pending() == [0] and file.missing(0) == 0
    assert file.finish_part() and checked(file) and file.final.read_bytes() == b""


def test_a_link_to_somebody_s_file_is_never_written(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_bytes(DATA[::-1])
    file = parts_of(tmp_path)
    file.recover()
    file.adopt(theirs)
    assert file.pending() == [0] and not checked(file)
    file.restart()
    assert theirs.read_bytes() == DATA[::-1] and file.n_bytes == 0


class Flaky:
    """Gives bytes of DATA in small pieces, breaks off `breaks` times, and spoils some."""

    def __init__(self, breaks: int, spoils: int = 0) -> None:
        self.breaks, self.spoils, self.calls = breaks, spoils, 0
        self._chance = random.Random(3)

    def read(self, file: FileRecord, start: int, stop: int) -> Iterator[bytes]:
        self.calls += 1
        while start < stop:
            if self.breaks and self._chance.random() < 0.2:
                self.breaks -= 1
                raise Hiccup("broke off")
            piece = bytearray(DATA[start : min(start + 100, stop)])
            if self.spoils:
                self.spoils -= 1
                piece[0] ^= 1
            yield bytes(piece)
            start += len(piece)


def run(file: PartialFile, source: Flaky) -> list[tuple[str, int, int]]:
    seen: list[tuple[str, int, int]] = []
    Crew(source, [file], first_wait_s=0.0).run(lambda *said: seen.append(said))
    return seen


@pytest.mark.parametrize(("breaks", "spoils"), [(0, 0), (9, 0), (0, 1), (5, 1)])
def test_many_threads_make_one_file(tmp_path: Path, breaks: int, spoils: int) -> None:
    file = parts_of(tmp_path)
    file.recover()
    seen = run(file, Flaky(breaks, spoils))
    assert file.final.read_bytes() == DATA
    assert seen[-1] == ("check", len(DATA), len(DATA))


def test_a_source_that_never_answers_is_given_up(tmp_path: Path) -> None:
    class Dead(Flaky):
        def read(self, file: FileRecord, start: int, stop: int) -> Iterator[bytes]:
            self.calls += 1
            raise Hiccup("nobody there")

    file, dead = parts_of(tmp_path), Dead(0)
    file.recover()
    fill(file, 0, 1000)
    fill(file, 1, 1000)
    with pytest.raises(PullError, match="nobody there; what has arrived is kept"):
        run(file, dead)
    assert dead.calls == TRIES
    file = parts_of(tmp_path)
    assert not file.recover() and file.n_bytes == 2000


def test_spoilt_twice_is_thrown_away(tmp_path: Path) -> None:
    file = parts_of(tmp_path)
    file.recover()
    with pytest.raises(PullError, match=r"deep/x\.bin arrived damaged twice"):
        run(file, Flaky(0, spoils=99))
    assert file.n_bytes == 0 and not file.final.exists()
