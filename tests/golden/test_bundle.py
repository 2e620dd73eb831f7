"""A bundle is made whole or not at all, reads back as what was encoded, and names its faults."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from ds4py import Engine, EngineOptions
from ds4py.config import ModelConfig
from ds4py.errors import InputError, WeightsError
from ds4py.formats.bundle import RECORD_ALIGN
from ds4py.formats.gguf_blocks import FORMATS, decode
from ds4py.formats.safetensors import read_header
from ds4py.quant import imatrix
from ds4py.quant.convert import Converter
from ds4py.quant.encode import encode
from ds4py.quant.recipe import Recipe
from ds4py.weights.checkpoint import Checkpoint
from tests.golden.sets import plain, write
from tools.golden.presets import PRESETS, config, draw

EXACT = EngineOptions(dtype="float32", trained_rounding=False)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model wide enough for blocks of 256."""
    c = config(PRESETS["fast"]) | {
        "hidden_size": 256,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 16, 0],
        "num_hash_layers": 1,
        "n_routed_experts": 3,
        "q_lora_rank": 64,
        "o_lora_rank": 64,
    }
    c.pop("layer_types", None)
    stored = {name: plain(values) for name, values in dict(draw(c, 3)).items()}
    return write(tmp_path_factory.mktemp("parent"), c, stored)


def convert(parent: Path, target: Path, recipe: dict[str, Any], **options: Any) -> None:
    c = ModelConfig.load(parent)
    plan = Recipe.from_dict(recipe, len(c.layers))
    Converter(Checkpoint(parent, c), target, plan, **options).run()


