"""Snapshots on disk: a directory with a byte budget, shared by processes, outliving them all.

    segments/NAME.seg    the rows of 128 tokens; NAME is a hash chained over model and token ids
    snapshots/NAME.snap  a frontier, and the rows after the last whole segment
    index.sqlite         what there is; rebuilt from the files' headers when it is lost
    lock                 held while a process writes or removes

Files are immutable `record`s. Saving a sequence that grew by n tokens writes O(n) bytes: segments
are shared by every snapshot beyond them. A snapshot is found by its text (the bytes the token ids
spell, control tokens set apart) in O(length) and one look at the index; the ids are compared
afterwards, and where they differ the caller may take over the stored ones (`Found` tells them).
Whatever is wrong with a file, the disk or another process is a miss: nothing here raises but
`Store.open`, and `trouble` says what went wrong last. Private: it holds conversations.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ds4py.cache import record
from ds4py.cache.evict import Entry, Policy, Segment, history
from ds4py.cache.index import Found, Index, SegmentRow, digests
from ds4py.cache.record import RecordError
from ds4py.cache.snapshot import Image
from ds4py.errors import InputError

SEGMENT = 128
"""Tokens of a segment: a multiple of V4's ratios, and few enough that the rows after the last whole
one, which every snapshot holds itself, are little."""
LOCK_SECONDS = 5.0
"""How long to wait for another process before giving up on a write."""
_ID_BYTES = 4
_HEADER = 1024
"""Bytes allowed for what a file holds besides arrays."""
_TROUBLES = (OSError, sqlite3.Error, RecordError, KeyError, ValueError, TypeError)
_FOLDERS = {"segments": ".seg", "snapshots": ".snap"}


class Store:
    """An open store. Used by one thread; any number of processes may have one open."""

    def __init__(self, directory: Path, n_bytes: int, policy: Policy | None = None):
        """See `open`."""
        self.directory, self.n_bytes, self._policy = directory, n_bytes, policy
        self.trouble: str | None = None
        self._made = directory.exists()
        self._index = self._open_index() if self._made else Index(None)

    @classmethod
    def open(cls, directory: Path, n_bytes: int) -> Store:
        """The store in a directory, made by the first save. n_bytes: what its files may take.

        A directory that cannot be written is read. Raises InputError when it can be none.
        """
        found = next(path for path in (directory, *directory.parents) if path.exists())
        if not found.is_dir():
            raise InputError(
                f"{directory} cannot hold KV snapshots: {found} is a file; name another directory"
            )
        try:
            return cls(directory, n_bytes)
        except (OSError, sqlite3.Error) as exc:
            raise InputError(f"{directory} cannot be used for KV snapshots ({exc})") from exc

    def close(self) -> None:
        self._index.close()

    def prefixes(self, identity: str, text: bytes) -> list[Found]:
        """Snapshots of this model whose text begins `text`, longest first."""
        with self._misses("look-up"):
            self._look_again()
            return self._index.prefixes(identity, text)
        return []

    def ids(self, found: Found) -> list[int]:
        """The token ids of a snapshot; empty when they are not all there."""
        with self._misses("look-up"):
            data = self._index.ids(found)
            if hashlib.sha256(data).digest() == found.ids_hash:
                return np.frombuffer(data, "<i4").tolist()
        return []

    def load(self, found: Found, tokens: list[int]) -> Image | None:
        """The snapshot of these ids, its rows from 0 on; None when any of it is not as it was.

        What turns out damaged is removed, so that the next save writes it again.
        """
        ids = np.asarray(tokens, "<i4")
        if hashlib.sha256(ids.tobytes()).digest() != found.ids_hash:
            return None  # of the same text, but not the same ids
        chain = _chain(found.identity, ids)
        with self._misses("reading"):
            header, arrays = self._read("snapshots", found.name, found)
            parts = [self._read("segments", name, found)[1] for name in chain]
            own = {n[5:]: a for n, a in arrays.items() if n.startswith("rows.")}
            rows = {
                n: np.concatenate([*(part[f"rows.{n}"] for part in parts), a], axis=1)
                for n, a in own.items()
            }
            other = {"tail", *(f"rows.{n}" for n in own)}
            frontier = {n: a for n, a in arrays.items() if n not in other}
            return Image(ids, 0, rows, {}, frontier, header.get("seed"))
        return None

    def save(self, identity: str, image: Image, text: bytes) -> bool:
        """Write a snapshot of an image whose rows begin at 0 or at a whole stored segment.

        text: what its ids spell. Whether the snapshot is in the store now; it is not taken in when
        those that would have to go are worth more.
        """
        with self._misses("making"):
            self._make()
        with self._misses("saving"), self._locked():
            chain = _chain(identity, image.tokens)
            name = _name(identity, chain, image.tokens)
            if self._index.has("snapshots", name) and self._path("snapshots", name).exists():
                return True
            n_stored = self._stored(chain)
            if n_stored * SEGMENT < image.start:
                return False  # evicted meanwhile: the caller has the rows and may come again
            ids = image.tokens.astype("<i4").tobytes()
            self._index.use(self._ancestors(identity, text, ids), ids, hit=False)
            parent = next(iter(self._ancestors(identity, text, ids)), None)
            past = history(parent, self._index.now())
            if not self._make_room(identity, image, chain, n_stored, past):
                return False
            self._write(identity, image, text, chain, n_stored, past)
            return True
        return False

    def stored_tokens(self, identity: str, tokens: list[int]) -> int:
        """How many of the tokens, in whole segments, have their rows in the store."""
        with self._misses("look-up"):
            self._look_again()
            return self._stored(_chain(identity, np.asarray(tokens, "<i4"))) * SEGMENT
        return 0

    def use(self, identity: str, text: bytes, tokens: list[int]) -> None:
        """Note that a request with these tokens was served from here."""
        with self._misses("look-up"):
            ids = np.asarray(tokens, "<i4").tobytes()
            self._index.use(self._ancestors(identity, text, ids), ids, hit=True)

    def remove(self, names: list[str]) -> int:
        """Drop snapshots and the segments only they need; the bytes freed."""
        with self._misses("removing"), self._locked():
            forest, before = self._index.tree(), self._index.n_bytes()
            gone = [forest.entries[name] for name in names if name in forest.entries]
            freed = {s.name for entry in gone for s in forest.tree.remove(entry)}
            self._delete([*(entry.name for entry in gone), *forest.broken], freed | forest.loose)
            return before - self._index.n_bytes()
        return 0

    def verify(self) -> Iterator[tuple[Path, str]]:
        """Read every file; yield and remove those that are damaged, with the reason."""
        for folder in _FOLDERS:
            for path in sorted(Path(item.path) for item in _files(self.directory / folder)):
                try:
                    record.read(path)
                except (RecordError, OSError) as exc:
                    yield path, str(exc)
                    with contextlib.suppress(OSError):
                        path.unlink()
        with self._misses("checking"), self._locked():
            self._rebuild(self._index)

    def entries(self) -> list[Found]:
        """Every snapshot, the one used last first."""
        with self._misses("look-up"):
            return self._index.all()
        return []

    def stats(self) -> dict[str, int]:
        """Snapshots, segments, and the bytes they take and may take."""
        with self._misses("look-up"):
            return {
                "snapshots": len(self._index.names("snapshots")),
                "segments": len(self._index.names("segments")),
                "bytes": self._index.n_bytes(),
                "budget": self.n_bytes,
            }
        return {"snapshots": 0, "segments": 0, "bytes": 0, "budget": self.n_bytes}

    def _write(
        self,
        identity: str,
        image: Image,
        text: bytes,
        chain: list[str],
        n_stored: int,
        past: tuple[int, int],
    ) -> None:
        """The files, segments first, then the snapshot, then the index. All or nothing."""
        rows: list[SegmentRow] = []
        name = _name(identity, chain, image.tokens)
        snapshot = self._path("snapshots", name)
        try:
            for n in range(n_stored, len(chain)):
                parent = chain[n - 1] if n else None
                rows.append(self._write_segment(identity, image, n, chain[n], parent))
            if rows:
                record.flush_directory(self.directory / "segments")
            header = {
                "identity": identity,
                "name": name,
                "parent": chain[-1] if chain else None,
                "tokens": image.position,
                "ids_hash": hashlib.sha256(image.tokens.astype("<i4").tobytes()).hexdigest(),
                "text_bytes": len(text),
                "text_hash": hashlib.sha256(text).hexdigest(),
                "created": time.time(),
                "seed": image.seed,
            }
            start = len(chain) * SEGMENT
            arrays = {"tail": image.tokens[start:], **image.frontier}
            arrays |= _rows(image, start, image.position)
            size = record.write(snapshot, header, arrays)
            record.flush_directory(self.directory / "snapshots")
            self._index.add(rows, _found(header, arrays, size, *past))
        except BaseException:  # the disk is full: leave no half of it
            written = [] if self._index.has("snapshots", name) else [snapshot]
            for path in written + [self._path("segments", row[0]) for row in rows if written]:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            raise

    def _write_segment(
        self, identity: str, image: Image, n: int, name: str, parent: str | None
    ) -> SegmentRow:
        start, end = n * SEGMENT, (n + 1) * SEGMENT
        arrays = {"ids": image.tokens[start:end], **_rows(image, start, end)}
        header = {"identity": identity, "name": name, "parent": parent}
        size = record.write(self._path("segments", name), header, arrays)
        return name, parent, identity, image.tokens[start:end].astype("<i4").tobytes(), size

    def _read(self, folder: str, name: str, wanted: Found) -> tuple[dict[str, Any], record.Arrays]:
        """One file of a snapshot. Where it is damaged or gone, it and the snapshot are dropped."""
        path = self._path(folder, name)
        try:
            header, arrays = record.read(path)
            if header["name"] != name or header["identity"] != wanted.identity:
                raise RecordError(f"{path} holds something else than its name says")
            return header, arrays
        except (RecordError, FileNotFoundError, KeyError):
            with self._misses("removing"), self._locked():
                path.unlink(missing_ok=True)
                gone = [name] if folder == "segments" else []
                self._index.remove([wanted.name], gone)
                self._path("snapshots", wanted.name).unlink(missing_ok=True)
            raise

    def _stored(self, chain: list[str]) -> int:
        """How many segments from the first on are there."""
        for n, name in enumerate(chain):
            if not self._index.has("segments", name) or not self._path("segments", name).exists():
                return n
        return len(chain)

    def _ancestors(self, identity: str, text: bytes, ids: bytes) -> list[Found]:
        """The stored prefixes of a sequence, the longest first, itself left out."""
        found = self._index.prefixes(identity, text)
        hashes = digests(ids, (_ID_BYTES * f.tokens for f in found))
        return [
            f
            for f in found
            if _ID_BYTES * f.tokens < len(ids) and hashes[_ID_BYTES * f.tokens] == f.ids_hash
        ]

    def _make_room(
        self, identity: str, image: Image, chain: list[str], n_stored: int, past: tuple[int, int]
    ) -> bool:
        """Evict until a snapshot fits; whether it does, and is worth it. Keeps what is stored of
        its segments."""
        own, segment = _sizes(image, n_stored)
        need = own + segment * (len(chain) - n_stored)
        if self._index.n_bytes() + need <= self.n_bytes:
            return True
        if need > self.n_bytes:
            self.trouble = f"a snapshot of {need} bytes does not fit {self.n_bytes} (--kv-space)"
            return False
        forest, now = self._index.tree(), self._index.now()
        below = forest.segments[chain[n_stored - 1]] if n_stored else forest.root(identity)
        for n in range(n_stored, len(chain)):
            part = image.tokens[n * SEGMENT : (n + 1) * SEGMENT].astype("<i4").tobytes()
            below = Segment(chain[n], part, segment, below)
        tail = image.tokens[len(chain) * SEGMENT :].astype("<i4").tobytes()
        new = Entry("", below, tail, image.position, own, now, *past)
        forest.tree.add(new)
        victims = forest.tree.room_for(new, self.n_bytes, now, self._policy)
        freed = {s.name for victim in victims or [] for s in forest.tree.remove(victim)}
        gone = [*forest.broken, *(victim.name for victim in victims or [])]
        self._delete(gone, (forest.loose | freed).difference(chain))
        return victims is not None

    def _delete(self, snapshots: list[str], segments: set[str]) -> None:
        """Files first: a kill leaves rows without files, which the next look tells apart."""
        for folder, names in (("snapshots", snapshots), ("segments", segments)):
            for name in names:
                self._path(folder, name).unlink(missing_ok=True)
        self._index.remove(snapshots, segments)

    def _path(self, folder: str, name: str) -> Path:
        return self.directory / folder / f"{name}{_FOLDERS[folder]}"

    def _make(self) -> None:
        """The directory, at the first save: reading alone leaves nothing behind."""
        for folder in (".", *_FOLDERS):
            (self.directory / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._look_again()

    def _look_again(self) -> None:
        """Open the index once there is a directory; another process may have made it."""
        if not self._made and self.directory.exists():
            self._index.close()
            self._index, self._made = self._open_index(), True

    def _open_index(self) -> Index:
        """The index on disk; a damaged one is made anew, an unwritable one is kept in memory."""
        path = self.directory / "index.sqlite"
        with self._misses("opening"), self._locked():
            try:
                index = Index(path)
                index.n_bytes()
            except sqlite3.DatabaseError:
                for name in (path, Path(f"{path}-journal"), Path(f"{path}-wal")):
                    name.unlink(missing_ok=True)
                index = Index(path)
            self._rebuild(index)
            return index
        index = Index(None)
        with self._misses("opening"):
            self._rebuild(index, cleaning=False)
        return index

    def _rebuild(self, index: Index, cleaning: bool = True) -> None:
        """Make the index agree with the files. Reads the headers of those it does not know."""
        new: list[str] = []
        lost = False
        for folder, suffix in _FOLDERS.items():
            known, there = index.names(folder), set()
            for item in _files(self.directory / folder):
                name = item.name.removesuffix(suffix)
                if item.name == name:  # a file that a kill left half written
                    if cleaning and name.startswith(record.TEMPORARY):
                        os.unlink(item.path)
                elif name in known or self._learn(index, folder, Path(item.path)):
                    there.add(name)
                    new += [] if name in known or folder == "segments" else [name]
            gone = known - there
            lost = lost or bool(gone)
            index.remove(*((gone, ()) if folder == "snapshots" else ((), gone)))
        _recall(index, new)
        if cleaning and (broken := index.tree().broken if new or lost else []):
            for name in broken:
                self._path("snapshots", name).unlink(missing_ok=True)
            index.remove(broken, ())

    def _learn(self, index: Index, folder: str, path: Path) -> bool:
        """Put one file into the index; whether it belongs there."""
        try:
            header, arrays = record.read(path)
            size = path.stat().st_size
            name = header["name"]
            if folder == "segments":
                ids = arrays["ids"].tobytes()
                row = (name, header["parent"], header["identity"], ids, size)
                index.add_segments([row])
            else:
                index.add((), _found(header, arrays, size, index.now()))
        except (RecordError, OSError, KeyError, TypeError, ValueError):
            return False
        return bool(name == path.stem)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among processes. Raises TimeoutError, OSError."""
        handle = os.open(self.directory / "lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError("another process holds the store") from None
                    time.sleep(0.005)
            yield
        finally:
            os.close(handle)  # and with it the lock

    def _misses(self, doing: str) -> _Misses:
        return _Misses(self, doing)


class _Misses:
    """What can go wrong with a disk, or with bytes another program wrote, is a miss."""

    def __init__(self, store: Store, doing: str):
        self._store, self._doing = store, doing

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> bool:
        if not isinstance(error, _TROUBLES):
            return False
        self._store.trouble = f"{self._doing} in {self._store.directory} failed: {error}"
        return True


def _chain(identity: str, ids: np.ndarray[Any, Any]) -> list[str]:
    """Names of the whole segments of a sequence: each depends on all ids before its end."""
    digest, names = hashlib.sha256(identity.encode()).digest(), []
    data = ids.astype("<i4").tobytes()
    step = SEGMENT * _ID_BYTES
    for end in range(step, len(data) + 1, step):
        digest = hashlib.sha256(digest + data[end - step : end]).digest()
        names.append(digest.hex()[:40])
    return names


def _name(identity: str, chain: list[str], ids: np.ndarray[Any, Any]) -> str:
    """The name of the snapshot of a sequence."""
    tail = ids[len(chain) * SEGMENT :].astype("<i4").tobytes()
    start = chain[-1] if chain else identity
    return hashlib.sha256(start.encode() + b"|" + tail).hexdigest()[:40]


def _files(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return list(items)
    except FileNotFoundError:
        return []


def _recall(index: Index, names: list[str]) -> None:
    """Note of snapshots that the index lost how they continue each other."""
    if not names:
        return
    forest = index.tree()
    entries, found = forest.entries, {f.name: f for f in index.all()}
    for name in sorted(set(names) & set(entries), key=lambda n: entries[n].tokens):
        ancestors = [found[e.name] for e in forest.tree.ancestors(entries[name])]
        index.use(ancestors, index.ids(found[name]), hit=False)


def _rows(image: Image, start: int, end: int) -> record.Arrays:
    """The rows that tokens start..end complete, by series."""
    rows = {}
    for name, array in image.rows.items():
        ratio = image.ratios[name]
        first = image.start // ratio
        rows[f"rows.{name}"] = array[:, start // ratio - first : end // ratio - first]
    return rows


def _sizes(image: Image, n_stored: int) -> tuple[int, int]:
    """About what a save will write: for the snapshot itself, and for each new segment."""
    rows = sum(array.nbytes for array in image.rows.values())
    token = rows / max(image.position - image.start, 1)
    fixed = sum(array.nbytes for array in image.frontier.values())
    tail = image.position % SEGMENT
    return int(token * tail) + fixed + _HEADER, int(token * SEGMENT) + _HEADER


def _found(
    header: dict[str, Any], arrays: record.Arrays, n_bytes: int, born: int, uses: int = 0
) -> Found:
    return Found(
        name=header["name"],
        parent=header["parent"],
        identity=header["identity"],
        tail=arrays["tail"].astype("<i4").tobytes(),
        tokens=int(header["tokens"]),
        ids_hash=bytes.fromhex(header["ids_hash"]),
        text_bytes=int(header["text_bytes"]),
        text_hash=bytes.fromhex(header["text_hash"]),
        n_bytes=n_bytes,
        created=float(header["created"]),
        born=born,
        uses=uses,
    )
