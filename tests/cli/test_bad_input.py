"""Whatever is wrong with the input: one clear line on stderr, exit code 2, nothing on stdout."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ds4py import assets

Complaint = Callable[["subprocess.CompletedProcess[str]"], str]
Damage = Callable[[Path], None]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "hi", "--max-tokens", "-1"], "max_tokens is -1"),
        (["generate", "hi", "--max-tokens", "0"], "max_tokens is 0"),
        (["generate", "hi", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "hi", "--temperature", "-1"], "temperature"),
        (["generate", "hi", "--temperature", "nan"], "temperature"),
        (["generate", "hi", "--top-p", "0"], "top_p"),
        (["generate", "hi", "--min-p", "2"], "min_p"),
        (["generate", "hi", "--top-k", "-1"], "top_k"),
        (["generate", "hi", "--seed", "-1"], "seed"),
        (["generate", "hi", "--stop", ""], "stop"),
        (["generate", "hi", "--context", "0"], "context"),
        (["generate", "hi", "--memory", "lots"], "memory"),
        (["generate", "hi", "--memory", "1kB"], "memory"),
        (["generate", "hi", "--no-think", "--think-max"], "contradict"),
        (["generate", "hi", "--raw", "--think"], "--raw"),
        (["generate", "hi", "--model", ""], "--model"),
        (["generate", "hi", "--model", "no/such/model"], "no/such/model"),
        (["generate", "hi", "--model", __file__], "is a file"),
        (["generate", "hi", "there"], "there"),
        (["generate", "hi", "--frobnicate"], "--frobnicate"),
        (["generate", ""], "empty"),
        (["frobnicate"], "frobnicate"),
        (["chat", "--resume", "nobody"], "nobody"),
        (["chat", "--max-tokens", "0"], "max_tokens"),
        (["inspect", "no/such/model"], "no/such/model"),
        (["inspect", "--context", "0"], "context"),
        (["bench", "speed", "--repeat", "0"], "--repeat"),
        (["verify", "--samples", "0"], "--samples"),
    ],
    ids=" ".join,
)
def test_options(ds4: Any, complaint: Complaint, arguments: list[str], told: str) -> None:
    done = ds4(*arguments)
    assert told in complaint(done)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("stdin", "told"),
    [(b"", "empty"), (b" \n", "empty"), (b"abc\xff\xfe", "not UTF-8"), (b"\xc3", "not UTF-8")],
)
@pytest.mark.parametrize("arguments", [["generate"], ["generate", "-"]], ids=" ".join)
def test_stdin(
    ds4: Any, complaint: Complaint, arguments: list[str], stdin: bytes, told: str
) -> None:
    done = ds4(*arguments, stdin=stdin)
    assert told in complaint(done)
    assert done.returncode == 2


def test_an_argument_that_is_no_text(ds4: Any, complaint: Complaint) -> None:
    done = ds4("generate", os.fsdecode(b"a\xff"))
    assert "the prompt is not UTF-8" in complaint(done)
    assert done.returncode == 2


def test_a_chat_line_that_is_no_text(ds4: Any, complaint: Complaint) -> None:
    done = ds4("chat", "--no-think", stdin=b"/reset\nabc\xff\n")
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: line 2 of stdin is not UTF-8")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--raw", "--json"]], ids=str)
def test_a_prompt_longer_than_the_context(
    ds4: Any, complaint: Complaint, arguments: list[str]
) -> None:
    done = ds4("generate", "word " * 300, "--context", "32", *arguments)
    told = complaint(done)
    assert "context is 32" in told and done.returncode == 2
    assert any(int(word) > 300 for word in told.split() if word.isdigit())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def unknown_key(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"frobnicate": 1}), encoding="utf-8")


def unknown_value(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"scoring_func": "softmax"}), encoding="utf-8")


def other_shape(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"hidden_size": 128}), encoding="utf-8")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x07garbage" * 100)


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("model.safetensors", cut, "truncated|incomplete"),
        ("model.safetensors", garbage, "not a safetensors file"),
        ("model.safetensors", Path.unlink, "no .*safetensors"),
        ("config.json", Path.unlink, "config.json does not exist"),
        ("config.json", garbage, "JSON"),
        ("config.json", unknown_key, "frobnicate"),
        ("config.json", unknown_value, "scoring_func is 'softmax'"),
        ("config.json", other_shape, "shape|needs|need"),
        ("tokenizer.model", Path.unlink, "tokenizer"),
        ("tokenizer.model", garbage, "tokenizer"),
    ],
)
def test_a_damaged_model(
    ds4: Any, complaint: Complaint, tmp_path: Path, file: str, damage: Damage, told: str
) -> None:
    import re

    directory = tmp_path / "model"
    shutil.copytree(assets.path("models", "tiny-parent"), directory)
    damage(directory / file)
    done = ds4("generate", "hi", "--max-tokens", "1", "--model", str(directory))
    assert re.search(told, complaint(done)), done.stderr
    assert done.returncode == 2


def test_an_empty_directory_is_no_model(ds4: Any, complaint: Complaint, tmp_path: Path) -> None:
    done = ds4("inspect", str(tmp_path))
    assert "config.json" in complaint(done) and done.returncode == 2


def test_our_own_mistakes_are_one_line_too(ds4: Any, complaint: Complaint, tmp_path: Path) -> None:
    broken = tmp_path / "mlx"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('out\\nof order')", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), ds4.environment()["PYTHONPATH"]])
    done = ds4("generate", "hi", env={"PYTHONPATH": path})
    assert "unexpected RuntimeError: out of order; DS4_TRACEBACK=1" in complaint(done)
    assert done.returncode == 1
    shown = ds4("generate", "hi", env={"PYTHONPATH": path, "DS4_TRACEBACK": "1"})
    assert "Traceback" in shown.stderr and shown.returncode == 1
