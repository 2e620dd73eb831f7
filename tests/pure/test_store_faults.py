"""What befalls stores, more than a hundred times each: kill -9, a second writer, flipped bits, cut
files, a full disk, folders that cannot be written, a clock that goes back (in every killed child).

Never a wrong image, never an exception, and nothing that was committed before is lost.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Below a place that everybody may enter: one of the tests gives up being root."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


def hurt(what: str, folder: Path, trials: int, before: tuple[str, ...] = ()) -> dict[str, int]:
    """The runner's counts. before: a command in front of the runner's."""
    command = [sys.executable, "-m", "tests.pure.store_runner", what, str(folder / "kv")]
    done = subprocess.run(
        [*before, *command, str(trials)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    assert counts["trials"] >= trials and counts["hits"] >= trials, counts
    assert (counts["wrong"], counts["lost"], counts["crashes"]) == (0, 0, 0), done.stderr
    return counts


@pytest.mark.parametrize("what", ["killed", "flipped", "cut"])
def test_a_store_survives(what: str, folder: Path) -> None:
    counts = hurt(what, folder, 105)
    assert counts["misses"] > 0 or what == "killed"


def test_two_writers_killed(folder: Path) -> None:
    hurt("two", folder, 52)


def test_folders_that_cannot_be_written(folder: Path) -> None:
    hurt("denied", folder, 110)


def test_a_full_disk(folder: Path) -> None:
    mount = f'mount -t tmpfs -o size=400k tmpfs {folder} && exec "$@"'
    inside = ("unshare", "-rm", "sh", "-c", mount, "sh")
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    counts = hurt("full", folder, 120, inside)
    assert counts["misses"] > 10
