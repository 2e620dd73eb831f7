"""Opens the chosen model, with a progress bar, and says which one when nobody named it."""

import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING

from ds4py.cli.progress import ProgressBar
from ds4py.cli.settings import ModelChoice, Settings, models_directory
from ds4py.errors import TokenizerError

if TYPE_CHECKING:
    from ds4py import Engine
    from ds4py.text.tokenizer import Tokenizer

COMMAND_BUFFERS = {"MLX_MAX_OPS_PER_BUFFER": "100", "MLX_MAX_MB_PER_BUFFER": "1000000"}
"""When MLX hands work to the GPU. By itself it does so every 40 or 50 operations, or when they
read more than as many million elements, which every single launch that binds a pool of experts
does: hundreds of command buffers for one token. By count alone they are six, and the first is on
its way while the rest of the step is still being built. MLX reads them when it is loaded."""


def open_engine(settings: Settings) -> tuple["Engine", float]:
    """The engine, and how many seconds it took to load."""
    options = settings.engine_options()
    announce(settings.model)
    tell_mlx()
    start = perf_counter()
    from ds4py import Engine
    from ds4py.engine.engine import resolve

    with ProgressBar(sys.stderr) as bar:
        engine = Engine.open(resolve(settings.model.name, models_directory()), options, bar)
    tell_of_context(engine)
    return engine, perf_counter() - start


def tell_mlx() -> None:
    """Set COMMAND_BUFFERS where the user did not; before MLX is loaded."""
    for name, value in COMMAND_BUFFERS.items():
        os.environ.setdefault(name, value)


def announce(model: ModelChoice) -> None:
    """Say on stderr which model is used, when nobody named it."""
    if model.notice:
        print(model.notice, file=sys.stderr, flush=True)


def tell_of_context(engine: "Engine") -> None:
    """Say on stderr that the context is longer than the model was made for, where it is."""
    made_for = engine.config.max_position_embeddings
    if engine.context > made_for:
        print(
            f"ds4: {engine.name} was made for {made_for} tokens; beyond them, up to the context of "
            f"{engine.context}, it may write nonsense",
            file=sys.stderr,
            flush=True,
        )


def tokenizer_of(engine: "Engine") -> "Tokenizer":
    """The engine's tokenizer; TokenizerError when the model came without one."""
    if engine.tokenizer is None:
        raise TokenizerError(
            f"{engine.name} has no tokenizer; put its tokenizer.json or tokenizer.model "
            "into the model's directory"
        )
    return engine.tokenizer
