"""Decoded maps that are kept: the same numbers, within the bound, the least lately used ones go."""

from typing import Any, cast

import numpy as np
import pytest

from ds4py.kernels.decoded import DecodedMaps
from ds4py.kernels.host import HostOps
from ds4py.kernels.ops import Ops, PackedWeight
from tests.kernels.packed import random_rows

OPS, N, OUT, IN = cast(Ops, HostOps()), 4, 32, 256
MAP = 4 * IN * OUT


def weight(maps: DecodedMaps | None, seed: int = 1) -> PackedWeight:
    rows = random_rows("Q8_0", N * OUT, IN, np.random.default_rng(seed))
    records = np.asarray(rows).reshape(N, -1)
    return PackedWeight(records, ((slice(0, records.shape[1]), "Q8_0"),), IN, maps)


def through(w: PackedWeight, *experts: int) -> Any:
    x = np.random.default_rng(2).standard_normal((len(experts), IN)).astype(np.float32)
    return OPS.experts(x, np.array(experts), w)


@pytest.mark.parametrize("most", [0, MAP, 3 * MAP, 8 * MAP])
def test_kept_maps_are_what_decoding_gives(most: int) -> None:
    """Two weights share one bound; every expert comes and comes back."""
    maps = DecodedMaps(most)
    kept, plain = ([weight(m, seed) for seed in (1, 2)] for m in (maps, None))
    for step in np.random.default_rng(3).integers(0, N, (20, 2)):
        for a, b in zip(kept, plain, strict=True):
            np.testing.assert_array_equal(through(a, *step), through(b, *step))
        assert maps.n_bytes <= max(most, MAP)


def test_the_least_lately_used_map_goes() -> None:
    maps = DecodedMaps(2 * MAP)
    w, shape = weight(maps), (IN, OUT)
    for experts in ((0,), (1,), (0,), (2,)):
        through(w, *experts)
    assert [e for e in range(N) if maps.find(shape, (w, e)) is not None] == [0, 2]


def test_records_that_change_are_decoded_anew() -> None:
    w = weight(None)
    before = through(w, 0)
    w.records[0] = w.records[1]
    assert (through(w, 0) != before).any()
