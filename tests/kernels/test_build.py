"""Kernel texts are read, handed to MLX and counted as they should be, without a GPU."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from ds4py.errors import KernelError, OptionsError
from ds4py.kernels import build
from ds4py.kernels.build import Launcher, parse_kernel

SCALE = """// inputs: values factor
// outputs: scaled
#include "outer.h"
#include "inner.h"
template <typename T> T times(T a, float b) { return T(inner(a) * b); }

// body
uint i = thread_position_in_grid.x;
if (i < N) scaled[i] = times<T>(values[i], factor[0]);
"""
INCLUDES = {
    "inner.h": "inline float inner(float x) { return x; }\n",
    "outer.h": '#include "inner.h"\n// outer\n',
}
SHAPE, FLOAT = (32, 1, 1), mx.float32


def scale(name: str = "scale") -> build.KernelText:
    return parse_kernel(name, SCALE, INCLUDES.__getitem__)


def test_a_file_becomes_names_header_and_body() -> None:
    text = scale()
    assert (text.inputs, text.outputs) == (("values", "factor"), ("scaled",))
    assert text.header.startswith("inline float inner(float x) { return x; }\n// outer\ntemplate <")
    assert text.header.count("inner(float") == 1, "a file is included once"
    assert text.header.endswith("b); }\n\n")
    assert text.body == SCALE.partition("// body\n")[2]


@pytest.mark.parametrize("missing", ["// inputs: ", "// outputs: scaled", "// body\n"])
def test_a_file_without_its_marks_is_an_error(missing: str) -> None:
    with pytest.raises(KernelError, match=r"metal/scale\.metal must begin with"):
        parse_kernel("scale", SCALE.replace(missing, ""), INCLUDES.__getitem__)


def test_a_missing_kernel_names_its_file() -> None:
    with pytest.raises(KernelError, match=r"no_such_kernel\.metal"):
        Launcher().launch("no_such_kernel", [], [], SHAPE, SHAPE, [])


def test_a_text_is_handed_over_without_its_comments() -> None:
    written = "  // why\n#define A(x) \\\n    (x / 2)  // half\n\nfloat a = A(4.0f);\n"
    assert build.stripped(written) == "#define A(x) \\\n(x / 2)\nfloat a = A(4.0f);\n"
    recorder = Recorder()
    launch(Launcher(recorder, read=scale))
    launch(Launcher(recorder, read=scale, strip=False))
    headers = [names["header"] for names in recorder.built]
    assert "// outer" not in headers[0] and "// outer" in headers[1]


def launch(launcher: Launcher, n: int = 20, dtype: Any = FLOAT) -> Any:
    values, factor = mx.ones((n,), dtype), mx.array([2.0])
    template = (("T", dtype), ("N", n))
    return launcher.launch("scale", [values, factor], template, SHAPE, SHAPE, [((n,), dtype)])


class Recorder:
    """In place of `mx.fast.metal_kernel`."""

    def __init__(self, fails: Callable[[], None] = lambda: None):
        self.built: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.fails = fails

    def __call__(self, **names: Any) -> Callable[..., list[Any]]:
        self.built.append(names)

        def call(**arguments: Any) -> list[Any]:
            self.calls.append(arguments)
            self.fails()
            return [mx.zeros(shape) for shape in arguments["output_shapes"]]

        return call


def test_a_kernel_is_built_once_and_its_launches_are_counted() -> None:
    recorder = Recorder()
    launcher = Launcher(recorder, read=scale)
    for n in (20, 20, 30):
        launch(launcher, n)
    assert [b["name"] for b in recorder.built] == ["scale"]
    assert recorder.built[0]["ensure_row_contiguous"] is False
    assert [c["output_shapes"] for c in recorder.calls] == [[(20,)], [(20,)], [(30,)]]
    assert launcher.counters == {"scale": 3}


def times(**names: Any) -> Callable[..., list[mx.array]]:
    """In place of `mx.fast.metal_kernel`: what the kernel above computes, by MLX's operations."""
    return lambda **call: [call["inputs"][0] * call["inputs"][1]]


