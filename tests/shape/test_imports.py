"""Imports point down, nothing imports in a circle, and only the command line reads the environment.

The order of the layers is the architecture's; a module may import its own folder and what lies
strictly below. Imports inside functions count as well: a late import hides a direction, it does
not change it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Lowest first. The empty name is `ds4py` itself, which re-exports the engine's names.
LAYERS = (
    {"errors"},
    {"assets", "config", "sizes"},
    {"text", "formats", "hub"},
    {"kernels"},
    {"cache"},
    {"model"},
    {"weights", "experts"},
    {"engine"},
    {""},
    {"quant", "bench", "eval", "server"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything in the package."""
    found = {}
    for path in sorted((ROOT / "ds4py").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, tree: ast.AST, is_package: bool) -> Iterator[str]:
    """Dotted names of the package's own modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                up = parts[: len(parts) - node.level + is_package]
                base = ".".join([*up, base] if base else up)
            # `from ds4py.text import chat` names a module, `from ds4py.text.chat import render` not
            wanted = [
                full if (full := f"{base}.{alias.name}") in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        yield from (full for full in wanted if full.split(".")[0] == "ds4py")


def layer(name: str) -> str:
    """`ds4py.text.chat` -> `text`, `ds4py.errors` -> `errors`, `ds4py` -> the empty string."""
    return ([*name.split("."), ""])[1]


def points_down(importer: str, imported: str) -> bool:
    own, other = layer(importer), layer(imported)
    return own == other or RANK[other] < RANK[own]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: without function bodies and TYPE_CHECKING blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.If | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else node

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of names in the graph, or an empty list."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*trail, name]):
                return found
        done.add(name)
        return []

    for name in graph:
        if found := visit(name, []):
            return found
    return []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_belongs_to_a_layer(name: str) -> None:
    assert layer(name) in RANK, f"{name} is in no layer of the architecture"


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    path = MODULES[name]
    wrong = [
        other
        for other in imports(name, parse(path), path.name == "__init__.py")
        if not points_down(name, other)
    ]
    assert not wrong, f"{name} imports {wrong}, which do not lie below it"


def test_no_module_imports_in_a_circle() -> None:
    graph = {
        name: set(imports(name, module_level(parse(path)), path.name == "__init__.py")) - {name}
        for name, path in MODULES.items()
    }
    assert not cycle(graph)


def test_the_rules_see_what_they_forbid() -> None:
    def of(source: str) -> list[str]:
        return list(imports("ds4py.text.x", ast.parse(source), False))

    assert of("from ..errors import InputError") == ["ds4py.errors"]
    assert of("from . import y") == ["ds4py.text"]
    assert of("def f():\n    import ds4py.engine.engine") == ["ds4py.engine.engine"]
    assert of("from ds4py import errors, Engine") == ["ds4py.errors", "ds4py"]
    assert points_down("ds4py.text.x", "ds4py.errors")
    assert not points_down("ds4py.text.x", "ds4py.engine.engine")
    assert not points_down("ds4py.text.x", "ds4py.formats.y")
    assert not points_down("ds4py.model.x", "ds4py")
    assert points_down("ds4py.cli.x", "ds4py")
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not cycle({"a": {"b", "c"}, "b": {"c"}})
    late = ast.parse("import ds4py.errors\ndef f():\n    import ds4py.config")
    assert list(imports("ds4py.x", module_level(late), False)) == ["ds4py.errors"]
