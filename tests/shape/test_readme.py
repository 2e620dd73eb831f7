"""What the README shows exists: its commands, their options, and its Python, which is run."""

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from ds4py.cli.commands import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_commands() -> Iterator[list[str]]:
    """Words of every command in the README's shell blocks, each side of a pipe by itself."""
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        while "|" in words:
            yield words[: words.index("|")]
            words = words[words.index("|") + 1 :]
        yield words


def commands_of(program: str) -> list[Any]:
    found = [words for words in shell_commands() if words[0] == program]
    assert found, f"the README shows no {program} command"
    return [pytest.param(words, id=" ".join(words)) for words in found]


@pytest.mark.parametrize("words", commands_of("make"))
def test_make_targets_exist(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("words", commands_of("ds4"))
def test_commands_and_options_exist(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while rest and rest[0] in getattr(command, "commands", {}):
        command, rest = command.commands[rest[0]], rest[1:]
    assert rest != words[1:] or rest == ["--help"]
    known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help"}
    assert {word for word in rest if word.startswith("--")} <= known


def test_the_two_set_up_commands() -> None:
    assert re.findall(r"^make \w+", blocks("sh")[0], re.MULTILINE) == ["make run", "make test"]


@pytest.mark.parametrize("program", blocks("python"))
def test_python_runs(program: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(program, "README.md", "exec"), {})
    assert said.getvalue().strip()


@pytest.mark.parametrize("path", re.findall(r"^(ds4py/\w+|models/\w+|tools|tests)", README, re.M))
def test_the_layout_exists(path: str) -> None:
    assert (ROOT / path).is_dir()
