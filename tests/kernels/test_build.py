"""Kernel texts are read, handed to MLX and counted as they should be, without a GPU."""

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


def test_a_replay_launches_the_same_with_other_arrays() -> None:
    """Two launches, the second of which reads what the first made."""
    recorder = Recorder()
    launcher = Launcher(recorder, read=scale)
    factor, shape, template = mx.array([2.0]), (20,), (("T", FLOAT), ("N", 20))
    ran: list[Any] = []

    def run(values: Any) -> Any:
        def both(on: Launcher) -> None:
            ran.append(values)
            outputs = [(shape, FLOAT)]
            (once,) = on.launch("scale", [values, factor], template, SHAPE, SHAPE, outputs)
            on.launch("scale", [once, factor], template, SHAPE, SHAPE, outputs)

        return launcher.replay("twice", [values], both)

    first, second = mx.ones(shape), mx.zeros(shape)
    (made,) = run(first)
    (again,) = run(second)
    assert len(ran) == 1 and launcher.counters == {"scale": 4} and made is not again
    inputs = [call["inputs"] for call in recorder.calls]
    assert inputs[0][0] is first and inputs[2][0] is second
    assert all(x[1] is factor for x in inputs)
    assert inputs[3][0] is not inputs[1][0], "the second launch reads its own first"
    of = {"inputs": 0, "template": 0}
    assert [{**c, **of} for c in recorder.calls[:2]] == [{**c, **of} for c in recorder.calls[2:]]
    assert [names["name"] for names in recorder.built] == ["scale", "scale_0"]
    fixed = "typedef float T;\nconstant constexpr int N = 20;\n"
    assert recorder.built[1]["header"] == recorder.built[0]["header"] + fixed
    assert "template" not in recorder.calls[2]
    for _ in range(2):
        launcher.replay(None, [first], lambda on: (ran.append(1), launch(on)))
    assert len(ran) == 3, "without a key nothing is kept"


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
