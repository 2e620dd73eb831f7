"""A checkpoint is checked as a whole before any data is read; every fault names its tensor."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from ds4py.errors import ConfigError, InputError, OptionsError, WeightsError
from ds4py.weights.checkpoint import Checkpoint
from ds4py.weights.load import Loader
from tests.golden.sets import checkpoint, plain, write
from tools.golden import files

Edit = Callable[[dict[str, Any], dict[str, files.Stored]], None]


def model(folder: Path, edit: Edit) -> Path:
    """The "fast" set with some of its config or tensors changed."""
    config, tensors = checkpoint("fast")
    stored = {name: plain(values) for name, values in tensors.items()}
    edit(config, stored)
    return write(folder, config, stored)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c, t: t.pop("layers.2.attn.indexer.wq_b.weight"), r"lacks 1 of .*indexer\.wq_b"),
        (lambda c, t: t.pop("head.weight"), r"lacks 1 of .*head\.weight"),
        (lambda c, t: t.pop("mtp.0.enorm.weight"), r"lacks 1 of .*mtp\.0\.enorm"),
        (
            lambda c, t: [t.pop(n) for n in list(t) if ".experts.3." in n and n[7] == "5"],
            r"lacks 3 of .*layers\.5\.ffn\.experts\.3\.w1\.weight",
        ),
        (lambda c, t: t.update({"layers.9.x": t["norm.weight"]}), r"1 tensors .*layers\.9\.x"),
        (lambda c, t: t.update({"norm.scale": t["norm.weight"]}), r"1 tensors .*norm\.scale"),
        (
            lambda c, t: t.update({"norm.weight": files.float32(np.ones(33, np.float32))}),
            r"norm\.weight has shape \[33\]; config\.json calls for \[32\]",
        ),
        (
            lambda c, t: t.update({"layers.0.ffn.gate.tid2eid": t["norm.weight"]}),
            r"tid2eid has dtype F32; need I64",
        ),
        (
            lambda c, t: t.update({"norm.weight": files.int64(np.ones(32, np.int64))}),
            r"norm\.weight has dtype I64",
        ),
        (lambda c, t: c.update(num_hidden_layers=8, compress_ratios=[0] * 9), "lacks"),
        (
            lambda c, t: c.update(
                num_nextn_predict_layers=0, compress_ratios=c["compress_ratios"][:-1]
            ),
            r"tensors .*mtp\.0",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, edit: Edit, named: str) -> None:
    with pytest.raises(WeightsError, match=named) as caught:
        Engine.open(model(tmp_path, edit))
    assert "\n" not in str(caught.value)


def test_dspark_draft_tensors_are_set_aside(tmp_path: Path) -> None:
    def edit(config: dict[str, Any], stored: dict[str, files.Stored]) -> None:
        config.update(dspark_block_size=5, num_nextn_predict_layers=3)
        config["compress_ratios"] = [*config["compress_ratios"][:-1], 0, 0, 0]
        for name in ("mtp.1.markov.weight", "mtp.2.norm.weight", "dspark.noise"):
            stored[name] = stored["norm.weight"]

    engine = Engine.open(model(tmp_path, edit))
    assert engine.score([1, 2, 3]).shape[0] == 3
    with pytest.raises(WeightsError, match="no MTP weights"):
        engine.score_mtp([1, 2, 3])


def test_rounding_needs_whole_blocks(tmp_path: Path) -> None:
    folder = model(tmp_path, lambda c, t: c.update(qk_rope_head_dim=32))
    with pytest.raises(ConfigError, match=r"is 96; .* multiple of 64"):
        Engine.open(folder)
    Engine.open(folder, EngineOptions(trained_rounding=False))


def test_options_that_this_model_or_machine_cannot_meet(tmp_path: Path) -> None:
    folder = model(tmp_path, lambda c, t: None)
    with pytest.raises(OptionsError, match="has positions for 1048576"):
        Engine.open(folder, EngineOptions(context=2**21))
    with pytest.raises(OptionsError, match=r"memory is 1\.0 MB, .* too little"):
        Engine.open(folder, EngineOptions(memory="1MB", context=100))
    with pytest.raises(OptionsError, match="no Metal"):
        Engine.open(folder, EngineOptions(kernels="metal"))
    with pytest.raises(InputError, match="is a file"):
        Engine.open(folder / "model.safetensors")
    with pytest.raises(InputError, match="no model 'nowhere'"):
        Engine.open("nowhere")


def test_bfloat16_runs(tmp_path: Path) -> None:
    """bfloat16 of random weights is far from float32, but finite and not constant."""
    engine = Engine.open(model(tmp_path, lambda c, t: None), EngineOptions(dtype="bfloat16"))
    logits = engine.score(list(range(40)))
    assert np.isfinite(logits).all() and logits.std() > 0.1
    assert engine.stats()["dtype"] == "bfloat16"


def test_loading_holds_the_model_and_little_more(tmp_path: Path) -> None:
    """Peak host memory while loading is the model plus a few of its largest tensors."""
    folder = model(tmp_path, lambda c, t: None)
    engine = Engine.open(folder)  # imports and caches are paid here
    read = Checkpoint(folder, engine.config)
    largest = max(entry.n_bytes for entry in read.entries.values())
    tracemalloc.start()
    kept = Loader(read, engine.model.ops, engine.model.dtype, True, True).transformer()
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept.config is engine.config
    assert peak - after < 4 * largest, (peak, after, largest)
    assert after > 30 * largest  # so the bound above is small against the model
