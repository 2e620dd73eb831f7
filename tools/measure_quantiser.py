"""Time, rate and memory of `ds4 quantize` on one layer at the true dimensions of Flash.

    python tools/measure_quantiser.py PLACE [--experts 256]

Writes a random checkpoint of one layer in DeepSeek's layout into PLACE (FP4 experts of 4096 x 2048
with their scales; 3.4 GB with all 256), converts it in a process of its own, checks the sizes, and
removes both. PLACE needs 7 GB. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ds4py.config import ModelConfig
from ds4py.formats import bundle
from ds4py.formats.fp_blocks import scale_shape
from ds4py.formats.safetensors import read_header
from ds4py.hub import manifest
from ds4py.weights import names

VOCABULARY = 2048
"""Small: the embedding is not what is measured."""
RECORD = 7_077_888


def config(n_experts: int) -> dict[str, Any]:
    """Flash's, cut to its first layer with learned routing and no compressed rows."""
    flash = manifest.load("flash")
    assert flash is not None
    one = {"num_hidden_layers": 1, "num_hash_layers": 0, "compress_ratios": [0]}
    one |= {"n_routed_experts": n_experts, "num_nextn_predict_layers": 0}
    return dict(flash.config) | one | {"vocab_size": VOCABULARY}


def tensors(c: ModelConfig) -> Iterator[bundle.NewTensor]:
    """Random codes whose scales make the matrices' outputs as large as their inputs."""
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], low: int, high: int) -> list[np.ndarray]:
        return [rng.integers(low, high, shape, np.uint8)]

    for name, shape in names.expected(c).items():
        if ".ffn.experts." in name:
            packed, scales = (shape[0], shape[1] // 2), scale_shape("I8", (shape[0], shape[1]))
            size = packed[0] * packed[1]
            yield bundle.NewTensor(name, "I8", packed, size, partial(draw, packed, 0, 256))
            yield bundle.NewTensor(
                name.replace(".weight", ".scale"), "F8_E8M0", scales, scales[0] * scales[1],
                partial(draw, scales, 118, 121),
            )
        else:
            values = rng.standard_normal(shape, np.float32) * 0.02
            yield bundle.NewTensor(name, "F32", shape, values.nbytes, lambda v=values: [v])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", type=Path)
    parser.add_argument("--experts", type=int, default=256)
    given = parser.parse_args()
    source, target = given.place / "one-layer", given.place / "one-layer-bundle"
    raw = config(given.experts)
    try:
        source.mkdir(parents=True)
        (source / "config.json").write_text(json.dumps(raw))
        bundle.write(source / "model.safetensors", list(tensors(ModelConfig.from_dict(raw))))
        entries = read_header(source / "model.safetensors").values()
        start = perf_counter()
        subprocess.run(
            [sys.executable, "-m", "ds4py", "quantize", str(source), str(target)], check=True
        )
        seconds = perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        layer = target / "experts-00.safetensors"
        weights = given.experts * 3 * 4096 * 2048
        report = {
            "experts": given.experts,
            "source_bytes": sum(entry.n_bytes for entry in entries),
            "largest_tensor_bytes": max(entry.n_bytes for entry in entries),
            "layer_bytes": read_header(layer)["experts"].n_bytes,
            "seconds": round(seconds, 1),
            "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
            "mega_weights_per_processor_second": round(
                weights / 1e6 / (used.ru_utime + used.ru_stime), 2
            ),
            "peak_rss_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }
        assert report["layer_bytes"] == given.experts * RECORD, report
        print(json.dumps(report))
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main()
