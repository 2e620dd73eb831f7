"""A model in a GGUF file gives the logits of the float32 values its blocks stand for, exactly."""

import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ds4py import Engine, EngineOptions
from ds4py.cli import inspect
from ds4py.cli.settings import ModelChoice
from ds4py.errors import ConfigError, InputError, WeightsError
from ds4py.formats import gguf
from ds4py.formats.gguf_write import NewTensor, write
from ds4py.text.messages import Segment
from ds4py.weights.checkpoint import Checkpoint
from ds4py.weights.gguf import GGUFCheckpoint
from ds4py.weights.gguf_config import config_of
from tests.golden.gguf_files import MIXED, PLAIN, PRESET, Q2, Q4, Built, build

EXACT = EngineOptions(dtype="float32", trained_rounding=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("gguf"), Q2)


@pytest.mark.parametrize(
    ("types", "by_package"),
    [(Q2, False), (Q2, True), (Q4, False), (MIXED, False), (PLAIN, False)],
    ids=["q2", "q2 by the gguf package", "q4", "mixed", "plain"],
)
def test_logits(tmp_path: Path, types: tuple[tuple[str, str], ...], by_package: bool) -> None:
    model = build(tmp_path, types, by_package=by_package)
    packed, wide = Engine.open(model.path, EXACT), Engine.open(model.values, EXACT)
    logits = packed.score(model.ids)
    assert np.isfinite(logits).all() and logits.std() > 0.5
    np.testing.assert_array_equal(logits, wide.score(model.ids))
    np.testing.assert_array_equal(packed.score_mtp(model.ids), wide.score_mtp(model.ids))


def test_experts_stay_packed(built: Built) -> None:
    """In memory they are the file's blocks, in records of whole pages."""
    file = gguf.read(built.path)
    source = GGUFCheckpoint(file, config_of(file))
    for layer in (2, 4):  # the second is the draft layer
        packed = source.packed(layer)
        assert packed is not None and packed.formats == ("IQ2_XXS", "IQ2_XXS", "Q2_K")
        assert packed.records.shape == (6, 65536)  # 2 x 16896 and 21504 bytes, padded
        prefix = "layers.2" if layer == 2 else "mtp.0"
        for part, where in zip(("w1", "w3", "w2"), packed.layout.slices(), strict=True):
            blocks = source.entries[f"{prefix}.ffn.experts.5.{part}.weight"].read()
            np.testing.assert_array_equal(packed.records[5, where], blocks.ravel())


def test_every_tensor_is_the_value_it_stands_for(tmp_path: Path) -> None:
    model = build(tmp_path, MIXED)
    file = gguf.read(model.path)
    source = GGUFCheckpoint(file, config_of(file))
    values = Checkpoint(model.values, source.config)
    assert set(source.entries) == set(values.entries)
    for name, entry in values.entries.items():
        assert source.entries[name].shape == entry.shape
        read = "integers" if name.endswith("tid2eid") else "floats"
        np.testing.assert_array_equal(getattr(source, read)(name), getattr(values, read)(name))


def test_the_engine_around_it(built: Built, tmp_path: Path) -> None:
    """Name, tokenizer, progress, and sessions that know their model."""
    steps: list[tuple[str, int, int]] = []
    engine = Engine.open(built.path, EXACT, lambda *step: steps.append(step))
    assert engine.name == "model.gguf" and engine.config.max_position_embeddings == 1048576
    assert steps[-1][1] == steps[-1][2] and all(a[1] < b[1] for a, b in pairwise(steps))
    count = len(steps)
    engine.score_mtp(built.ids[:9])  # loads the draft layer, which is not counted
    assert len(steps) == count
    assert engine.tokenizer is not None and engine.tokenizer.vocab_size == PRESET.vocab
    ids = engine.tokenizer.encode([Segment("<｜User｜>", control=True), Segment("ab <think>")])
    assert engine.tokenizer.decode(ids) == "<｜User｜>ab <think>" and ids[0] == 2
    session = engine.session()
    session.sync(built.ids)
    session.save(tmp_path / "session")
    again = Engine.open(built.path, EXACT).restore(tmp_path / "session")
    assert again.tokens == built.ids
    other = build(tmp_path / "other", Q4)
    with pytest.raises(InputError, match="another model"):
        Engine.open(other.path, EXACT).restore(tmp_path / "session")


