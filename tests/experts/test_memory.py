"""The memory plan against what processes really take."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest

from ds4py import Engine, EngineOptions
from ds4py.config import ModelConfig
from ds4py.engine import memory
from ds4py.engine.footprint import Numerics, decoding_bytes
from ds4py.errors import OptionsError
from ds4py.experts.layout import maps_of
from ds4py.experts.section import DECODED
from ds4py.formats.bundle import LayerRecords
from ds4py.kernels.ops import MlxOps, Ops
from ds4py.weights.bundle import layout_of
from ds4py.weights.files import ModelFiles
from tests.experts.models import LEAST
from tests.golden.sets import plain, write
from tools.golden.presets import PRESETS, Preset, config, draw
from tools.make_random_bundle import make

ROOT = Path(__file__).parents[2]

MEASURE = """
import json, sys
from ds4py import Engine, EngineOptions, SamplingOptions
from ds4py.engine import memory
folder, n_prompt, n_tokens, options = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
engine = Engine.open(folder, EngineOptions(**json.loads(options)))
memory.release_free_memory()
loaded = memory.resident_bytes()
session, seen = engine.session(), []
session.sync([i * 7919 % 500 for i in range(n_prompt)])
chosen = SamplingOptions(max_tokens=n_tokens, seed=1, stop_at_eos=False)
for n, _ in enumerate(session.generate(chosen)):
    if n % max(1, n_tokens // 10) == n_tokens // 20:
        seen.append(memory.resident_bytes())
plan = engine.plan
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "loaded": loaded,
    "peak": 1024 * int(status["VmHWM"].split()[0]),
    "seen": seen,
    "budget": plan.budget,
    "streamed": plan.streamed,
    "weights": plan.runtime + plan.dense + (0 if plan.streamed else plan.experts),
    "total": plan.total,
}))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="measures with /proc")


