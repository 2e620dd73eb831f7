"""Planted bugs are caught, by kind, line and name; correct kernels are not accused."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ziglang")

from tools.metal_cpu import Kernel, ShaderError

pytestmark = pytest.mark.shader

HEAD = """uint i = thread_position_in_grid.x;
uint t = thread_position_in_threadgroup.x;
threadgroup float s[64];
"""
"""The first three lines of every body; the bug is on the fourth or the fifth."""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def run(body: str, header: str = "", n: int = 64, **how: Any) -> tuple[Kernel, np.ndarray]:
    """64 threads, one output element each; `a` has n elements and `o` 64."""
    kernel = Kernel("bug", ["a"], ["o"], HEAD + body, header)
    how = {"grid": (64, 1, 1), "threadgroup": (64, 1, 1), "mode": "check", **how}
    [out] = kernel(
        inputs=[np.arange(1, n + 1, dtype=np.float32)],
        output_shapes=[(64,)],
        output_dtypes=["float32"],
        **how,
    )
    return kernel, out


@dataclass(frozen=True)
class Bug:
    body: str
    kind: str
    line: int
    buffer: str
    threadgroup: int = 64


BUGS = {
    "device read one past the end": Bug("o[i] = a[i + 1];", "out of bounds", 4, "a"),
    "device read before the start": Bug("o[i] = a[(int)i - 1];", "out of bounds", 4, "a"),
    "device write past the end": Bug("o[i] = 1;\no[i + 1] = 1;", "out of bounds", 5, "o"),
    "threadgroup index past the end": Bug("s[t + 1] = 1; o[i] = 0;", "index out of range", 4, "s"),
    "threadgroup pointer past the end": Bug(
        "threadgroup float* p = s; o[i] = 0;\np[t + 1] = 1;", "out of bounds", 5, "s"
    ),
    "private array past the end": Bug(
        "float p[4] = {}; o[i] = 0;\nfor (uint k = 0; k < 1 + i / 12; k++) p[k] += a[i];"
        " o[i] = p[1];",
        "index out of range",
        5,
        "p",
    ),
    "no barrier": Bug("s[t] = a[i];\no[i] = s[t ^ 32];", "race", 5, "s"),
    "barrier for the wrong memory": Bug(
        "s[t] = a[i]; threadgroup_barrier(mem_flags::mem_device);\no[i] = s[t ^ 32];",
        "race",
        5,
        "s",
    ),
    "barrier for no memory": Bug(
        "s[t] = a[i]; threadgroup_barrier(mem_flags::mem_none);\no[i] = s[t ^ 32];", "race", 5, "s"
    ),
    "reliance on lockstep": Bug("s[t] = a[i];\no[i] = s[t ^ 1];", "race", 5, "s"),
    "a shuffle is no barrier for memory": Bug(
        "s[t] = a[i]; simd_sum(a[i]);\no[i] = s[t ^ 1];", "race", 5, "s"
    ),
    "simdgroup barrier across simdgroups": Bug(
        "s[t] = a[i]; simdgroup_barrier(mem_flags::mem_threadgroup);\no[i] = s[t ^ 32];",
        "race",
        5,
        "s",
    ),
    "overwritten while others read": Bug(
        f"s[t] = a[i]; {BARRIER} o[i] = s[t ^ 32];\ns[t] = 0;", "race", 5, "s"
    ),
    "two threads write one element": Bug("o[i] = 1;\no[i / 2] = 2;", "race", 5, "o"),
    "threadgroups write one element": Bug(
        "o[i] = 1;\nif (t == 0) o[0] = i;", "race between threadgroups", 5, "o", 32
    ),
    "threadgroups read what others write": Bug(
        "o[i] = a[i]; threadgroup_barrier(mem_flags::mem_device);\nif (i > 32) o[i] = o[t];",
        "race between threadgroups",
        5,
        "o",
        32,
    ),
    "plain read of an atomic": Bug(
        "device atomic_uint* c = (device atomic_uint*)o;"
        " atomic_store_explicit(&c[i], 0, memory_order_relaxed);\no[i] = o[i ^ 32] + 1;",
        "race",
        5,
        "o",
    ),
    "threadgroup memory never set": Bug(
        f"if (t > 3) s[t] = a[i];\n{BARRIER} o[i] = s[t];", "uninitialised read", 5, "s"
    ),
    "threadgroup memory of the previous group": Bug(
        f"if (i < 32) s[t] = 1;\n{BARRIER} o[i] = s[t];", "uninitialised read", 5, "s", 32
    ),
    "output read before it is written": Bug("\no[i] += a[i];", "uninitialised read", 5, "o"),
    "output partly unwritten": Bug("if (i != 9) o[i] = 1;", "output never written", 0, "o"),
    "input written": Bug("o[i] = 0;\n*(device float*)&a[i] = 1;", "write to an input", 5, "a"),
    "simd_sum in a branch": Bug(
        "o[i] = 0;\nif (i & 1) o[i] = simd_sum(a[i]);", "divergence", 5, ""
    ),
    "lanes loop a different number of times": Bug(
        "float x = 0;\nfor (uint k = 0; k <= t; k++) x += simd_max(a[i]);\no[i] = x;",
        "divergence",
        5,
        "",
    ),
    "two different operations": Bug(
        "o[i] = i & 1 ? simd_sum(a[i]) :\n simd_max(a[i]);", "divergence", 5, ""
    ),
    "barrier in a branch": Bug(f"o[i] = 0;\nif (i < 32) {BARRIER}", "divergence", 5, ""),
    "return before a barrier": Bug(
        f"o[i] = 0; if (i == 63) return;\n{BARRIER}", "divergence", 5, ""
    ),
    "over 32 KiB": Bug(
        "o[i] = 0;\nthreadgroup float big[8192]; big[t] = s[t] = 1;",
        "too much threadgroup memory",
        5,
        "big",
    ),
    "negative float to unsigned": Bug(
        "o[i] = 0;\nuint u = uint(10.0 - a[i]); o[i] = u;", "conversion out of range", 5, ""
    ),
    "division by zero": Bug("o[i] = i / (uint)(a[i] - a[i]);", "arithmetic fault", 4, ""),
    "misaligned vector": Bug(
        "\nfloat4 v = *(device const float4*)(a + t / 8); o[i] = v.x;", "misaligned access", 5, ""
    ),
    "threadgroup bytes read as a vector": Bug(
        f"threadgroup uchar raw[256]; raw[t] = raw[t + 64] = raw[t + 128] = raw[t + 192] = t;"
        f" {BARRIER}\nfloat4 v = *(threadgroup float4*)(raw + t / 4 * 16); o[i] = v.x;",
        "misaligned access",
        5,
        "",
    ),
    "misaligned word": Bug(
        "\no[i] = *(device const uint*)((device const uchar*)a + t);", "misaligned access", 5, ""
    ),
    "matrix past the end": Bug(
        "simdgroup_matrix<float, 8, 8> m; o[i] = 0;"
        "\nsimdgroup_load(m, a + 8, 8); simdgroup_store(m, s);",
        "out of bounds",
        5,
        "a",
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_caught_in_check_mode(name: str) -> None:
    bug = BUGS[name]
    with pytest.raises(ShaderError) as caught:
        run(bug.body, threadgroup=(bug.threadgroup, 1, 1))
    place = f"body line {bug.line}" if bug.line else ""
    found = [(r.kind, r.place, r.buffer) for r in caught.value.reports]
    assert (bug.kind, place, bug.buffer) in found, caught.value
    assert all(str(r).startswith(f"bug: {r.kind}: ") for r in caught.value.reports)


FAST = [
    "device read one past the end",
    "device write past the end",
    "simd_sum in a branch",
    "lanes loop a different number of times",
    "barrier in a branch",
    "return before a barrier",
    "over 32 KiB",
]


@pytest.mark.parametrize("name", FAST)
def test_some_bugs_stop_the_fast_mode_too(name: str) -> None:
    bug = BUGS[name]
    with pytest.raises(ShaderError) as caught:
        run(bug.body, mode="fast")
    [report] = caught.value.reports
    assert (report.kind, report.buffer) == (bug.kind, bug.buffer)
    assert report.place == f"body line {bug.line}"


SEEDED = [
    "no barrier",
    "reliance on lockstep",
    "overwritten while others read",
    "threadgroup memory never set",
    "output read before it is written",
    "output partly unwritten",
]


@pytest.mark.parametrize("name", SEEDED)
def test_other_bugs_show_as_results_that_depend_on_the_seed(name: str) -> None:
    results = {run(BUGS[name].body, mode="fast", seed=s)[1].tobytes() for s in range(4)}
    assert len(results) > 1


REFUSED = {
    "wrong address space": ("thread float& r = o[i];", "", "body line 4"),
    "const dropped": ("device float* p = a; o[i] = p[0];", "", "body line 4"),
    "assignment to an input": ("a[i] = 0;", "", "body line 4"),
    "double": ("double x = 1.0; o[i] = x;", "", "body line 4"),
    "unknown function": ("o[i] = simd_summ(a[i]);", "", "body line 4"),
    "too few vector parts": ("float4 v(1, 2, 3); o[i] = v.x;", "", "body line 4"),
    "implicit vector conversion": ("half4 h = 1; float4 v = h; o[i] = v.x;", "", "body line 4"),
    "implicit conversion to bfloat": ("bfloat b = a[i]; o[i] = b;", "", "body line 4"),
    "pointer without a space": ("float* p = s; o[i] = p[0];", "", "body line 4"),
    "cast without a space": ("o[i] = *(const float*)s;", "", "body line 4"),
    "parameter without a space": ("o[i] = f(s);", "int f(float* p) { return 0; }", "header line 1"),
    "ambiguous min": ("o[i] = min(i, 3);", "", "body line 4"),
    "initialised threadgroup memory": ("threadgroup int n = 0; o[i] = n;", "", "body line 4"),
    "threadgroup memory in a helper": (
        "o[i] = f();",
        "float f() {\n  threadgroup float x[1];\n  return x[0];\n}",
        "header line 2",
    ),
    "program scope without constant": ("o[i] = K;", "constexpr int K = 1;", "header line 1"),
    "variable without a value": ("float x; if (i > 9) x = 1; o[i] = x;", "", "body line 4"),
    "text that is not ASCII": ("o[i] = 1; // π", "", "ASCII"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_text_that_metal_refuses_is_refused(name: str) -> None:
    body, header, place = REFUSED[name]
    with pytest.raises(ShaderError) as caught:
        run(body, header + "\n" if header else "", mode="fast")
    assert place in str(caught.value)


ACCEPTED = {
    "products are not pointers": (
        """
        float x = a[i], y = 2; float4 v = {x * y, y, x, (x) * y}; uint n = i & t; bool b = x * y;
        if (n & t) { v.x = b ? x * y : y; } for (uint k = 0; k < n * t; k++) v[n & 3] *= y;
        thread float& r = y; thread const float* p = &r; auto q = &a[i]; device auto& d = o[i];
        d = max(v.x * y, *p * y) + *q + f<2>(a, (t & i)) + N;
        """,
        """
        constant int K = 3, L = 2; constant int N = (K * L);
        struct Pair { device const float* p; float x; };
        template <int M> float f(device const float* p, int n = K * L) { return p[n * M & K]; }
        """,
    ),
}


ACCEPTED["aligned bytes read as a vector"] = (
    f"""
    threadgroup alignas(16) uchar x[1024];
    alignas(16) threadgroup uchar y[1024];
    *(threadgroup float4*)(x + 16 * t) = float4(a[i]);
    *(threadgroup float4*)(y + 16 * t) = float4(a[i]);
    {BARRIER}
    o[i] = (*(threadgroup float4*)(x + 16 * (t ^ 32))).y + (*(threadgroup float4*)(y + 16 * t)).z;
    """,
    "",
)


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_text_that_metal_accepts_is_accepted(name: str) -> None:
    body, header = ACCEPTED[name]
    run(body, header)


def test_a_small_input_does_not_fit_a_device_helper() -> None:
    """MLX passes inputs of fewer than 8 elements in `constant` memory."""
    body, header = "o[i] = f(a);", "float f(device const float* p) { return p[0]; }\n"
    run(body, header, n=8)
    with pytest.raises(ShaderError, match="address space '__constant'"):
        run(body, header, n=7)


CONTROLS = {
    "a tree over threadgroup memory": """
        s[t] = a[i];
        for (uint step = 32; step > 0; step /= 2) {
          threadgroup_barrier(mem_flags::mem_threadgroup);
          if (t < step) s[t] += s[t + step];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[i] = s[0];
    """,
    "simdgroups and their sums": """
        uint lane = thread_index_in_simdgroup, group = simdgroup_index_in_threadgroup;
        threadgroup float4 v[2];
        float x = simd_sum(a[i]);
        if (lane == 0) v[group] = float4(x, 0, 0, x);
        s[t] = a[i];
        simdgroup_barrier(mem_flags::mem_threadgroup);
        float y = s[t ^ 5] - s[t ^ 5];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[i] = v[0].x + v[1].w + y;
    """,
    "atomics": """
        threadgroup atomic_uint n;
        if (t == 0) atomic_store_explicit(&n, 0u, memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        atomic_fetch_add_explicit(&n, uint(a[i]), memory_order_relaxed);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        o[i] = atomic_load_explicit(&n, memory_order_relaxed);
    """,
}


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CONTROLS)
def test_correct_kernels_are_not_accused(name: str, seed: int, mode: str) -> None:
    kernel, out = run(CONTROLS[name], seed=seed, mode=mode)
    np.testing.assert_array_equal(out, np.full(64, 64 * 65 / 2, np.float32))
    assert kernel.last.reports == () and kernel.last.report == ""


def test_a_stack_overflow_is_reported() -> None:
    header = """
    float deep(int n, thread float* p) {
      float x[2000];
      for (int k = 0; k < 2000; k++) x[k] = p[k % 4] + n;
      return n == 0 ? x[0] : deep(n - 1, x) + x[n];
    }
    """
    with pytest.raises(ShaderError, match="stack overflow"):
        run("float p[4] = {}; o[i] = deep(100 + int(a[i]), p);", header, mode="fast")


def test_a_launch_after_a_fault_is_sound() -> None:
    for _ in range(3):
        with pytest.raises(ShaderError):
            run("o[i] = a[i + 1];", mode="fast", workers=2, threadgroup=(32, 1, 1))
        _, out = run("o[i] = a[i];", mode="fast", workers=2, threadgroup=(32, 1, 1))
        assert out[63] == 64


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="over 1024 threads"):
        run("o[i] = 0;", grid=(4096, 1, 1), threadgroup=(2048, 1, 1))
    with pytest.raises(ValueError, match="need >= 1"):
        run("o[i] = 0;", grid=(0, 1, 1))
    kernel = Kernel("k", ["a"], ["o"], "o[0] = a[0];")
    arguments = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)]}
    with pytest.raises(ValueError, match="takes 1 inputs, got 2"):
        kernel(inputs=[1, 2], output_dtypes=["int32"], **arguments)
    with pytest.raises(TypeError, match="float64 does not exist in Metal"):
        kernel(inputs=[np.zeros(3)], output_dtypes=["int32"], **arguments)
