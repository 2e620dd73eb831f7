"""From Metal's tokens to clang's, on the same lines."""

import pytest

pytest.importorskip("ml_dtypes")  # the package imports it

from tools.metal_cpu.lint import RewriteError
from tools.metal_cpu.rewrite import literal, rewrite


@pytest.mark.parametrize(
    ("metal", "clang"),
    [
        ("1", "1"),
        ("0x1F", "0x1F"),
        ("7u", "7u"),
        ("1.0", "1.0f"),
        (".5", ".5f"),
        ("1.", "1.f"),
        ("1e-5", "1e-5f"),
        ("2.5e3f", "2.5e3f"),
        ("0x1p-3", "0x1p-3f"),
        ("1.5h", "((half)1.5f)"),
        ("1.5bf", "((bfloat)1.5f)"),
    ],
)
def test_floating_literals_are_floats(metal: str, clang: str) -> None:
    assert literal(metal) == clang


@pytest.mark.parametrize(
    ("metal", "clang"),
    [
        ("[[kernel]] void k(device int* a [[buffer(0)]]) {}", " void k(device int* a ) {}"),
        ("#include <metal_stdlib>\nint x();", "\nint x();"),
        ("#define HALF 0.5\n", "#define HALF 0.5f\n"),
        ("template [[host_name(\"x\")]] [[kernel]]\n decltype(k<1>) k<1>;", "\n"),
        ("int f(int local, int kernel) { return local; }",
         "int f(int local_, int kernel_) { return local_; }"),
        ("f(); // 1.0 [[x]]\n/* threadgroup\n */", "f(); // 1.0 [[x]]\n/* threadgroup\n */"),
        ("struct A { A() thread {} int g() thread; };", "struct A { A()  {} int g() thread; };"),
        ("void f(threadgroup float* p, int n);", "void f(threadgroup float* p, int n);"),
    ],
)  # fmt: skip
def test_what_differs_is_rewritten(metal: str, clang: str) -> None:
    assert rewrite(metal) == clang


def test_threadgroup_arrays_become_references_and_keep_their_lines() -> None:
    text = "[[kernel]] void k() {\n  threadgroup vec<T, 2> a[N *\n 2], b;\n  a[0] = 1;\n}"
    made = rewrite(text)
    assert made.count("\n") == text.count("\n")
    assert 'using msl_type_0 =  vec<T, 2> [N * 2]; threadgroup msl_type_0& a = ' in made
    assert 'msl_array(1, sizeof(msl_type_1), alignof(msl_type_1), 2, "b")' in made
    assert made.split("\n")[3] == "  a[0] = 1;"
    assert "16, 1, " in rewrite("[[kernel]] void k() { threadgroup alignas(16) char a[4]; }")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[[kernel]] void k() {\n threadgroup int n = 0;\n}", 2),
        ("[[kernel]] void k() {}\nvoid f() {\n threadgroup int n;\n}", 3),
        ("\nconstexpr int K = 1;", 2),
        ("void f(\n const float* p) {}", 2),
        ("struct S {\n float* p;\n};", 2),
        ("void f() {\n for (uchar* p = g(); p; p++) {}\n}", 2),
        ("void f() {\n x = reinterpret_cast<uint*>(y);\n}", 2),
        ("template <typename T> T* f();", 1),
    ],
)
def test_rules_are_checked(text: str, line: int) -> None:
    with pytest.raises(RewriteError) as caught:
        rewrite(text)
    assert caught.value.line == line
