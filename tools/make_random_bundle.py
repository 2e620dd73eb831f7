"""A bundle of random weights, of any size: for measuring what streaming does to disk and memory.

    python tools/make_random_bundle.py /tmp/b --layers 8 --experts 256 --formats Q8_0,Q8_0,Q8_0
    python tools/make_random_bundle.py /tmp/flash --hidden 4096 --inner 2048 --layers 2

The second has records of V4-Flash's size, 7,077,888 bytes. Routing is spread evenly: the worst case
for a cache. The same arguments make the same files.
"""

import argparse
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4py.config import ModelConfig
from ds4py.formats import bundle as files
from ds4py.formats.gguf_blocks import block_format
from ds4py.weights import names
from ds4py.weights.bundle import DENSE, RECIPE, ROUTED, VERSION, experts_file, layout_of
from tools.golden.presets import Preset, config

# Where a block's float16 scales lie; any other byte of a block may have any value.
SCALES = {"Q8_0": (0,), "IQ2_XXS": (0,), "Q2_K": (80, 82)}
SCALE = 2.0**-10


def make(
    target: Path,
    c: dict[str, Any],
    formats: tuple[str, str, str],
    seed: int = 0,
    dense: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a bundle with config `c` and records in three formats; dense: block formats of some
    other matrices, by name."""
    target.mkdir(parents=True, exist_ok=True)
    model, rng = ModelConfig.from_dict(c), np.random.default_rng(seed)
    layout, n = layout_of(model, formats), model.n_routed_experts
    tensors = []
    for name, shape in names.expected(model).items():
        if not ROUTED.search(name):
            if name in dense:
                width = block_format(dense[name]).row_bytes(shape[1])
                dtype, values = "U8", blocks(dense[name], shape[0] * width, rng).reshape(-1, width)
            else:
                dtype, values = draw(name, shape, n, rng)
            once = partial(list, [values])
            tensors.append(files.NewTensor(name, dtype, values.shape, values.nbytes, once))
    written: dict[str, dict[str, Any]] = {DENSE: {"sha256": files.write(target / DENSE, tensors)}}
    for plan in model.layers:
        crcs: list[int] = []
        tensor = files.NewTensor(
            "experts",
            "U8",
            (n, layout.record_bytes),
            n * layout.record_bytes,
            partial(records, model, layout, formats, rng, crcs),
        )
        file = experts_file(plan.index)
        digest = files.write(target / file, [tensor], files.RECORD_ALIGN)
        written[file] = {"sha256": digest, "crc32": crcs}
    experts = {str(plan.index): list(formats) for plan in model.layers}
    recipe = {"version": VERSION, "tensors": dict(dense), "experts": experts, "files": written}
    (target / "config.json").write_text(json.dumps(c))
    (target / RECIPE).write_text(json.dumps(recipe))


def draw(
    name: str, shape: tuple[int, ...], n_experts: int, rng: np.random.Generator
) -> tuple[str, NDArray[Any]]:
    """One dense tensor."""
    if name.endswith("tid2eid"):
        ids = rng.permuted(np.tile(np.arange(n_experts), (shape[0], 1)), axis=1)
        return "I64", ids[:, : shape[1]].astype(np.int64)
    if name.endswith("norm.weight"):
        return "F32", np.ones(shape, np.float32)
    spread = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
    return "F32", (rng.standard_normal(shape) * spread).astype(np.float32)


def records(
    model: ModelConfig,
    layout: files.RecordLayout,
    formats: tuple[str, str, str],
    rng: np.random.Generator,
    crcs: list[int],
) -> Iterator[NDArray[np.uint8]]:
    """One layer's records, and their checksums into `crcs`."""
    for _ in range(model.n_routed_experts):
        record = np.zeros(layout.record_bytes, np.uint8)
        for where, name in zip(layout.slices(), formats, strict=True):
            record[where] = blocks(name, where.stop - where.start, rng)
        crcs.append(zlib.crc32(record.data))
        yield record


def blocks(name: str, n_bytes: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random blocks of small scale."""
    data = np.frombuffer(rng.bytes(n_bytes), np.uint8).copy()
    each = data.reshape(-1, block_format(name).block_bytes)
    for at in SCALES[name]:
        each[:, at : at + 2] = np.array([SCALE], "<f2").view(np.uint8)
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", type=Path)
    for option, default in (
        ("hidden", 256),
        ("inner", 512),
        ("layers", 8),
        ("experts", 256),
        ("chosen", 6),
        ("vocab", 1024),
    ):
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N")
    parser.add_argument("--formats", default="IQ2_XXS,IQ2_XXS,Q2_K", help="of gate, up and down")
    given = parser.parse_args()
    ratios = tuple((0, 4, 16)[i % 3] for i in range(given.layers))
    preset = Preset(
        ratios,
        tokens=0,
        hidden=given.hidden,
        inner=given.inner,
        experts=given.experts,
        experts_used=given.chosen,
        vocab=given.vocab,
    )
    gate, up, down = given.formats.split(",")
    c = config(preset) | {"num_hash_layers": min(3, given.layers), "num_nextn_predict_layers": 0}
    c["compress_ratios"] = list(ratios)
    make(given.target, c, (gate, up, down))


if __name__ == "__main__":
    main()