def test_a_piece_runs_twice_and_is_replayed_for_other_arrays() -> None:
    """Two launches, the second of which reads what the first made. A piece may get and return
    tuples and None."""
    launcher, factor, ran = Launcher(times, read=scale, lazy=True), mx.array([2.0]), []

    def run(pair: tuple[mx.array, mx.array], nothing: None) -> Any:
        ran.append(pair)
        outputs, template = [((20,), FLOAT)], (("T", FLOAT), ("N", 20))
        (once,) = launcher.launch("scale", [pair[0], factor], template, SHAPE, SHAPE, outputs)
        (twice,) = launcher.launch("scale", [once, pair[1]], template, SHAPE, SHAPE, outputs)
        return once, nothing, twice

    for n in range(1, 5):
        values = mx.full((20,), n), mx.full((20,), 10.0)
        once, nothing, twice = launcher.replay("piece", [values, None], run)
        assert nothing is None and once[3].item() == 2 * n and twice[3].item() == 20 * n
        assert launcher.counters == {"scale": 2 * n} and len(ran) == min(n, 2)
    longer = mx.ones((40,)), mx.ones((1,))
    assert launcher.replay("piece", [longer, None], run)[2].shape == (40,) and len(ran) == 3
    for key in ("other", None, None):
        launcher.replay(key, [values, None], run)
    assert len(ran) == 6 and launcher.counters == {"scale": 16}, "without a key nothing is kept"


def test_where_launches_compute_nothing_is_recorded() -> None:
    launcher, ran = Launcher(times, read=scale), list[int]()
    for n in range(3):
        launcher.replay("piece", [], lambda n=n: ran.append(n) or [])
    assert ran == [0, 1, 2]


def test_the_pieces_used_longest_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "MOST_PIECES", 2)
    launcher, ran, values = Launcher(times, read=scale, lazy=True), list[str](), mx.ones((20,))

    def use(key: str) -> None:
        launcher.replay(key, [values], lambda x: (ran.append(key), [*launch(launcher)])[1])

    for key in "aabbacaab":
        use(key)
    assert "".join(ran) == "aabbcb", "c took the place of b"
    assert launcher.counters == {"scale": 9}


def test_a_recorded_piece_keeps_nothing_of_its_caller() -> None:
    """A sequence's rows, which `run` may see, are not held by what was recorded of it."""
    launcher, held = Launcher(times, read=scale, lazy=True), list[weakref.ref[Any]]()

    def use() -> None:
        caller = Recorder()  # anything
        held.append(weakref.ref(caller))
        launcher.replay("piece", [mx.ones((20,))], lambda x: [x * 2, caller][:1])

    for _ in range(3):
        use()
    assert [caller() for caller in held] == [None] * 3


def test_the_first_launch_of_every_variant_is_finished() -> None:
    """Variants differ in template, types, and whether MLX passes an input as `constant`."""
    finished: list[Any] = []
    launcher = Launcher(Recorder(), finished.append, scale)
    for n, dtype in ((20, FLOAT), (20, FLOAT), (20, mx.bfloat16), (30, FLOAT), (7, FLOAT)):
        launch(launcher, n, dtype)
    assert len(finished) == 4
    values, factor, template = mx.ones((20,)), mx.array([2.0]), (("T", FLOAT), ("N", 20))
    for inputs in ([values, factor], [values[:7], factor]):
        launcher.launch("scale", inputs, template, SHAPE, SHAPE, [((20,), FLOAT)])
    assert len(finished) == 5


def test_a_kernel_that_does_not_compile_is_named() -> None:
    def fails() -> None:
        raise RuntimeError("program_source:3: error: use of undeclared identifier 'x'")

    launcher = Launcher(Recorder(fails), lambda made: None, scale)
    with pytest.raises(KernelError) as caught:
        launch(launcher)
    for part in (
        "kernel scale",
        build.MLX_VERSION,
        "macOS",
        "--kernels reference",
        "identifier 'x'",
    ):
        assert part in str(caught.value)


def test_mlx_takes_the_text_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Traced, not run: MLX prints the source it would compile."""
    seen: list[int] = []

    def make(**names: Any) -> Callable[..., list[Any]]:
        kernel = mx.fast.metal_kernel(**names)
        return lambda **call: kernel(verbose=True, **call)

    def step() -> Any:
        made = launch(Launcher(make, read=scale))
        seen.append(made[0].size)
        return made[0]

    mx.export_function(str(tmp_path / "step.mlxfn"), step)
    assert seen == [20]
    source = capfd.readouterr().out
    assert "inline float inner(float x)" in source and "times<T>(values[i], factor[0])" in source
    assert "const device float* values [[buffer(0)]]" in source
    assert "const constant float* factor [[buffer(1)]]" in source


@pytest.mark.skipif(build.metal_available(), reason="this machine has what the test lacks")
def test_metal_without_a_device_says_what_is_missing() -> None:
    with pytest.raises(OptionsError, match=r"no Metal device.*'reference'"):
        build.metal_launcher()
