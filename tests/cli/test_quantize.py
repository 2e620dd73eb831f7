"""`ds4 quantize` and `ds4 imatrix` as a user runs them, on the embedded model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds4py import assets

PARENT = str(assets.path("models", "tiny-parent"))


def ds4(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ds4py", *arguments], capture_output=True, text=True, check=False
    )


def test_importance_bundle_and_an_answer(tmp_path: Path) -> None:
    corpus, weights, bundle = (tmp_path / n for n in ("text.txt", "i.safetensors", "bundle"))
    corpus.write_text("Anna had a small dog. The dog liked the garden. " * 8)
    made = ds4("imatrix", PARENT, str(corpus), str(weights))
    assert (made.returncode, made.stdout.strip()) == (0, str(weights)), made.stderr
    made = ds4("quantize", PARENT, str(bundle), "--imatrix", str(weights))
    assert (made.returncode, made.stdout.strip()) == (0, str(bundle)), made.stderr
    answer = ds4("generate", "Hello!", "--model", str(bundle), "--max-tokens", "5", "--seed", "1")
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    shown = ds4("inspect", str(bundle))
    assert shown.returncode == 0 and "IQ2_XXS, Q2_K" in shown.stdout, shown.stderr
    again = ds4("quantize", PARENT, str(bundle))
    assert again.returncode == 2 and "already holds a bundle" in again.stderr


def test_a_gguf_file_and_an_answer(tmp_path: Path) -> None:
    recipe, path = tmp_path / "recipe.json", tmp_path / "tiny.gguf"
    formats = {"routed.gate": "MXFP4", "routed.up": "MXFP4", "routed.down": "MXFP4"}
    recipe.write_text(json.dumps({"formats": formats}))
    made = ds4("quantize", PARENT, str(path), "--to", "gguf", "--recipe", str(recipe))
    assert (made.returncode, made.stdout.strip()) == (0, str(path)), made.stderr
    answer = ds4("generate", "Hello!", "--model", str(path), "--max-tokens", "5", "--seed", "1")
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr
    again = ds4("quantize", PARENT, str(path), "--to", "gguf")
    assert again.returncode == 2 and "already exists" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("quantize", "nowhere", "b"), "no model 'nowhere'"),
        (("quantize", "tiny", "b", "--recipe", "absent.json"), "absent.json"),
        (("quantize", "tiny", "b", "--imatrix", "absent"), "absent"),
        (("imatrix", "tiny", "absent.txt", "o"), "absent.txt"),
        (("quantize", "tiny"), "DST"),
        (("quantize", "tiny", "b", "--to", "onnx"), "--to is 'onnx'; there are bundle and gguf"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], named: str) -> None:
    ended = ds4(*arguments)
    assert ended.returncode == 2 and named in ended.stderr
    assert ended.stderr.count("\n") == 1 and not ended.stdout


def test_bench_encode() -> None:
    done = ds4("bench", "encode", "--weights", "2048", "--repeat", "1")
    assert done.returncode == 0, done.stderr
    rates = json.loads(done.stdout.splitlines()[-1])["rates"]
    found = {(rate["format"], rate["importance"]) for rate in rates}
    assert len(found) == len(rates) == 12 and ("IQ2_XXS", True) in found
