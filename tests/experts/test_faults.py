"""A fault is an error that says where, or a wait; never a wrong token, and never one that stays."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from ds4py import Engine
from ds4py.errors import InputError, WeightsError
from tests.experts import models
from tests.experts.models import LEAST, prompt, resident, streamed

IDS = prompt(14)
CHUNKS = [9, 1, 1, 1, 2]


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Any:
    return resident(bundle).score(IDS, CHUNKS)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def fails(engine: Engine, named: str) -> None:
    with pytest.raises(WeightsError, match=named) as caught:
        engine.score(IDS, CHUNKS)
    assert "\n" not in str(caught.value)


def records_of(path: Path) -> Path:
    return path / "experts-02.safetensors"


def test_a_flipped_bit(copy: Path) -> None:
    """Found at the first load of the record, and named with layer, expert, file and offset."""
    data = bytearray(records_of(copy).read_bytes())
    size = models.EXPERTS * 16384 * 2
    for expert in range(models.EXPERTS):
        data[len(data) - size + expert * 32768 + 1000] ^= 1
    records_of(copy).write_bytes(data)
    where = r"layer 2, expert \d+: .*experts-02\.safetensors at offset \d+ does not match"
    fails(streamed(copy), where)
    fails(streamed(copy, verify="always"), where)
    streamed(copy, verify="never").score(IDS, CHUNKS)


def test_truncated_while_running(copy: Path, expected: Any) -> None:
    engine = streamed(copy)
    np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)
    os.truncate(records_of(copy), 20000)
    fails(engine, r"layer 2, expert \d+: .*at offset \d+ (ends after|was changed)")
    fails(engine, r"layer 2, expert \d+")


def test_written_to_while_running(copy: Path) -> None:
    engine = streamed(copy)
    engine.score(IDS, CHUNKS)
    data = records_of(copy).read_bytes()
    with open(records_of(copy), "r+b") as file:
        file.write(data)
    os.utime(records_of(copy), ns=(1, 1))
    fails(engine, "was changed while it was in use")


def test_replaced_while_running(copy: Path, expected: Any) -> None:
    """A new file of the same name is not the one that was opened: the old one is read on."""
    engine = streamed(copy)
    other = copy / "new"
    other.write_bytes(b"something else")
    os.replace(other, records_of(copy))
    np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)
    with pytest.raises(WeightsError, match="experts-02"):
        streamed(copy)


def test_a_bad_sector(bundle: Path, expected: Any) -> None:
    """EIO from the nth read on, in threads of their own; when the disk works again, so do we."""
    for n in (0, 5, 17, 40):
        engine = streamed(bundle)
        reads = Failing(n, OSError(errno.EIO, os.strerror(errno.EIO)))
        engine.experts.reader.read_into = reads  # type: ignore[attr-defined]
        fails(engine, r"layer \d+, expert \d+: .*safetensors at offset \d+ cannot be read \(Input")
        reads.error = None
        np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)


class Failing:
    """`os.preadv` that fails from one call on."""

    def __init__(self, after: int, error: BaseException | None):
        self.left, self.error = after, error

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self.left -= 1
        if self.left < 0 and self.error is not None:
            raise self.error
        return os.preadv(descriptor, buffers, offset)


def test_short_reads_go_on(bundle: Path, expected: Any) -> None:
    engine = streamed(bundle)

    def half(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        some = max(4096, len(buffers[0]) // 2 // 4096 * 4096)
        return os.preadv(descriptor, [buffers[0][:some]], offset)

    engine.experts.reader.read_into = half  # type: ignore[attr-defined]
    np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)


def test_a_file_that_ends_early(bundle: Path) -> None:
    engine = streamed(bundle)
    engine.experts.reader.read_into = lambda *_: 0  # type: ignore[attr-defined]
    fails(engine, r"ends after 0 of 32768 bytes")


def test_a_slow_disk_is_waited_for(bundle: Path, expected: Any) -> None:
    """Every reader hangs until the disk comes back."""
    engine, back, asked = streamed(bundle), threading.Event(), threading.Event()

    def slow(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        asked.set()
        back.wait()
        return os.preadv(descriptor, buffers, offset)

    def come_back() -> None:
        asked.wait()
        back.set()

    engine.experts.reader.read_into = slow  # type: ignore[attr-defined]
    thread = threading.Thread(target=come_back)
    thread.start()
    np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)
    thread.join()


@pytest.mark.long
@pytest.mark.parametrize("readers", [1, 4])
def test_a_disk_that_stands_still_for_two_seconds(
    bundle: Path, expected: Any, readers: int
) -> None:
    """Whatever is read meanwhile takes until it goes on. The layer waits, the wait is counted, and
    nothing else changes."""
    for after in (0, 75):  # in the prefill and in decoding
        engine = streamed(bundle, readers=readers)
        engine.experts.reader.read_into = disk = Standstill(after)  # type: ignore[attr-defined]
        np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)
        assert disk.held > 0
        assert engine.experts.sections[0].stall_s >= 1.5  # type: ignore[attr-defined]
        np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)
    longest = max(engine.experts.stalls)  # type: ignore[attr-defined]
    assert longest >= 1.5 and engine.stats()["experts"]["stall_ms_p50"] < 1500


class Standstill:
    """`os.preadv` on a disk that does nothing for two seconds, once it was read from often enough:
    the time passes in the threads that read."""

    def __init__(self, after: int):
        self.left, self.held, self._end = after, 0, 0.0

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self.left -= 1
        if self.left == -1:
            self._end = monotonic() + 2.0
        if (rest := self._end - monotonic()) > 0:
            self.held += 1
            sleep(rest)
        return os.preadv(descriptor, buffers, offset)


def test_interrupts(bundle: Path, expected: Any) -> None:
    """Ctrl-C while records are on their way: what the slots hold afterwards is known."""
    engine = streamed(bundle, LEAST + 4, prefetch="router")
    for n in range(0, 60, 7):
        reads = Interrupting(n)
        engine.experts.reader.read_into = reads  # type: ignore[attr-defined]
        try:
            engine.score(IDS, CHUNKS)
        except KeyboardInterrupt:
            reads.left = 1 << 30
        np.testing.assert_array_equal(engine.score(IDS, CHUNKS), expected)


class Interrupting:
    def __init__(self, after: int):
        self.left = after

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self.left -= 1
        if self.left == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return os.preadv(descriptor, buffers, offset)


KILLED = """
import os, signal, sys
from tests.experts.models import prompt, streamed
engine, left = streamed(__import__("pathlib").Path(sys.argv[1])), int(sys.argv[2])
def kill(*call):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.preadv(*call)
engine.experts.reader.read_into = kill
engine.score(prompt(14), [9, 1, 1, 1, 2])
"""


def test_killed_while_loading(copy: Path, expected: Any) -> None:
    """Streaming writes nothing, so the next start finds everything as it was."""
    before = {p: p.read_bytes() for p in copy.iterdir()}
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(copy), "20"],
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    assert {p: p.read_bytes() for p in copy.iterdir()} == before
    np.testing.assert_array_equal(streamed(copy).score(IDS, CHUNKS), expected)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system without direct reads")
def test_file_systems_without_direct_reads(bundle: Path, expected: Any) -> None:
    target = Path(f"/dev/shm/ds4-test-{os.getpid()}")
    try:
        shutil.copytree(bundle, target)
        np.testing.assert_array_equal(streamed(target).score(IDS, CHUNKS), expected)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def test_a_missing_checksum_is_told_at_once(copy: Path) -> None:
    recipe = models.recipe_of(copy)
    del recipe["files"]["experts-01.safetensors"]["crc32"]
    (copy / "recipe.json").write_text(__import__("json").dumps(recipe))
    with pytest.raises(WeightsError, match=r"no checksums of experts-01"):
        streamed(copy)


def test_tainted_snapshots_stay_with_their_mode(bundle: Path, tmp_path: Path) -> None:
    """Swaps change what is computed: no exact session takes such a snapshot over, nor the other
    way round. One that swaps nothing computes the same."""
    swapping, exact = streamed(bundle, swap=1.0), streamed(bundle)
    session = swapping.session()
    session.sync(IDS)
    session.save(tmp_path / "tainted")
    assert swapping.restore(tmp_path / "tainted").tokens == IDS
    with pytest.raises(InputError, match="another model or with other numerics"):
        exact.restore(tmp_path / "tainted")
    assert swapping.routing == "swap 1.0" and exact.routing == "exact"
    chunks = [6, *[1] * 8]
    changed = swapping.score(IDS, chunks)
    assert swapping.stats()["experts"]["swapped"] > 0
    assert not np.array_equal(changed, exact.score(IDS, chunks))
    np.testing.assert_array_equal(changed[:6], exact.score(IDS, chunks)[:6])  # prefill is exact
    hardly = streamed(bundle, swap=1e-9)
    np.testing.assert_array_equal(hardly.score(IDS, chunks), exact.score(IDS, chunks))


def test_a_restored_session_finds_its_experts(bundle: Path, tmp_path: Path) -> None:
    """The hot set travels with the snapshot and is read into free slots in the background."""
    first = streamed(bundle, 60)
    session = first.session()
    session.sync(IDS)
    session.save(tmp_path / "s")
    second = streamed(bundle, 60)
    restored = second.restore(tmp_path / "s")
    assert set(second.experts.hot_set()) == set(first.experts.hot_set())
    a, b = (next(s.generate()) for s in (session, restored))
    assert session.logits() == restored.logits() or a.id != b.id
    assert second.stats()["experts"]["hit_rate"] > 0.3
