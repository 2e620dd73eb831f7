"""Fetch a model: choose its files, fetch and check them, and only then let it be a model.

The order on disk is that of `place`: notes first, then files, each moved to its place when its
hash was right, then the record of all of them, and last the rename. Killed anywhere, the next run
goes on where this one was, and until the record is written there is nothing that opens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ds4py.errors import PullError
from ds4py.hub import place
from ds4py.hub.fetch import Crew, Progress
from ds4py.hub.manifest import SUFFIXES, Manifest
from ds4py.hub.parts import PART_BYTES, PartialFile
from ds4py.hub.place import FileRecord, Record
from ds4py.hub.remote import Remote
from ds4py.sizes import format_size

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pull(
    manifest: Manifest,
    directory: Path,
    token: str | None = None,
    progress: Progress = lambda stage, done, total: None,
    part_bytes: int = PART_BYTES,
) -> Path:
    """Fetch a model into `directory`, or finish what was begun there; the directory.

    A model that is already there is not asked for again. Raises PullError.
    """
    try:
        if _is_there(manifest, directory, manifest.revision):
            return directory
        remote = Remote(manifest.repo, manifest.revision, token)
        if _is_there(manifest, directory, remote.revision):
            return directory
        files = choose_files(manifest, remote.files(), remote.revision)
        _fill(remote, files, directory, progress, part_bytes)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PullError(
                f"the disk of {directory} is full; make space and pull again, or choose another "
                "disk with --to: what has arrived is kept"
            ) from error
        where = error.filename or directory
        raise PullError(f"cannot write {where}: {error.strerror or error}") from error
    return directory


def choose_files(
    manifest: Manifest, listed: Sequence[FileRecord], revision: str
) -> list[FileRecord]:
    """The files of the commit that make the model, checked against what is known of it.

    Raises PullError.
    """
    chosen = [file for file in listed if manifest.wants(file.path)]
    weights = [file for file in chosen if file.path.endswith(SUFFIXES)]
    if not weights:
        single = [file for file in listed if file.path.endswith(".gguf")]
        if len(single) != 1:
            names = ", ".join(sorted(file.path for file in single)[:20])
            raise PullError(
                f"{manifest.name} names no weights in {manifest.repo} at {revision[:12]}; "
                + (f"give one of its files as {manifest.repo}/FILE: {names}" if names else "")
                + ("" if names else "it has no *.safetensors and no *.gguf")
            )
        chosen = weights = single
    n_bytes = sum(file.size for file in weights)
    if n_bytes < manifest.weight_bytes:
        raise PullError(
            f"{manifest.repo} at {revision[:12]} lists {n_bytes} bytes of weights where "
            f"{manifest.name} has {manifest.weight_bytes} at least; the repository is incomplete"
        )
    for file in chosen:
        if manifest.sha256.get(file.path, file.sha256) != file.sha256:
            raise PullError(
                f"{manifest.repo} lists {file.path} with sha256 {file.sha256}; "
                f"{manifest.name} is {manifest.sha256[file.path]}: it has been replaced"
            )
    return chosen


def _is_there(manifest: Manifest, directory: Path, revision: str | None) -> bool:
    """Whether the directory is this model, complete. Raises PullError when it is something else."""
    record = place.read_record(directory)
    if record is None:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise PullError(
                f"{directory} exists and was not made by `ds4 pull`; give another place with --to"
            )
        return False
    if record.repo != manifest.repo or not any(manifest.wants(f.path) for f in record.files):
        raise PullError(
            f"{directory} holds another model ({record.repo}); give another place with --to"
        )
    if revision is not None and revision != record.revision:
        if not _COMMIT.fullmatch(revision):
            return False  # a branch or a tag: the hub knows which commit that is now
        raise PullError(
            f"{directory} holds revision {record.revision[:12]}, not {revision[:12]}; remove it, "
            "or give another place with --to"
        )
    for file in record.files:
        path = directory / file.path
        if not path.is_file() or path.stat().st_size != file.size:
            raise PullError(f"{path} was changed or removed; remove {directory} and pull again")
    shutil.rmtree(directory / place.NOTES, ignore_errors=True)
    return True


def _fill(
    remote: Remote,
    files: Sequence[FileRecord],
    directory: Path,
    progress: Progress,
    part_bytes: int,
) -> None:
    partial = place.partial(directory)
    notes = partial / place.NOTES
    if partial.is_dir() and not notes.is_dir() and any(partial.iterdir()):
        raise PullError(f"{partial} exists and was not made by `ds4 pull`; rename or remove it")
    notes.mkdir(parents=True, exist_ok=True)
    with _alone(notes / "lock", partial):
        (partial / place.RECORD).unlink(missing_ok=True)
        unchecked = _recover(remote, files, partial, part_bytes)
        _check_space(directory, sum(file.file.size - file.n_bytes for file in unchecked))
        Crew(remote, unchecked).run(progress)
        _publish(partial, directory, Record(remote.repo, remote.revision, tuple(files)))


@contextlib.contextmanager
def _alone(lock: Path, partial: Path) -> Iterator[None]:
    """Keeps a second `ds4 pull` away from the directory. Death of any kind opens the lock."""
    with open(lock, "wb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PullError(f"another `ds4 pull` is filling {partial}; wait for it") from error
        yield


def _recover(
    remote: Remote, files: Sequence[FileRecord], partial: Path, part_bytes: int
) -> list[PartialFile]:
    """The files that are not yet in their places, with all bytes this machine has of them."""
    notes = partial / place.NOTES
    parts = [PartialFile(partial, notes, file, part_bytes) for file in files]
    kept = {path for file in parts for path in (file.final, file.data, file.table, file.done)}
    for path in [*partial.rglob("*")]:
        if path not in kept | {notes / "lock"} and not path.is_dir():
            path.unlink()  # of another commit, or of other parts
    unchecked = [file for file in parts if not file.recover()]
    for file in unchecked:
        cached = None if file.n_bytes else remote.cached(file.file.path)
        if cached is not None and cached.stat().st_size == file.file.size:
            file.adopt(cached)
    return unchecked


def _check_space(directory: Path, missing: int) -> None:
    free = shutil.disk_usage(place.partial(directory)).free
    if missing > free:
        raise PullError(
            f"{format_size(missing)} are still to come and {format_size(free)} are free at "
            f"{directory.parent}: {format_size(missing - free)} too little; make space, or choose "
            "another disk with --to"
        )


def _publish(partial: Path, directory: Path, record: Record) -> None:
    """All files are checked: make them a model."""
    draft = partial / place.NOTES / "record"
    with open(draft, "w", encoding="utf-8") as stream:
        stream.write(record.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(partial / place.RECORD)
    _sync(partial)
    partial.replace(directory)
    _sync(directory.parent)
    shutil.rmtree(directory / place.NOTES, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Make names last a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
