"""How many reads in flight a disk wants: measured on the records themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from time import perf_counter

from ds4py.experts.policy import Key
from ds4py.experts.reader import DEMAND, Readers, RecordReader
from ds4py.formats.bundle import LayerRecords

DEPTHS = (1, 2, 4, 8)
USUAL_DEPTH = 4
"""Where there is too little data to measure with: what the disks of recent Macs want."""
SECONDS_EACH, LEAST_BYTES = 0.12, 1 << 30
GOOD_ENOUGH = 0.95


def bandwidth(
    reader: RecordReader, keys: Iterator[Key], views: Sequence[memoryview], depth: int, limit: float
) -> float:
    """Bytes per second of reads of these records with `depth` in flight, for about `limit` s."""
    readers = Readers(reader.read, depth)
    try:
        start, n_bytes = perf_counter(), 0
        flying = [
            (view, readers.submit(key, view, DEMAND))
            for key, view in zip(islice(keys, depth), views, strict=False)
        ]
        while flying:
            view, load = flying.pop(0)
            readers.wait([load])
            if load.error is not None:
                raise load.error
            n_bytes += len(view)
            if perf_counter() - start < limit:
                flying += [(view, readers.submit(k, view, DEMAND)) for k in islice(keys, 1)]
        return n_bytes / (perf_counter() - start)
    finally:
        readers.close()


def scattered(records: Mapping[int, LayerRecords], record_bytes: int) -> Iterator[Key]:
    """Records of one size, each once, no two neighbours of a file one after the other."""
    layers = [layer for layer, r in records.items() if r.record_bytes == record_bytes]
    n_experts = records[layers[0]].n_experts
    step = next(n for n in range(n_experts // 2 + 1, 2 * n_experts) if _coprime(n, n_experts))
    for i in range(n_experts):
        yield from (Key(layer, i * step % n_experts) for layer in layers)


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1


def choose_depth(
    reader: RecordReader, records: Mapping[int, LayerRecords], region: memoryview
) -> int:
    """The fewest reads in flight that come close to the best bandwidth. Overwrites `region`."""
    size = max(r.record_bytes for r in records.values())
    same = [r for r in records.values() if r.record_bytes == size]
    views = [region[at : at + size] for at in range(0, len(region) - size + 1, size)]
    if sum(r.n_experts for r in same) * size < LEAST_BYTES or len(views) < max(DEPTHS):
        return USUAL_DEPTH
    keys = scattered(records, size)
    found = [(depth, bandwidth(reader, keys, views, depth, SECONDS_EACH)) for depth in DEPTHS]
    best = max(rate for _, rate in found)
    return next(depth for depth, rate in found if rate >= GOOD_ENOUGH * best)
