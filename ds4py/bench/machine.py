"""What was measured on: the machine, the back end, the version of this package."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

from ds4py import __version__

PACKAGE = Path(__file__).resolve().parents[1]


def describe() -> dict[str, str | int | None]:
    """Machine and software, as flat JSON. `commit` is None outside a checkout."""
    import mlx.core as mx

    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "backend": "metal" if mx.metal.is_available() else "cpu",
        "python": platform.python_version(),
        "mlx": metadata.version("mlx"),
        "version": __version__,
        "commit": commit(),
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def commit() -> str | None:
    """The checkout's commit, with a `+` when it was changed; None when installed elsewhere."""
    # A virtual environment can lie inside somebody else's repository: ask for our own file.
    here = ("git", "-C", str(PACKAGE))
    if _output(*here, "ls-files", "__init__.py") is None:
        return None
    revision = _output(*here, "rev-parse", "--short=12", "HEAD")
    changed = _output(*here, "status", "--porcelain", "--untracked-files=no", ".")
    return revision and revision + ("+" if changed else "")


def _output(*command: str) -> str | None:
    """What a command prints, None when it fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