def test_inspect_tells_what_it_is(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.run(ModelChoice(str(built.path), None), None, None) == 0
    said = capsys.readouterr().out
    experts = next(line for line in said.splitlines() if line.startswith("routed experts"))
    # 4 layers of 6 experts of 3 matrices of 256 x 256
    assert experts.split()[2:4] == ["72", "4.7"] and experts.endswith("IQ2_XXS, Q2_K")
    assert "2 of 6 and 1 shared" in said and "1 multi-token prediction layer" in said


def test_the_only_file_of_a_directory(built: Built, tmp_path: Path) -> None:
    """As a pull leaves it."""
    shutil.copy(built.path, tmp_path / "a.gguf")
    assert Engine.open(tmp_path, EXACT).name == tmp_path.name
    shutil.copy(built.path, tmp_path / "b.gguf")
    with pytest.raises(WeightsError, match=r"holds 2 GGUF files; name .*a\.gguf"):
        Engine.open(tmp_path, EXACT)
    (tmp_path / "a.gguf").unlink()
    (tmp_path / "b.gguf").unlink()
    with pytest.raises(ConfigError, match=r"needs DeepSeek's config\.json"):
        Engine.open(tmp_path)


def test_a_draft_layer_in_a_file_of_its_own(built: Built, tmp_path: Path) -> None:
    main = build(tmp_path, Q2, draft=False)
    engine = Engine.open(main.path, EXACT)
    with pytest.raises(WeightsError, match="no MTP weights"):
        engine.score_mtp(main.ids)
    file, whole = gguf.read(main.path), gguf.read(built.path)
    drafts = {name: t for name, t in whole.tensors.items() if name.startswith("mtp.")}
    with pytest.raises(WeightsError, match=r"has no blk\.\* tensor"):
        config_of(replace(whole, tensors=drafts))
    source = GGUFCheckpoint(file, config_of(file), draft=replace(whole, tensors=drafts))
    both = GGUFCheckpoint(whole, config_of(whole))
    assert source.has_draft and source.total_bytes == both.total_bytes
    for name in ("mtp.0.e_proj", "mtp.0.ffn.experts.5.w2"):
        np.testing.assert_array_equal(source.matrix(name), both.matrix(name))


def test_a_draft_file_beside_the_model_is_found(built: Built, tmp_path: Path) -> None:
    main = build(tmp_path, Q2, draft=False)
    whole = gguf.read(built.path)
    tensors = [
        NewTensor(t.name, t.type, t.dims, lambda t=t: iter([t.read()]))
        for t in whole.tensors.values()
        if t.name.startswith("mtp.")
    ]
    beside = tmp_path / "Random-MTP-Q4K.gguf"
    write(beside, {"general.architecture": whole.metadata["general.architecture"]}, tensors, "")
    expected = Engine.open(built.path, EXACT).score_mtp(built.ids)
    for place in (main.path, tmp_path):
        np.testing.assert_array_equal(Engine.open(place, EXACT).score_mtp(built.ids), expected)
    shutil.copy(beside, tmp_path / "other-mtp.gguf")
    with pytest.raises(WeightsError, match=r"both lie beside .*model\.gguf"):
        Engine.open(main.path, EXACT)
    shutil.copy(built.path, tmp_path / "other-mtp.gguf")
    beside.unlink()
    with pytest.raises(WeightsError, match="stands in both"):
        Engine.open(main.path, EXACT)


@pytest.mark.parametrize(
    ("name", "at", "data", "says"),
    [
        ("blk.1.attn_q_a.weight", 34 * 9, np.array([np.nan], np.float16), r"\(layers\.1\.attn\.wq"),
        ("blk.2.ffn_up_exps.weight", 66 * 256 * 4, np.array([np.inf], np.float16), r"experts\.4\."),
        ("blk.0.attn_sinks.weight", 4, np.array([-np.inf], np.float32), "NaN or infinite"),
        ("token_embd.weight", 600, np.array([np.nan], np.float16), "NaN or infinite"),
        ("blk.2.ffn_gate_tid2eid.weight", 8, np.array([6], np.int32), "ids from 0 to 6; need"),
        ("blk.2.ffn_gate_tid2eid.weight", 8, np.array([-1], np.int32), "ids from -1 to 5; need"),
    ],
)
def test_damaged_values_are_named(
    built: Built, tmp_path: Path, name: str, at: int, data: np.ndarray, says: str
) -> None:
    path = tmp_path / "m.gguf"
    content = bytearray(built.path.read_bytes())
    start = gguf.read(built.path).tensors[name].offset + at
    content[start : start + data.nbytes] = data.tobytes()
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=says) as caught:
        Engine.open(path, EXACT)
    assert name in str(caught.value) and "m.gguf" in str(caught.value)


def test_a_scale_that_is_no_number_in_mxfp4(tmp_path: Path) -> None:
    model = build(tmp_path, MIXED)
    content = bytearray(model.path.read_bytes())
    content[gguf.read(model.path).tensors["blk.1.ffn_up_exps.weight"].offset + 17 * 5] = 255
    model.path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"blk\.1\.ffn_up_exps\.weight .*experts\.0\.w3.*NaN"):
        Engine.open(model.path, EXACT)


def test_a_download_that_stopped(built: Built, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(built.path.read_bytes()[:-4096])
    with pytest.raises(WeightsError, match="the download looks incomplete"):
        Engine.open(path)
    path.write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="is not a GGUF file"):
        Engine.open(path)
