"""Experts in a GGUF file: three ranges make a record, and nothing else differs from a bundle."""

import errno
import os
import re
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from ds4py.engine import memory
from ds4py.errors import WeightsError
from ds4py.experts.streamed import StreamedExperts
from ds4py.formats import gguf
from ds4py.weights.files import ModelFiles
from tests.experts.models import resident, streamed
from tests.golden.gguf_files import MIXED, Q2, Built, build

LEAST = 5 * 2
"""Slots of a token: four layers and a draft layer, two experts each."""
CHUNKS = [24, 9, 3, *[1] * 6]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """IQ2_XXS and Q2_K, with a draft layer. Not to be written to."""
    return build(tmp_path_factory.mktemp("gguf"), Q2)


def ids(built: Built) -> list[int]:
    return built.ids[: sum(CHUNKS)]


def test_the_same_logits(file: Built) -> None:
    """At every cache size, cold and warm, and of the draft layer."""
    held = resident(file.path)
    expected, drafted = held.score(ids(file), CHUNKS), held.score_mtp(ids(file)[:12])
    for slots, prefetch in ((LEAST, "hash"), (LEAST + 3, "router"), (30, "off")):
        engine = streamed(file.path, slots, prefetch=prefetch)
        for _ in range(2):
            np.testing.assert_array_equal(engine.score(ids(file), CHUNKS), expected)
        np.testing.assert_array_equal(engine.score_mtp(ids(file)[:12]), drafted)


@pytest.mark.long
def test_formats_and_sizes_that_differ(tmp_path: Path) -> None:
    model = build(tmp_path, MIXED)
    expected = resident(model.path).score(ids(model), CHUNKS)
    np.testing.assert_array_equal(streamed(model.path).score(ids(model), CHUNKS), expected)


def test_the_plan_streams_what_does_not_fit(file: Built) -> None:
    """Slots are records of whole pages; the parts of the file add up to what is on disk."""
    source = ModelFiles.at(file.path).source()
    numerics, _ = memory.plan_files(ModelFiles.at(file.path), 512, "1GB")
    records = source.records()
    assert records is not None

    def plan(budget: int) -> memory.MemoryPlan:
        given = 512, str(budget), "auto", None, 50_000_000
        return memory.plan_memory(source, numerics, records, *given)

    everything = plan(10**9)
    tight = plan(everything.fixed + everything.all_experts - 1)
    assert not everything.streamed
    assert tight.streamed and {part.record_bytes for part in tight.slots} == {65536}
    options = EngineOptions(context=512, memory="1GB", experts="streamed")
    engine = Engine.open(file.path, options)
    assert isinstance(engine.experts, StreamedExperts) and engine.plan.total <= 10**9


def test_reads_are_the_parts(file: Built) -> None:
    """Three reads for a record, of its bytes and the rest of their pages."""
    engine, seen = streamed(file.path, verify="never"), []

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        seen.append(sum(len(buffer) for buffer in buffers))
        return os.preadv(descriptor, buffers, offset)

    engine.experts.reader.read_into = read  # type: ignore[attr-defined]
    engine.score(ids(file)[:1], [1])
    stats = engine.experts.stats()
    n_records = stats["bytes_read"] // 65536
    assert len(seen) == 3 * n_records
    assert 2 * 16896 + 21504 <= sum(seen) / n_records <= 2 * 16896 + 21504 + 6 * 4096


@pytest.mark.parametrize("tensor", ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"])
def test_damage_is_found_and_named(file: Built, tmp_path: Path, tensor: str) -> None:
    """There are no checksums; a scale that is no number is found at the first load."""
    copy = Path(shutil.copy(file.path, tmp_path))
    info = gguf.read(copy).tensors[f"blk.2.{tensor}.weight"]
    part, at = info.n_bytes // 6, 80 if "down" in tensor else 0
    with open(copy, "r+b") as stream:
        for expert in range(6):
            stream.seek(info.offset + expert * part + at)
            stream.write(b"\xff\x7f")
    with pytest.raises(WeightsError, match=r"layer 2, expert \d: .* NaN or infinite") as caught:
        streamed(copy).score(ids(file), CHUNKS)
    found = re.search(r"expert (\d): .* at offset (\d+)", str(caught.value))
    assert found is not None
    assert int(found[2]) == info.offset + int(found[1]) * part
    streamed(copy, verify="never").score(ids(file)[:24], [24])


def test_truncated_while_running(file: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copy(file.path, tmp_path))
    engine = streamed(copy)
    engine.score(ids(file)[:24], [24])
    os.truncate(copy, gguf.read(copy).tensors["blk.0.ffn_down_exps.weight"].offset)
    with pytest.raises(WeightsError, match=r"layer \d, expert \d: .*(ends after|was changed)"):
        engine.score(ids(file), CHUNKS)


def test_a_bad_sector(file: Built) -> None:
    """In the third part of a record: named, and gone when the disk works again."""
    engine, expected = streamed(file.path), resident(file.path).score(ids(file)[:24], [24])
    calls = count(1)

    def fail(descriptor: int, buffers: Any, offset: int) -> int:
        if next(calls) % 3 == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    engine.experts.reader.read_into = fail  # type: ignore[attr-defined]
    with pytest.raises(WeightsError, match=r"expert \d: .*model.gguf at offset \d+ cannot be read"):
        engine.score(ids(file)[:24], [24])
    engine.experts.reader.read_into = os.preadv  # type: ignore[attr-defined]
    np.testing.assert_array_equal(engine.score(ids(file)[:24], [24]), expected)
