"""How long files, functions and lines may be, and where a value may be computed or read.

An exception stands in a table with its reason; the tables are part of what a reviewer reads.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LINES, FUNCTION_LINES, COLUMNS = 500, 60, 100

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
WIDE_FILES: dict[str, str] = {}

# Where MLX may be made to compute. Everywhere else the graph stays lazy.
EVALUATES = {
    "ds4py/engine/": "the decode loop and the sessions: one evaluation per step",
    "ds4py/experts/streamed.py": "the ids of the chosen experts decide what is read from disk",
    "ds4py/cache/snapshot.py": "rows leave for the disk",
    "ds4py/weights/load.py": "a tensor is finished before the next is read, which bounds memory",
    "ds4py/quant/": "jobs over whole checkpoints",
    "ds4py/bench/": "measures finished work",
    "ds4py/eval/": "scores finished work",
}


def sources(*folders: str) -> list[Path]:
    """Every Python file of the folders, and the Python scripts in tools/ that have no suffix."""
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    if "tools" in folders:
        found += [p for p in (ROOT / "tools").iterdir() if is_python_script(p)]
    return sorted(found)


def is_python_script(path: Path) -> bool:
    if path.suffix or not path.is_file():
        return False
    return "python" in path.read_text(encoding="utf-8").partition("\n")[0]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def by_name(*folders: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", [pytest.param(p, id=name(p)) for p in sources(*folders)])


def long_functions(tree: ast.AST) -> list[tuple[str, int]]:
    """Name and length in lines of every function over the ceiling."""
    return [
        (node.name, length)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    ]


def evaluations(tree: ast.AST) -> Iterator[str]:
    """`line: call` of everything that makes MLX compute: eval, async_eval, synchronize, item.

    Where mlx is not imported, item() is numpy's and costs nothing.
    """
    has_mlx = any(
        isinstance(node, ast.Import) and any(a.name.split(".")[0] == "mlx" for a in node.names)
        for node in ast.walk(tree)
    )
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner, attribute = ast.unparse(node.func.value), node.func.attr
        of_mlx = owner in {"mx", "mlx.core"} and attribute in {"eval", "async_eval", "synchronize"}
        if of_mlx or (has_mlx and attribute == "item" and not node.args):
            yield f"{node.lineno}: {owner}.{attribute}()"


def reads_environment(tree: ast.AST) -> list[int]:
    """Lines that read or write environment variables."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and any(a.name in names for a in node.names))
    ]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@by_name("ds4py", "tests", "tools")
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    if name(path) not in LONG_FILES:
        assert len(lines) <= FILE_LINES
    if name(path) not in WIDE_FILES:
        assert [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS] == []


@by_name("ds4py", "tests", "tools")
def test_a_function_fits_a_screen(path: Path) -> None:
    found = [f for f in long_functions(parse(path)) if f"{name(path)}:{f[0]}" not in LONG_FUNCTIONS]
    assert found == []


@by_name("ds4py")
def test_values_are_computed_in_listed_places(path: Path) -> None:
    if not name(path).startswith(tuple(EVALUATES)):
        assert list(evaluations(parse(path))) == []


@by_name("ds4py")
def test_only_the_command_line_reads_the_environment(path: Path) -> None:
    if not name(path).startswith("ds4py/cli/"):
        assert reads_environment(parse(path)) == []


def text_files() -> list[Path]:
    """What a reader of the project reads, wherever it lies."""
    kinds = {".py", ".md", ".toml", ".json", ".metal", ".h", ".yml", ".txt", ""}
    folders = ("ds4py", "metal", "models", "tests", "tools", ".ci")
    found = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and p.suffix in kinds]
    return sorted([*found, *(ROOT / n for n in ("README.md", "Makefile", "pyproject.toml"))])


# Folders of the machine it was written on; marks of unfinished work.
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|root)/|\bshared" + r"/")
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")


@pytest.mark.parametrize("path", [pytest.param(p, id=name(p)) for p in text_files()])
def test_nothing_names_the_machine_or_is_left_unfinished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert MACHINE_PATHS.findall(text) == []
    assert UNFINISHED.findall(text) == []


def test_the_rules_see_what_they_forbid() -> None:
    body = "\n".join(["def f():", *["    x = 1"] * FUNCTION_LINES])
    assert long_functions(ast.parse(body)) == [("f", FUNCTION_LINES + 1)]
    calls = "mx.eval(x)\nmx.async_eval(x)\ny = x.sum().item()\nmodel.eval()\nd.items()"
    assert len(list(evaluations(ast.parse("import mlx.core as mx\n" + calls)))) == 3
    assert list(evaluations(ast.parse("import numpy as np\ny = x.item()"))) == []
    assert reads_environment(ast.parse("import os\nx = os.environ['A']")) == [2]
    assert reads_environment(ast.parse("from os import getenv")) == [1]
    assert MACHINE_PATHS.search("see /" + "work/main") and MACHINE_PATHS.search("shared" + "/x")
    assert not MACHINE_PATHS.search("ffn.shared_experts.w1, homework/")
    assert UNFINISHED.search("# TO" + "DO: later") and not UNFINISHED.search("IQ2_XXS")
