"""Reads the committed golden sets, and writes further checkpoints in the same layout."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.golden import files
from tools.golden.presets import PRESETS, Config, Tensors, config, draw, tokens

DATA = Path(__file__).parent / "data"
NAMES = ("flashlike", "fast", "prolike")


def load(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of golden.npz."""
    with np.load(DATA / name / "golden.npz") as arrays:
        return dict(arrays)


def checkpoint(name: str) -> tuple[Config, Tensors]:
    """config.json and the weights as float32 and int64."""
    folder = DATA / name
    return json.loads((folder / "config.json").read_text()), files.read(
        folder / "model.safetensors"
    )


def plain(values: NDArray[Any]) -> files.Stored:
    return files.int64(values) if values.dtype.kind == "i" else files.float32(values)


def write(folder: Path, c: Config, stored: dict[str, files.Stored]) -> Path:
    """A checkpoint in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    files.write(folder / "model.safetensors", stored)
    return folder


def write_sharded(folder: Path, c: Config, stored: dict[str, files.Stored], shards: int) -> Path:
    """The same dealt out over several files, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(c))
    where: dict[str, str] = {}
    for number in range(shards):
        part = {n: t for at, (n, t) in enumerate(stored.items()) if at % shards == number}
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        files.write(folder / file, part)
        where |= dict.fromkeys(part, file)
    size = sum(len(tensor.data) for tensor in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def random_model(preset: str, seed: int) -> tuple[Config, Tensors, NDArray[np.int64]]:
    """Config, tensors and token ids of a preset."""
    c = config(PRESETS[preset])
    return c, dict(draw(c, seed)), tokens(c, PRESETS[preset].tokens, seed)
