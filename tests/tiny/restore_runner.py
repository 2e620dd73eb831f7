"""Continues sessions that another process saved; prints digests of what they became."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ds4py import Engine, EngineOptions, SamplingOptions, Session
from ds4py.cache.store import Store
from ds4py.engine.disk import DiskSessions

AHEAD = 256
"""Tokens each session goes on for."""


def digest(session: Session) -> str:
    """Everything a session's future depends on, in one number."""
    image = session.image()
    found = hashlib.sha256(np.asarray(session.logits(), np.float64).tobytes())
    for arrays in (image.rows, image.frontier, {"tokens": image.tokens}):
        for name in sorted(arrays):
            found.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return found.hexdigest()


def sampled(n_tokens: int) -> SamplingOptions:
    """One seed for all: what is drawn depends on it and on the position alone."""
    return SamplingOptions(seed=5, max_tokens=n_tokens, temperature=1.1, stop_at_eos=False)


class Restorer:
    """The other process's sessions."""

    def __init__(self, folder: str, ids: list[int]) -> None:
        self.engine, self.ids = Engine.open("tiny", EngineOptions(prefill_chunk=96)), ids
        self.disk = DiskSessions(self.engine, Store.open(Path(folder), 1 << 40))

    def at(self, position: int) -> Session:
        session = self.engine.session()
        assert self.disk.restore(session, self.ids[:position]) == position, position
        return session

    def alone(self, positions: list[int]) -> dict[int, str]:
        """One after the other."""
        found = {}
        for position in positions:
            session = self.at(position)
            session.sync(self.ids[: position + AHEAD])
            found[position] = digest(session)
        return found

    def interleaved(self, positions: list[int]) -> dict[int, str]:
        """All of them in slices, in turns."""
        sessions = {p: self.at(p) for p in positions}
        running = [s.sync_slices(self.ids[: p + AHEAD], 48) for p, s in sessions.items()]
        while running:
            running = [slices for slices in running if next(slices, None) is not None]
        return {p: digest(session) for p, session in sessions.items()}

    def generated(self, positions: list[int]) -> dict[int, str]:
        """All of them decode, token by token, in turns."""
        sessions = {p: self.at(p) for p in positions}
        streams = [session.generate(sampled(AHEAD)) for session in sessions.values()]
        for _ in zip(*streams, strict=True):
            pass
        return {p: digest(session) for p, session in sessions.items()}


def main() -> None:
    job: dict[str, Any] = json.loads(sys.stdin.read())
    restorer = Restorer(job["folder"], job["ids"])
    out = [getattr(restorer, how)(positions) for how, positions in job["work"]]
    print(json.dumps(out))


if __name__ == "__main__":
    main()
