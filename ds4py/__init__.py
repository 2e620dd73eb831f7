"""A local inference engine for DeepSeek V4, in Python on MLX.

    from ds4py import Engine, SamplingOptions
    session = Engine.open("tiny").session()

Importing the package imports nothing heavy; the names below are loaded when first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes as long as the rest of a short command's start
if TYPE_CHECKING:
    from typing import Any

    from ds4py.engine.engine import Engine
    from ds4py.engine.options import EngineOptions, SamplingOptions
    from ds4py.engine.session import Session, Token

__version__ = "0.1.0"
__all__ = ["Engine", "EngineOptions", "SamplingOptions", "Session", "Token", "__version__"]

_HOME = {
    "Engine": "engine",
    "EngineOptions": "options",
    "SamplingOptions": "options",
    "Session": "session",
    "Token": "session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ds4py' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ds4py.engine.{_HOME[name]}"), name)