def measure(folder: Path, n_prompt: int, n_tokens: int, **options: Any) -> dict[str, Any]:
    """What a process of its own took."""
    words = [str(folder), str(n_prompt), str(n_tokens), json.dumps(options)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def random_bundle(folder: Path, layers: int, experts: int) -> Path:
    """Records of 425,984 bytes that decode fast."""
    ratios = tuple((0, 4, 16)[i % 3] for i in range(layers))
    preset = Preset(ratios, 0, hidden=256, inner=512, experts=experts, experts_used=2)
    c = config(preset) | {"num_hash_layers": 3, "num_nextn_predict_layers": 0}
    make(folder, c | {"compress_ratios": list(ratios)}, ("Q8_0", "Q8_0", "Q8_0"))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_bundle(tmp_path_factory.mktemp("packed"), 5, 64)


@linux
def test_the_estimate_is_what_a_load_takes(packed: Path, tmp_path: Path) -> None:
    """Within 5 %: experts packed in memory, and as floats."""
    c = config(Preset((0, 4), 0, hidden=256, inner=512, experts=32, experts_used=2))
    floats = write(tmp_path, c, {n: plain(v) for n, v in dict(draw(c, 1)).items()})
    for folder in (packed, floats):
        found = measure(folder, 40, 2, context=512, prefill_chunk=64)
        assert not found["streamed"]
        assert abs(found["weights"] - found["loaded"]) <= 0.05 * found["loaded"], found
        assert found["peak"] <= 1.05 * found["total"], found


LOAD = """
import json, sys
from ds4py import Engine, EngineOptions
from ds4py.engine import memory
from ds4py.engine.footprint import Numerics, loading_bytes
from ds4py.kernels.build import Launcher
chosen = EngineOptions(kernels="metal", context=512)
engine = Engine.open(sys.argv[1], chosen, launcher=Launcher())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
memory.release_free_memory()
model, source = engine.model, engine._loader.checkpoint
numerics = Numerics(model.ops, model.dtype, model.rows, chosen.prefill_chunk, packed=True)
print(json.dumps({
    "loaded": memory.resident_bytes(),
    "peak": 1024 * int(status["VmHWM"].split()[0]),
    "weights": engine.plan.runtime + engine.plan.dense + engine.plan.experts,
    "loading": loading_bytes(source, numerics, streamed=False),
}))
"""


@linux
@pytest.mark.parametrize("embedding", [pytest.param("F32", marks=pytest.mark.long), "Q8_0"])
def test_the_estimate_of_a_load_as_it_is_stored(tmp_path: Path, embedding: str) -> None:
    """As the Metal kernels hold it, weights in the bytes of the file: within 5 %, at the peak too.
    The embedding, the largest tensor, is not decoded to be looked up in."""
    wide = Preset((0, 4), 0, hidden=1024, inner=256, experts=4, experts_used=2, vocab=32768)
    c = config(wide) | {"num_hash_layers": 0, "num_nextn_predict_layers": 0}
    formats = {"embed.weight": "Q8_0"} if embedding == "Q8_0" else {}
    make(tmp_path, c | {"compress_ratios": [0, 4]}, ("Q8_0", "Q8_0", "Q8_0"), dense=formats)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert abs(found["weights"] - found["loaded"]) <= 0.05 * found["loaded"], found
    expected = found["weights"] + found["loading"]
    assert abs(expected - found["peak"]) <= 0.05 * found["peak"], found


@pytest.mark.parametrize(
    "formats", [("IQ2_XXS", "IQ2_XXS", "Q2_K"), ("Q4_K",) * 3, ("Q8_0",) * 3, ("MXFP4",) * 3]
)
def test_experts_decoded_by_mlx_take_what_is_planned(formats: tuple[str, str, str]) -> None:
    """At the peak, for the maps that are decoded together."""
    c = ModelConfig.from_dict(config(Preset((0,), 0, hidden=512, inner=512, experts=DECODED)))
    ops, layout = MlxOps(), layout_of(c, formats)
    records = mx.zeros((DECODED, layout.record_bytes), mx.uint8)
    layer = LayerRecords(0, (), DECODED, layout, formats, None)
    numerics = Numerics(cast(Ops, ops), mx.float32, cast(Any, None), 512)
    x, ids = mx.ones((DECODED, 512)), mx.arange(DECODED)
    mx.eval(records, x, ids)
    for maps in maps_of(layer, records, c):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(ops.experts(x, ids, maps))
        took = mx.get_peak_memory() - before
        assert 0 < took <= DECODED * decoding_bytes(c, numerics)


@linux
def test_a_budget_is_kept(packed: Path) -> None:
    """Less memory than the model takes: streamed, within the budget, and flat."""
    resident = measure(packed, 300, 20, context=512, prefill_chunk=64)
    budget = f"{int(0.75 * resident['loaded'])}"
    found = measure(packed, 300, 40, memory=budget, context=512, prefill_chunk=64)
    assert found["streamed"] and found["peak"] <= 1.05 * found["budget"], found
    filled = found["seen"][5:]
    assert max(filled) <= 1.02 * min(filled), found


@linux
@pytest.mark.long
def test_flat_over_5000_tokens(tmp_path: Path) -> None:
    """At a quarter of the model for 5,000 tokens, at a half and three quarters for fewer."""
    folder = random_bundle(tmp_path, 8, 256)
    model = sum(file.stat().st_size for file in folder.iterdir())
    for share, n_tokens in ((0.25, 5000), (0.5, 500), (0.75, 500)):
        budget = str(int(share * model))
        found = measure(folder, 300, n_tokens, memory=budget, context=5632, prefill_chunk=128)
        assert found["streamed"] and found["peak"] <= 1.05 * found["budget"], found
        if n_tokens == 5000:  # in the shorter runs the slots are still being filled
            assert max(found["seen"][2:]) <= 1.05 * min(found["seen"][2:]), found


def plan(bundle: Path, **wishes: Any) -> memory.MemoryPlan:
    numerics, _ = memory.plan_files(ModelFiles.at(bundle), 512, "1GB")
    source = ModelFiles.at(bundle).source()
    records = source.records()
    wishes = {"context": 512, "runtime": 50_000_000} | wishes
    return memory.plan_memory(source, numerics, records, **wishes)


def test_a_plan_adds_up(bundle: Path) -> None:
    """Resident where everything fits, then fewer and fewer slots, then a refusal in numbers."""
    everything = plan(bundle, memory="1GB")
    assert not everything.streamed and everything.spare > 0
    packed = everything.fixed + everything.all_experts
    assert everything.total == packed + everything.decoded
    assert plan(bundle, memory=str(packed + 1000)).decoded == 500
    tight = plan(bundle, memory=str(packed - 1))
    assert tight.streamed and tight.spare >= 0 and tight.decoded == 0
    least = tight.fixed + (LEAST + 12) * 32768
    smallest = plan(bundle, memory=str(least))
    assert sum(part.n_cached for part in smallest.slots) == LEAST
    with pytest.raises(OptionsError, match=r"too little: 50\.0 MB for the program, .* for 3 exp"):
        plan(bundle, memory=str(least - 1))
    with pytest.raises(OptionsError, match="without --experts resident"):
        plan(bundle, memory=str(packed - 1), experts="resident")


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    c = config(PRESETS["fast-small"])
    folder = write(tmp_path, c, {n: plain(v) for n, v in dict(draw(c, 1)).items()})
    with pytest.raises(OptionsError, match="ds4 quantize"):
        Engine.open(folder, EngineOptions(experts="streamed", context=512))
    with pytest.raises(OptionsError, match="ds4 quantize"):
        Engine.open(folder, EngineOptions(memory="20MB", context=512))


def test_an_unasked_context_fits_a_quarter_of_the_budget(bundle: Path) -> None:
    contexts = [plan(bundle, memory=size, context=None).context for size in ("1GB", "4GB", "64GB")]
    assert contexts == sorted(contexts) and contexts[0] >= memory.LEAST_CONTEXT
    assert contexts[0] < contexts[2] <= 1 << 20
