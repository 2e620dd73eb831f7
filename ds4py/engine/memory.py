"""What a model and its sessions need in memory."""

from __future__ import annotations

from ds4py.config import ModelConfig
from ds4py.errors import OptionsError
from ds4py.sizes import format_size, parse_size
from ds4py.weights import names


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
