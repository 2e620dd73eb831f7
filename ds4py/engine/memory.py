"""Sizes: what a user writes, what a model needs."""

from __future__ import annotations

import re

from ds4py.config import ModelConfig
from ds4py.errors import OptionsError
from ds4py.weights import names

UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
BINARY = {"KI": 1024, "MI": 1024**2, "GI": 1024**3, "TI": 1024**4}


def parse_size(text: str) -> int:
    """ "24GB", "512 MiB", "1.5T", "4096" -> bytes. Raises OptionsError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?|)B?\s*", text.upper())
    if not match or float(match[1]) <= 0:
        raise OptionsError(f"memory is {text!r}; need a size such as 24GB or 512MiB")
    return int(float(match[1]) * {**UNITS, **BINARY}[match[2]])


def format_size(n_bytes: float) -> str:
    """Bytes for people, in powers of 1000 as disks and memory plans are stated."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n_bytes) < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.2f} TB"


def n_parameters(config: ModelConfig) -> int:
    """Values of the main model as loaded (draft layers apart)."""
    total = 0
    for shape in names.expected(config).values():
        n = 1
        for size in shape:
            n *= size
        total += n
    return total


def state_bytes(config: ModelConfig, n_tokens: int, itemsize: int) -> int:
    """What one session's rows take at `n_tokens`, in rows of `itemsize` bytes per channel."""
    total = len(config.layers) * (config.sliding_window - 1) * config.head_dim * itemsize
    for plan in config.layers:
        if plan.compressed:
            width = config.head_dim + (config.index_head_dim if plan.indexed else 0)
            total += n_tokens // plan.ratio * width * itemsize
            total += (plan.overlap * plan.ratio - 1) * 2 * plan.overlap * width * 4
    return total


def check_budget(config: ModelConfig, memory: str, context: int, itemsize: int) -> None:
    """Raise OptionsError when weights and one full session exceed the budget, with the numbers."""
    budget = parse_size(memory)
    weights = n_parameters(config) * itemsize
    state = state_bytes(config, context, itemsize)
    if weights + state > budget:
        raise OptionsError(
            f"memory is {memory}, but the weights take {format_size(weights)} and {context} tokens "
            f"of context {format_size(state)}: {format_size(weights + state - budget)} too much; "
            "give more memory or a smaller context"
        )
