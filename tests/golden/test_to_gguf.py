"""Checkpoint -> GGUF -> engine: what is written is what the encoders make, and it opens."""

import shutil
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import tokenizers

from ds4py import Engine, EngineOptions, assets
from ds4py.errors import InputError, TokenizerError, WeightsError
from ds4py.formats import gguf
from ds4py.quant.convert import Converter
from ds4py.quant.encode import encode
from ds4py.quant.recipe import Recipe
from ds4py.quant.to_gguf import Exporter
from ds4py.weights.files import ModelFiles
from tests.golden import sets
from tests.golden.gguf_files import MIXED, PRESET, Q2, build
from tools.golden.presets import config, draw

TINY = assets.path("models", "tiny-parent")
EXACT = EngineOptions(dtype="float32", trained_rounding=False)
QUICK = {"formats": {"routed.gate": "MXFP4", "routed.up": "MXFP4", "routed.down": "Q8_0"}}


def exporter(source: Path, target: Path, recipe: dict[str, Any] | None = None, **rest: Any) -> Any:
    files = ModelFiles.at(source)
    return Exporter(files, target, Recipe.from_dict(recipe or {}, len(files.config.layers)), **rest)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    steps: list[tuple[str, int, int]] = []
    exporter(TINY, path, QUICK, progress=lambda *step: steps.append(step)).run()
    assert steps[-1][:2] == ("quantize", steps[-1][2])
    return path


def test_the_embedded_model_goes_there_and_back(tiny: Path) -> None:
    engine, source = Engine.open(tiny, EXACT), Engine.open(TINY, EXACT)
    assert engine.tokenizer is not None and source.tokenizer is not None
    ids = source.tokenizer.encode("Anna had a small dog. The dog liked the garden.")
    assert engine.tokenizer.encode("Anna had a small dog. The dog liked the garden.") == ids
    ours, theirs = (e.score(ids) for e in (engine, source))
    agree = (ours.argmax(1) == theirs.argmax(1)).mean()
    assert agree > 0.9 and np.abs(ours - theirs).mean() < 0.1
    assert engine.score_mtp(ids).shape == (len(ids) - 1, ours.shape[1])


def test_the_package_reads_it(tiny: Path) -> None:
    reader = package.GGUFReader(tiny)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert reader.fields["general.architecture"].contents() == "deepseek4"
    assert reader.fields["deepseek4.block_count"].contents() == len(
        ModelFiles.at(TINY).config.layers
    )
    source = ModelFiles.at(TINY).source()
    matrix = source.matrix("layers.1.attn.wq_a")
    assert found["blk.1.attn_q_a.weight"].data.tobytes() == encode("Q8_0", matrix).tobytes()
    down = found["blk.1.ffn_down_exps.weight"]
    expert = source.matrix("layers.1.ffn.experts.3.w2")
    assert down.tensor_type.name == "Q8_0"
    assert down.data[3].tobytes() == encode("Q8_0", expert).tobytes()
    experts = found["blk.1.ffn_up_exps.weight"]  # DeepSeek's FP4 is MXFP4: nothing is lost
    values = package.dequantize(experts.data[5], experts.tensor_type)
    np.testing.assert_array_equal(values, source.matrix("layers.1.ffn.experts.5.w3"))


def test_blocks_of_the_wanted_format_are_copied(tmp_path: Path) -> None:
    """GGUF to GGUF: the default recipe is what the source has already."""
    source = build(tmp_path / "source", Q2)
    exporter(source.path, tmp_path / "b.gguf").run()
    old, new = gguf.read(source.path), gguf.read(tmp_path / "b.gguf")
    assert {n: (t.type, t.dims) for n, t in old.tensors.items()} == {
        n: (t.type, t.dims) for n, t in new.tensors.items()
    }
    for name, tensor in old.tensors.items():
        assert tensor.read().tobytes() == new.tensors[name].read().tobytes()
    tokens = "tokenizer.ggml.tokens"
    assert old.metadata[tokens] == new.metadata[tokens]
    assert Engine.open(tmp_path / "b.gguf", EXACT).tokenizer is not None


@pytest.mark.parametrize("types", [Q2, MIXED], ids=["q2", "mixed"])
def test_a_bundle_of_the_same_blocks(tmp_path: Path, types: tuple[tuple[str, str], ...]) -> None:
    """GGUF to bundle, everything kept: the same logits, and a tokenizer that says the same."""
    source = build(tmp_path / "source", types)
    kinds = ("routed.gate", "routed.up", "routed.down", "shared", "attention", "head", "draft")
    plan = Recipe.from_dict({"formats": dict.fromkeys(kinds, "keep")}, len(PRESET.ratios))
    Converter(ModelFiles.at(source.path).source(), tmp_path / "bundle", plan).run()
    old, new = Engine.open(source.path, EXACT), Engine.open(tmp_path / "bundle", EXACT)
    np.testing.assert_array_equal(new.score(source.ids), old.score(source.ids))
    np.testing.assert_array_equal(new.score_mtp(source.ids), old.score_mtp(source.ids))
    assert old.tokenizer is not None and new.tokenizer is not None
    text = "ab <think> 日本 123\n"
    assert new.tokenizer.encode(text) == old.tokenizer.encode(text)
    assert (new.tokenizer.bos_id, new.tokenizer.eos_id) == (0, 1)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "bundle" / "tokenizer.json"))
    assert library.encode("<｜User｜>ab").ids == [
        old.tokenizer.control_id("<｜User｜>"),
        *(old.tokenizer.encode("ab")),
    ]


