"""Hurts stores and counts what came of it; run as a process of its own, which forks.

Prints one JSON object: `trials`, `wrong` (an image that is not what was saved), `lost` (committed
and gone though nothing touched its files), `crashes` (an exception out of the store), and `hits`
and `misses` to show that both happened.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ds4py.cache.store import Store
from tests.pure import images

MODEL = "a model"
ROOM = 1 << 30
Sequence = tuple[int, int]
"""Seed and number of tokens; seeds share their first 200 tokens."""


def tokens_of(sequence: Sequence) -> np.ndarray:
    return images.ids(*sequence, shared=200)


def save(store: Store, sequence: Sequence) -> bool:
    tokens = tokens_of(sequence)
    start = store.stored_tokens(MODEL, tokens.tolist())
    return store.save(MODEL, images.image(tokens, start), images.text(tokens))


class Tally:
    """What loading sequences gave."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("trials", "wrong", "lost", "crashes", "hits", "misses"), 0)

    def load(self, store: Store, sequence: Sequence, must: bool = False) -> bool:
        """Load the longest prefix of a sequence; must: all of it has to be there."""
        tokens = tokens_of(sequence)
        for found in store.prefixes(MODEL, images.text(tokens)):
            image = store.load(found, tokens[: found.tokens].tolist())
            if image is None:
                continue
            if not images.same(image, images.image(tokens[: found.tokens])):
                self.counts["wrong"] += 1
            if found.tokens == len(tokens):
                self.counts["hits"] += 1
                return True
        self.counts["misses"] += 1
        self.counts["lost"] += must
        return False

    def guarded(self, work: Callable[[], object]) -> None:
        """Run one trial; an exception is a crash."""
        self.counts["trials"] += 1
        try:
            work()
        except Exception:
            traceback.print_exc()
            self.counts["crashes"] += 1


