"""Sizes in bytes: what a user writes, and what a user reads."""

from __future__ import annotations

import re

from ds4py.errors import OptionsError

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
BINARY = {"KI": 1024, "MI": 1024**2, "GI": 1024**3, "TI": 1024**4}


def parse_size(text: str, option: str = "memory") -> int:
    """ "24GB", "512 MiB", "1.5T", "4096" -> bytes. Raises OptionsError, which names the option."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise OptionsError(f"{option} is {text!r}; need a size such as 24GB or 512MiB")
    return int(float(match[1]) * {**UNITS, **BINARY}[match[2]])


def format_size(n_bytes: float) -> str:
    """Bytes for people, in powers of 1000 as disks and memory plans are stated."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"