def test_the_embedded_model_from_a_gguf_file_to_a_bundle(tiny: Path, tmp_path: Path) -> None:
    files = ModelFiles.at(tiny)
    Converter(
        files.source(), tmp_path / "b", Recipe.from_dict(QUICK, len(files.config.layers))
    ).run()
    text = "Anna had a small dog."
    tokenizer = Engine.open(tmp_path / "b").tokenizer
    original = ModelFiles.at(TINY).tokenizer()
    assert tokenizer is not None and original is not None
    assert tokenizer.encode(text) == original.encode(text)


def test_a_bundle_is_a_source_too(tmp_path: Path) -> None:
    """To a GGUF file and to another bundle: blocks that fit are copied, the rest is coded anew."""
    first = tmp_path / "first"
    Converter(ModelFiles.at(TINY).parts(), first, Recipe.from_dict(QUICK, 4)).run()
    exporter(first, tmp_path / "m.gguf", QUICK).run()
    again = ModelFiles.at(first)
    Converter(again.parts(), tmp_path / "second", Recipe.from_dict(QUICK, 4)).run()
    for file in ("dense.safetensors", "experts-01.safetensors", "experts-04.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (first / file).read_bytes()
    mine, theirs = again.parts(), ModelFiles.at(tmp_path / "m.gguf").source()
    for name in ("layers.1.ffn.experts.3.w2", "mtp.0.ffn.experts.15.w1", "layers.2.attn.wq_a"):
        np.testing.assert_array_equal(mine.matrix(name), theirs.matrix(name))
    recipe = QUICK | {"rules": [{"class": "routed", "layers": [2], "format": "Q4_K"}]}
    Converter(again.parts(), tmp_path / "third", Recipe.from_dict(recipe, 4)).run()
    ids = list(range(5, 40))
    coarse, fine = (Engine.open(p, EXACT).score(ids) for p in (tmp_path / "third", first))
    assert 0 < np.abs(coarse - fine).mean() < 0.2 * fine.std()


def test_importance_reaches_the_encoder(tmp_path: Path) -> None:
    name = "layers.2.ffn.experts.1.w2.weight"
    c = ModelFiles.at(TINY).config
    weights = np.random.default_rng(0).random(c.moe_intermediate_size).astype(np.float32) ** 4
    recipe = QUICK | {"rules": [{"class": "routed.down", "layers": [2], "format": "Q4_K"}]}
    exporter(TINY, tmp_path / "m.gguf", recipe, importance={name: weights}).run()
    tensor = gguf.read(tmp_path / "m.gguf").tensors["blk.2.ffn_down_exps.weight"]
    assert tensor.type == "Q4_K"
    matrix = ModelFiles.at(TINY).source().matrix(name.removesuffix(".weight"))
    n_bytes = tensor.n_bytes // c.n_routed_experts
    found = tensor.read(n_bytes, n_bytes).tobytes()
    assert found == encode("Q4_K", matrix, weights).tobytes() != encode("Q4_K", matrix).tobytes()


def test_a_killed_run_goes_on(tiny: Path, tmp_path: Path) -> None:
    target, calls = tmp_path / "m.gguf", 0

    class Killed(Exception):
        pass

    def kill(*step: object) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 40, 200):
            raise Killed

    for _ in range(3):
        with pytest.raises(Killed):
            exporter(TINY, target, QUICK, progress=kill).run()
        assert not target.exists()
    exporter(TINY, target, QUICK, progress=kill).run()
    redone = calls - len(ModelFiles.at(TINY).source().entries)
    assert target.read_bytes()[-4096:] == tiny.read_bytes()[-4096:]
    assert gguf.read(target).tensors.keys() == gguf.read(tiny).tensors.keys()
    for name, tensor in gguf.read(target).tensors.items():
        assert tensor.read().tobytes() == gguf.read(tiny).tensors[name].read().tobytes()
    assert redone < 60 and [*tmp_path.iterdir()] == [target]
    with pytest.raises(InputError, match="already exists"):
        exporter(TINY, target, QUICK).run()


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({"formats": {"routed.up": "Q4_K"}}, "gate_exps.weight would be IQ2_XXS and .* Q4_K"),
        ({"formats": {"routed.down": "keep"}}, "ffn_down_exps.weight cannot be keep"),
        ({"formats": {"router": "Q8_0"}}, "ffn_gate_inp.weight cannot be Q8_0 .*; choose keep"),
        ({"formats": {"attention": "IQ2_XXS"}}, "attn_q_a.weight cannot be IQ2_XXS"),
        ({"formats": {"attention": "Q4_K"}}, "cannot be Q4_K, whose blocks hold 256 values"),
    ],
)
def test_recipes_that_have_no_place(tmp_path: Path, recipe: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        exporter(TINY, tmp_path / "m.gguf", recipe)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; make it first"):
        exporter(TINY, tmp_path / "none" / "m.gguf").run()


def test_a_model_without_a_tokenizer_and_values_beyond_float16(tmp_path: Path) -> None:
    c = config(PRESET) | {"vocab_size": 2050}
    stored = {name: sets.plain(values) for name, values in draw(c, 1)}
    stored["embed.weight"] = sets.plain(np.full((2050, PRESET.hidden), 1e5, np.float32))
    source = sets.write(tmp_path / "source", c, stored)
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        exporter(source, tmp_path / "m.gguf", QUICK).run()
    shutil.copy(TINY / "tokenizer.model", source)
    with pytest.raises(WeightsError, match=r"embed\.weight has values up to 100000"):
        exporter(source, tmp_path / "m.gguf", QUICK).run()
    assert not (tmp_path / "m.gguf").exists()
