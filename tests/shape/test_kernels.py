"""A kernel is four things with one name: a shader, its wrapper, a reference and a test."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES, COLUMNS = 500, 100
SHADERS = sorted((ROOT / "metal").glob("*.metal"))
INCLUDES = sorted((ROOT / "metal" / "include").glob("*.h"))
TESTS = [p.read_text(encoding="utf-8") for p in (ROOT / "tests" / "kernels").glob("test_*.py")]

shaders = pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in SHADERS])


@shaders
def test_a_shader_has_a_wrapper_and_a_reference(path: Path) -> None:
    """`metal/<module>_*.metal` is launched by `kernels/<module>.py`, which has references."""
    module = ROOT / "ds4py" / "kernels" / f"{path.stem.split('_')[0]}.py"
    text = module.read_text(encoding="utf-8")
    assert f'"{path.stem}"' in text
    functions = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    assert any(name.endswith("_ref") for name in functions)


@shaders
def test_a_shader_is_seen_failing(path: Path) -> None:
    """A test marked `shader` plants a bug in it by name."""
    naming = [text for text in TESTS if f'"{path.stem}"' in text]
    assert any("pytest.mark.shader" in text and "caught(" in text for text in naming)


@pytest.mark.parametrize("path", [pytest.param(p, id=p.name) for p in SHADERS + INCLUDES])
def test_shader_text_reads_like_the_rest(path: Path) -> None:
    lines = path.read_text(encoding="ascii").splitlines()
    if path.suffix == ".metal":
        lines = lines[2:]  # the names of inputs and outputs
    assert len(lines) <= FILE_LINES
    assert [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS] == []


def test_every_include_is_used() -> None:
    text = "".join(p.read_text(encoding="ascii") for p in SHADERS + INCLUDES)
    assert set(re.findall(r'^#include "(\S+)"', text, re.MULTILINE)) == {p.name for p in INCLUDES}