@pytest.fixture(scope="module")
def bundle(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "b"
    convert(parent, target, {})
    return target


def test_logits_are_those_of_the_decoded_blocks(parent: Path, bundle: Path, tmp_path: Path) -> None:
    """The same values as floats in a plain checkpoint give the same logits, on both back ends."""
    c = ModelConfig.load(parent)
    source = Checkpoint(parent, c)
    formats = Converter(source, tmp_path, Recipe.from_dict({}, 3)).formats
    stored = {}
    for name, entry in source.entries.items():
        values = entry.read()
        if formats[name] in FORMATS:
            values = decode(formats[name], encode(formats[name], values, None))
        stored[name] = plain(values)
    floats = write(tmp_path / "floats", json.loads((parent / "config.json").read_text()), stored)
    ids = [int(t) for t in np.random.default_rng(0).integers(0, c.vocab_size, 40)]
    expected = Engine.open(floats, EXACT).score(ids)
    packed = Engine.open(bundle, EXACT)
    np.testing.assert_array_equal(packed.score(ids), expected)
    np.testing.assert_array_equal(packed.score(ids, [1] * 40), expected)
    reference = EngineOptions(kernels="reference", dtype="float32", trained_rounding=False)
    assert np.abs(Engine.open(bundle, reference).score(ids) - expected).max() < 1e-3
    drafts = packed.score_mtp(ids)
    np.testing.assert_array_equal(drafts, Engine.open(floats, EXACT).score_mtp(ids))


def test_layout(bundle: Path) -> None:
    """Records start at whole pages of the file, and any safetensors reader opens it."""
    for path in sorted(bundle.glob("experts-*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        assert start % RECORD_ALIGN == 0
        with safe_open(path, "numpy") as file:
            records = file.get_tensor("experts")
        assert records.dtype == np.uint8 and records.shape[1] % RECORD_ALIGN == 0
        assert len(data) == start + records.nbytes
        stored = json.loads((bundle / "recipe.json").read_text())["files"][path.name]
        assert stored["crc32"] == [zlib.crc32(record) for record in records]
        assert stored["sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(p.name for p in bundle.iterdir()) == [
        "config.json",
        "dense.safetensors",
        *(f"experts-{i:02d}.safetensors" for i in range(4)),
        "recipe.json",
    ]
    recipe = json.loads((bundle / "recipe.json").read_text())
    assert recipe["experts"]["0"] == ["IQ2_XXS", "IQ2_XXS", "Q2_K"]
    assert recipe["tensors"]["layers.0.attn.wkv.weight"] == "Q8_0"


def test_record_bytes_at_flash_dimensions() -> None:
    from ds4py.weights.bundle import layout_of

    flash = Path(__file__).parents[1] / "pure" / "data" / "configs" / "flash.json"
    layout = layout_of(ModelConfig.from_dict(json.loads(flash.read_text())), _DEFAULT)
    assert layout.record_bytes == 7_077_888
    assert layout.record_bytes * 256 == 1_811_939_328


_DEFAULT = ("IQ2_XXS", "IQ2_XXS", "Q2_K")

KILLED = """
import os, signal, sys
from pathlib import Path
from tests.golden.test_bundle import convert
left = int(sys.argv[3])
def progress(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), {}, progress=progress)
"""


def test_a_killed_run_goes_on(parent: Path, bundle: Path, tmp_path: Path) -> None:
    """Killed again and again: never a bundle, and at last the same one."""
    target, redone = tmp_path / "b", []
    for after in (1, 12, 9, 31, 20):
        run = subprocess.run(
            [sys.executable, "-c", KILLED, str(parent), str(target), str(after)],
            cwd=Path(__file__).parents[2],
            check=False,
        )
        assert run.returncode == -signal.SIGKILL
        with pytest.raises((InputError, WeightsError)):
            Engine.open(target)
        redone.append({p: p.stat().st_mtime_ns for p in target.glob("experts-*")})
    convert(parent, target, {})
    for path in bundle.iterdir():
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in target.iterdir()} == {p.name for p in bundle.iterdir()}
    for earlier in redone:  # nothing finished was made again
        for path, time in earlier.items():
            assert path.stat().st_mtime_ns == time


def test_a_target_is_never_overwritten(parent: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already holds a bundle"):
        convert(parent, bundle, {})
    stopped = tmp_path / "b"

    def stop(*_: object) -> None:
        if list(stopped.glob("experts-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(parent, stopped, {}, progress=stop)
    with pytest.raises(InputError, match="part of another conversion"):
        convert(parent, stopped, {"formats": {"shared": "Q4_K"}})


def test_full_disk_is_told_before(parent: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match=r"needs .* GB more"):
        convert(parent, tmp_path / "b", {})
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda b: (b / "experts-01.safetensors").unlink(), r"experts-01.*No such file"),
        (lambda b: _cut(b / "experts-02.safetensors"), r"experts-02.*incomplete"),
        (lambda b: _cut(b / "dense.safetensors"), r"dense.*incomplete"),
        (lambda b: (b / "recipe.json").write_text("{}"), r"recipe\.json is no readable"),
        (lambda b: _recipe(b, version=9), r"version 9"),
        (lambda b: _recipe(b, experts={}), r"no formats for layer 0"),
        (lambda b: _recipe(b, experts={str(i): ["Q4_K"] * 3 for i in range(4)}), r"calls for U8"),
        (lambda b: _recipe(b, tensors={}), r"dtype U8"),
    ],
)
def test_faults_are_named(bundle: Path, tmp_path: Path, damage: Any, named: str) -> None:
    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    damage(broken)
    with pytest.raises(WeightsError, match=named) as caught:
        Engine.open(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["dense", "experts-01"])
def test_scales_that_are_no_numbers(bundle: Path, tmp_path: Path, file: str) -> None:
    """NaN as the float16 scale of the first block of a matrix, and of expert 2's gate map."""
    broken = tmp_path / "b"
    shutil.copytree(bundle, broken)
    path = broken / f"{file}.safetensors"
    name = "head.weight" if file == "dense" else "experts"
    entry = read_header(path)[name]
    at = entry.offset + (0 if file == "dense" else 2 * entry.shape[1])
    data = bytearray(path.read_bytes())
    data[at : at + 2] = b"\x00\x7e"
    path.write_bytes(data)
    told = "head.weight" if file == "dense" else "IQ2_XXS map of expert 2"
    with pytest.raises(WeightsError, match=rf"{file}.*{told} .*NaN or infinite; .* damaged"):
        Engine.open(broken)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _recipe(folder: Path, **changes: Any) -> None:
    path = folder / "recipe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_importance_is_the_smoothed_mean_square_of_inputs(parent: Path, tmp_path: Path) -> None:
    engine = Engine.open(parent, EXACT)
    ids = [int(t) for t in np.random.default_rng(0).integers(0, engine.config.vocab_size, 50)]
    found = imatrix.collect(engine, [ids[:30], ids[30:]])
    assert engine.experts.observe is None
    inputs: dict[int, list[np.ndarray]] = {}
    layer = 2

    def watch(at: int, experts: Any, x: Any, h: Any) -> None:
        for expert, row in zip(experts, x, strict=True):
            if at == layer:
                inputs.setdefault(int(expert), []).append(row)

    engine.experts.observe = watch
    engine.session().sync(ids[:30])
    engine.session().sync(ids[30:])
    for expert, rows in inputs.items():
        expected = np.mean(np.square(rows), axis=0)
        expected += expected.mean()
        name = f"layers.{layer}.ffn.experts.{expert}.w1.weight"
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)
    imatrix.save(tmp_path / "i.safetensors", found)
    again = imatrix.load(tmp_path / "i.safetensors")
    assert set(again) == set(found)
    np.testing.assert_array_equal(again[name], found[name])


def test_a_draft_layer_has_importance_too(parent: Path) -> None:
    engine = Engine.open(parent, EXACT)
    found = imatrix.collect(engine, [list(range(20)), [1]])
    assert "mtp.0.ffn.experts.0.w2.weight" in found
    assert len(found) == 3 * 4 * engine.config.n_routed_experts


def test_importance_changes_the_bundle(parent: Path, bundle: Path, tmp_path: Path) -> None:
    engine = Engine.open(parent, EXACT)
    ids = [int(t) for t in np.random.default_rng(0).integers(0, engine.config.vocab_size, 50)]
    importance = imatrix.collect(engine, [ids])
    convert(parent, tmp_path / "b", {}, importance=importance)
    name = "experts-01.safetensors"
    assert (tmp_path / "b" / name).read_bytes() != (bundle / name).read_bytes()
    ids = ids[:9]  # a snapshot belongs to one quantisation of a model
    session = Engine.open(bundle).session()
    session.sync(ids)
    session.save(tmp_path / "s")
    assert Engine.open(bundle).restore(tmp_path / "s").tokens == ids
    with pytest.raises(InputError, match="another model"):
        Engine.open(tmp_path / "b").restore(tmp_path / "s")
