"""What a model is built from: named tensors as float32, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig


class Entry(Protocol):
    """A stored tensor."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def n_bytes(self) -> int: ...

    def read(self) -> npt.NDArray[Any]:
        """Its bits."""
        ...


class Source(Protocol):
    """A checkpoint that was checked as a whole. Names are those of `weights/names.py`."""

    config: ModelConfig
    has_draft: bool

    @property
    def entries(self) -> Mapping[str, Entry]:
        """What is stored, by name."""
        ...

    def matrix(self, name: str) -> npt.NDArray[np.float32]:
        """`name`.weight, dequantised, [out, in]."""
        ...

    def floats(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor of numbers."""
        ...

    def integers(self, name: str) -> npt.NDArray[np.int32]:
        """A table of ids."""
        ...
