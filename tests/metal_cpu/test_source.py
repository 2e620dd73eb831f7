"""The text we compile is the text MLX generates, byte for byte."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("ziglang")

from tools.metal_cpu import Kernel, assert_same_source
from tools.metal_cpu.arrays import numpy_dtype
from tools.metal_cpu.source import ATTRIBUTES, TYPES

NAMES = ["a", "bb", "x", "weights", "q_shape", "k2"]
DTYPES = st.sampled_from(list(TYPES)).map(numpy_dtype)
TYPE_NAMES = st.sampled_from(list(TYPES))
SHAPES = st.sampled_from([(), (1,), (7,), (8,), (2, 3), (2, 4), (1, 1, 1), (3, 5, 2)])
VALUES = st.one_of(st.booleans(), st.integers(-9, 99), TYPE_NAMES)
TEMPLATE = st.tuples(st.sampled_from(["T", "N", "B", "M1"]), VALUES)


@st.composite
def calls(draw: st.DrawFn) -> tuple[Kernel, list[np.ndarray], list, list]:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=4))
    outputs = draw(st.lists(st.sampled_from(["o", "p", "out"]), unique=True, min_size=1))
    inputs = [np.zeros(draw(SHAPES), draw(DTYPES)) for _ in names]
    suffixes = st.sampled_from(["", "_shape", "_strides", "_ndim"])
    words = draw(st.lists(st.sampled_from(list(ATTRIBUTES)), max_size=3))
    words += [n + draw(suffixes) for n in names]
    body = "\n".join(f"  // {w}" for w in draw(st.permutations(words)))
    template = draw(st.lists(TEMPLATE, max_size=3, unique_by=lambda t: t[0]))
    header = draw(st.sampled_from(["", "inline int f() { return 1; }\n", "// no newline"]))
    kernel = Kernel("k", names, outputs, body, header, atomic_outputs=draw(st.booleans()))
    return kernel, inputs, template, [draw(TYPE_NAMES) for _ in outputs]


@given(calls())
def test_the_text_is_mlx_own(call: tuple[Kernel, list[np.ndarray], list, list]) -> None:
    kernel, inputs, template, dtypes = call
    assert_same_source(kernel, inputs, template, dtypes)


def test_lines_are_traced_to_the_body_and_the_header() -> None:
    kernel = Kernel("k", ["a"], ["o"], "  uint i = 0;\n  o[i] = a[i];", "// one\n// two\n")
    text = kernel.signature([np.zeros(9, np.float32)], [("T", "float32")], ["float32"])
    lines = text.text.split("\n")
    at = next(i for i, line in enumerate(lines, 1) if "o[i]" in line)
    assert text.place(at) == "body line 2"
    assert text.place(2) == "header line 2"
    assert text.place(3) == "signature"
    assert text.line_text(at) == "o[i] = a[i];"
