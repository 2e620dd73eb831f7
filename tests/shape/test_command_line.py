"""Starting up is cheap: help and `import ds4py` load none of the heavy libraries."""

import subprocess
import sys

import pytest

HEAVY = {"mlx", "numpy", "torch", "transformers", "tokenizers", "sentencepiece", "safetensors"}
HEAVY |= {"huggingface_hub", "numba", "httpx2", "asyncio"}
HEAVY |= {"starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance"}

HELP = """
from ds4py.cli.app import main
assert main(["--help"]) == 0
"""


@pytest.mark.parametrize("program", ["import ds4py", HELP], ids=["import", "help"])
def test_nothing_heavy_is_imported(program: str) -> None:
    report = f"{program}\nimport sys\nprint(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stderr.split()) == set()