def forked(work: Callable[[], object]) -> int:
    """Run work in a child; its id."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def killed(folder: Path, n_trials: int, rng: random.Random, writers: int) -> Tally:
    """Children save until they are killed; every one checks what those before it committed."""
    tally, committed = Tally(), {}
    log = os.open(folder.parent / "log", os.O_CREAT | os.O_APPEND | os.O_RDWR)
    opened, tell = os.pipe()

    def write(number: int) -> None:
        clock = time.time() - number * 1e7  # each child's clock is far behind the one before
        time.time = lambda: clock  # type: ignore[assignment]
        own = random.Random(number)
        store = Store.open(folder, ROOM)
        os.write(tell, b".")
        length = own.randint(20, 300)
        while True:
            if not save(store, (number % 40, length)):
                raise AssertionError(store.trouble)
            os.write(log, f"{number % 40} {length}\n".encode())  # one write: whole lines
            length += own.randint(1, 200)

    for trial in range(n_trials):
        children = [forked(lambda n=trial * writers + w: write(n)) for w in range(writers)]
        os.read(opened, 1)  # a writer is at work, the other perhaps still opens the store
        time.sleep(rng.uniform(0, 0.15))
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            _, status = os.waitpid(child, 0)
            tally.counts["crashes"] += os.WIFEXITED(status)
        tally.counts["trials"] += len(children)
        lines = os.pread(log, 1 << 20, 0).decode().splitlines()
        committed = {tuple(map(int, line.split())) for line in lines}
        store = Store.open(folder, ROOM)
        for sequence in rng.sample(sorted(committed), min(4, len(committed))):
            tally.load(store, sequence, must=True)
        store.close()
    store = Store.open(folder, ROOM)
    for sequence in sorted(committed):
        tally.load(store, sequence, must=True)
    tally.counts["wrong"] += len(list(store.verify()))
    store.close()
    left = [p.name for p in folder.rglob("*") if p.name.startswith(".writing")]
    tally.counts["lost"] += len(left)
    return tally


def damaged(folder: Path, n_trials: int, rng: random.Random, cut: bool) -> Tally:
    """One file of a good store loses a bit, or its end; the index counts as a file."""
    tally, good = Tally(), folder.parent / "good"
    saved = [(seed, n) for seed in range(3) for n in (64, 200, 390)]
    store = Store.open(good, ROOM)
    assert all(save(store, sequence) for sequence in saved)
    store.close()
    files = [
        p.relative_to(good) for p in sorted(good.rglob("*")) if p.is_file() and p.stat().st_size
    ]

    def trial() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        path = folder / rng.choice(files)
        data = bytearray(path.read_bytes())
        if cut:
            del data[rng.randrange(len(data)) :]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        store = Store.open(folder, ROOM)
        for sequence in saved:
            tally.load(store, sequence)
        for _ in range(len(saved)):  # every round meets what is damaged for one of them at least
            for sequence in saved:
                save(store, sequence)
            if sum(tally.load(store, sequence) for sequence in saved) == len(saved):
                break
        else:
            tally.counts["lost"] += 1
        store.close()

    for _ in range(n_trials):
        tally.guarded(trial)
    return tally


def full(folder: Path, n_trials: int, rng: random.Random) -> Tally:
    """The folder is on a small disk that fills up, again and again."""
    tally = Tally()
    committed: set[Sequence] = set()
    store = Store.open(folder, ROOM)

    def trial() -> None:
        sequence = (rng.randint(1, 5000), rng.randint(20, 900))
        if save(store, sequence):
            committed.add(sequence)
        else:
            tally.counts["misses"] += 1
            drop = rng.sample(store.entries(), min(rng.randint(0, 2), len(committed)))
            store.remove([entry.name for entry in drop])
            gone = {entry.ids_hash for entry in drop}
            committed.difference_update(s for s in list(committed) if _hash(s) in gone)
        for sequence in rng.sample(sorted(committed), min(3, len(committed))):
            tally.load(store, sequence, must=True)

    for _ in range(n_trials):
        tally.guarded(trial)
    store.close()
    store = Store.open(folder, ROOM)
    for sequence in sorted(committed):
        tally.load(store, sequence, must=True)
    return tally


def _hash(sequence: Sequence) -> bytes:
    import hashlib

    return hashlib.sha256(tokens_of(sequence).astype("<i4").tobytes()).digest()


def denied(folder: Path, n_trials: int, rng: random.Random) -> Tally:
    """Some of the folders may not be written by whoever runs this."""
    tally = Tally()
    store = Store.open(folder, ROOM)
    saved = [(seed, 300) for seed in range(3)]
    assert all(save(store, sequence) for sequence in saved)
    store.close()
    folders = [folder, folder / "segments", folder / "snapshots"]
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)

    def trial() -> None:
        if os.geteuid() == 0:
            os.setuid(65534)  # root may write everywhere
        store = Store.open(folder, ROOM)
        for sequence in saved:
            if not tally.load(store, sequence):
                raise AssertionError("what can be read was not found")
        save(store, (9, rng.randint(20, 400)))
        for sequence in saved:
            tally.load(store, sequence, must=True)
        store.close()
        if tally.counts["lost"] or tally.counts["wrong"]:
            raise AssertionError(tally.counts)

    for _ in range(n_trials):
        closed = rng.sample(folders, rng.randint(1, 3))
        for path in folders:
            path.chmod(0o555 if path in closed or os.geteuid() == 0 else 0o755)
        rng.random()
        _, status = os.waitpid(forked(trial), 0)
        tally.counts["trials"] += 1
        tally.counts["crashes"] += status != 0
        tally.counts["hits"] += status == 0
    for path in folders:
        path.chmod(0o755)
    return tally


def main(what: str, folder: str, n_trials: str) -> None:
    rng, path, n = random.Random(7), Path(folder), int(n_trials)
    how: dict[str, Callable[[], Tally]] = {
        "killed": lambda: killed(path, n, rng, writers=1),
        "two": lambda: killed(path, n, rng, writers=2),
        "flipped": lambda: damaged(path, n, rng, cut=False),
        "cut": lambda: damaged(path, n, rng, cut=True),
        "full": lambda: full(path, n, rng),
        "denied": lambda: denied(path, n, rng),
    }
    print(json.dumps(how[what]().counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
