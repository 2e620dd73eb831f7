#!/usr/bin/env python3
"""Writes golden sets: a small random checkpoint and the logits independent code gives it.

    python -m tools.make_golden --preset flashlike --seed 1 --out DIR
    python -m tools.make_golden --committed tests/golden/data

A set is a folder with config.json (DeepSeek's keys), model.safetensors (DeepSeek's names) and
golden.npz:

    input_ids [T]                    int64
    logits_prefill [T, V]            transformers, float32, one forward pass
    mtp_logits [T-1, V]              its MTP layer: row t reads the streams of t and token t+1
    logits_rounded [T, V]            float64 reference with the trained FP8/FP4 round trips, where
                                     float32 noise does not move them

The logits come from transformers (needs the `reference` extra), those with the round trips, which
it does not have, from tools/golden/reference64.py. Before anything is written the two are compared,
whole and in uneven chunks, and a set whose choices nearly tie is refused.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from tools.golden import files, storage
from tools.golden.presets import PRESETS, Config, Tensors, config, draw, tokens
from tools.golden.reference64 import Reference
from tools.golden.transformers_model import TransformersModel

# What DeepSeek's checkpoints keep in F32; every other floating point tensor may lose precision.
ALWAYS_F32 = ("_fn", "_base", "_scale", ".ape", ".attn_sink", "gate.bias")
# Seeds whose rounded logits are steady.
COMMITTED = {"flashlike-small": 29, "fast-small": 18, "prolike-small": 21}
AGREE = 1e-4  # float32 against float64, on logits of about 10
TIE = 1e-6  # float32 noise of an indexer score


def store(name: str, values: np.ndarray, small: bool) -> files.Stored:
    if values.dtype.kind == "i":
        return files.int64(values)
    if small and not name.endswith(ALWAYS_F32):
        return files.bfloat16(values)
    return files.float32(values)


def uneven(count: int, seed: int) -> list[int]:
    """Chunk sizes that add up to `count`."""
    random, sizes = np.random.default_rng([seed, 2]), []
    while count:
        sizes.append(min(count, int(random.choice([1, 2, 3, 5, 7, 17, 31, 64]))))
        count -= sizes[-1]
    return sizes


def largest(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


def make(preset_name: str, seed: int, out: Path, small: bool) -> None:
    """Writes one set. `small` stores as a released checkpoint does, BF16 where it does not say F32.

    Raises ValueError when the implementations disagree or a choice of the indexer nearly ties.
    """
    preset = PRESETS[preset_name]
    c = config(preset)
    tensors: Tensors = dict(draw(c, seed))
    stored = {name: store(name, values, small) for name, values in tensors.items()}
    if small:
        for name, tensor in stored.items():
            if tensor.dtype == "BF16":
                tensors[name] = files.from_bfloat16(files.to_bfloat16(tensors[name]))
    ids = tokens(c, preset.tokens, seed)
    model, plain = TransformersModel(c, tensors), Reference(c, tensors)
    prefill, drafts = model.logits(ids), model.draft(ids)
    logits, streams = plain.logits(ids)
    checks = {
        "whole": largest(logits, prefill),
        "chunks": largest(logits, model.logits(ids, uneven(len(ids), seed))),
        "draft": largest(plain.draft(streams, ids), drafts),
    }
    print(f"{preset_name} seed {seed}: {checks}, closest choice {plain.closest:.1e}")
    if max(checks.values()) > AGREE or plain.closest < TIE:
        raise ValueError("not written: the implementations disagree, or a choice nearly ties")
    arrays = {"input_ids": ids, "logits_prefill": prefill, "mtp_logits": drafts}
    rounded, _ = Reference(c, tensors, rounding=True).logits(ids)
    if steady(c, tensors, ids, rounded):
        arrays["logits_rounded"] = rounded.astype(np.float32)
    else:
        print("float32 noise moves the rounded logits of this set: they are left out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(c, indent=1) + "\n", encoding="utf-8")
    files.write(out / "model.safetensors", stored)
    np.savez_compressed(out / "golden.npz", **arrays)


def steady(c: Config, tensors: Tensors, ids: np.ndarray, rounded: np.ndarray) -> bool:
    """Whether float32 noise before the round trips leaves 99 % of the positions where they are.

    One value on the other side of a rounding boundary moves every later position, so in most
    random sets two correct float32 programs differ visibly.
    """
    for seed in range(5):
        noisy = Reference(c, tensors, rounding=True, noise=1e-6, seed=seed)
        off = np.abs(noisy.logits(ids)[0] - rounded).max(axis=1)
        if np.mean(off < 2e-3) < 0.99:
            return False
    return True


def make_storage(out: Path) -> None:
    """Writes the storage format fixture: storage.safetensors and the values it stands for."""
    stored, expected = storage.fixture()
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / "storage.safetensors", stored)
    np.savez_compressed(out / "expected.npz", **expected)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=[n for n in PRESETS if n != "mixed"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder of the set")
    parser.add_argument("--committed", type=Path, help="write the sets the tests carry, here")
    given = parser.parse_args()
    if given.committed:
        for name, seed in COMMITTED.items():
            make(name, seed, given.committed / name.removesuffix("-small"), small=True)
        make_storage(given.committed / "storage")
    elif given.preset and given.out:
        make(given.preset, given.seed, given.out, small=given.preset.endswith("-small"))
    else:
        parser.error("give --preset and --out, or --committed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
