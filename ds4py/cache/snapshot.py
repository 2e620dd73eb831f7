"""A sequence at one position as plain arrays: everything needed to continue bit for bit.

An `Image` holds the token ids, the stored rows from some position on, the frontier without what no
later row needs, and the seed of its sampler (noise depends on seed and position only, so that is
all of its state). The next-token logits are not in it: the head makes them of the frontier's
streams, an eighth of their bytes. A draft layer's window is an array of its own: an engine that
does not draft ignores it, and one that finds none begins with an empty window, which costs some
drafts and no token. Arrays are little-endian; bfloat16 travels as its bits. `save` writes an image
whose rows begin at 0 as one record; the store splits it into segments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.cache import record
from ds4py.cache.record import Arrays, RecordError
from ds4py.cache.state import Frontier, SequenceState
from ds4py.errors import InputError
from ds4py.kernels.ops import Array, Ops

FORMAT = 4
"""Counts the changes of what an image holds; another one is another identity."""


@dataclass
class Image:
    """One sequence. Raises ValueError where arrays do not fit the model they are put into."""

    tokens: npt.NDArray[np.int32]
    """All ids, [position]."""
    start: int
    """Rows that were complete after this many tokens are not in here."""
    rows: Arrays
    """Per series, stored rows [layers, n, width]."""
    ratios: dict[str, int]
    """Per series, tokens a row stands for."""
    frontier: Arrays
    """`window`, `streams`, per series `values.NAME`, and `draft`, if its window runs along."""
    seed: int | None = None
    extra: dict[str, Arrays] = field(default_factory=dict)
    """Further frontiers by name, as `capture_frontier` gives them: `turnN` is a checkpoint of this
    sequence at N tokens. Or other small arrays."""

    @property
    def position(self) -> int:
        return len(self.tokens)


def capture(
    state: SequenceState, frontier: Frontier, tokens: list[int], start: int, **more: Any
) -> Image:
    """The sequence at a frontier of a state, with rows from `start` on. Evaluates them."""
    rows = {
        s.name: _bits(state.rows[s.name].data[:, s.count(start) : s.count(frontier.position)])
        for s in state.series
    }
    ids = np.asarray(tokens[: frontier.position], np.int32)
    ratios = {s.name: s.ratio for s in state.series}
    return Image(ids, start, rows, ratios, capture_frontier(state, frontier), **more)


def fill(state: SequenceState, image: Image) -> None:
    """Make an empty state the sequence of an image whose rows begin at 0. Raises ValueError."""
    ops, position, rows = state.ops, image.position, {}
    assert image.start == 0
    for s in state.series:
        data = state.rows[s.name].data
        shape = (data.shape[0], s.count(position), data.shape[2])
        rows[s.name] = _array(ops, image.rows.get(s.name), data, shape)
    frontier = frontier_of(state, position, image.frontier)
    for name, array in rows.items():
        state.rows[name].write(0, array)
    state.restore(frontier)
    mx.eval(state.pending())  # nothing lazy still refers to the file's arrays


def capture_frontier(state: SequenceState, frontier: Frontier) -> Arrays:
    """What an image's `frontier` holds."""
    kept, n_main = state.checkpoint(frontier), state.n_main
    arrays = {"window": _bits(kept.window[:n_main]), "streams": _bits(kept.streams)}
    if len(kept.window) > n_main:
        arrays["draft"] = _bits(kept.window[n_main:])
    return arrays | {f"values.{name}": _bits(values) for name, values in kept.values.items()}


def frontier_of(state: SequenceState, position: int, arrays: Arrays) -> Frontier:
    """A captured frontier, for `state.restore`. Raises ValueError."""
    like, values = state.frontier, {}
    for s in state.series:
        whole = like.values[s.name]
        shape = (whole.shape[0], s.needed(position), whole.shape[2])
        values[s.name] = _array(state.ops, arrays.get(f"values.{s.name}"), whole, shape)
    window, draft = like.window[: state.n_main], like.window[state.n_main :]
    window, streams = (
        state.ops.copy(_array(state.ops, arrays.get(name), own, tuple(own.shape)))
        for name, own in (("window", window), ("streams", like.streams))
    )
    if len(draft):
        found = state.ops.zeros(draft.shape, draft.dtype)
        if "draft" in arrays:
            found = _array(state.ops, arrays["draft"], draft, tuple(draft.shape))
        window = state.ops.concatenate([window, found])
    return Frontier(position, window, values, streams)


def save(path: Path, image: Image, identity: str) -> None:
    """Write an image as one file. `identity` names model and numerics. Raises InputError."""
    arrays = {"tokens": image.tokens, **image.frontier}
    arrays |= {f"rows.{name}": array for name, array in image.rows.items()}
    for name, values in image.extra.items():
        arrays |= {f"extra.{name}.{key}": array for key, array in values.items()}
    header = {"identity": identity, "position": image.position, "seed": image.seed}
    try:
        record.write(path, header, arrays)
    except OSError as exc:
        raise InputError(f"{path} cannot be written ({exc.strerror})") from exc


def load(path: Path, identity: str) -> Image:
    """An image from a file. Raises InputError."""
    try:
        header, arrays = record.read(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; save a session there first") from None
    except OSError as exc:
        raise InputError(f"{path} cannot be read ({exc.strerror})") from exc
    if header.get("identity") != identity:
        raise InputError(
            f"{path} was saved from another model or with other numerics; open it with the model "
            "and options it was made with"
        )
    rows = {n.removeprefix("rows."): a for n, a in arrays.items() if n.startswith("rows.")}
    extra: dict[str, Arrays] = {}
    for name in [n for n in arrays if n.startswith("extra.")]:
        _, state, key = name.split(".", 2)
        extra.setdefault(state, {})[key] = arrays[name]
    own = ("window", "streams", "draft")
    frontier = {n: a for n, a in arrays.items() if n in own or n.startswith("values.")}
    if "tokens" not in arrays or len(arrays["tokens"]) != header.get("position"):
        raise RecordError(f"{path} is damaged: it lacks its tokens; save the session again")
    return Image(arrays["tokens"], 0, rows, {}, frontier, header.get("seed"), extra)


def _bits(x: Array) -> npt.NDArray[Any]:
    """A contiguous host copy; bfloat16 as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, order="C")


def _array(ops: Ops, bits: npt.NDArray[Any] | None, like: Array, shape: tuple[int, ...]) -> Array:
    if bits is None:
        raise ValueError("an array is missing")
    x = ops.array(bits)
    x = x.view(mx.bfloat16) if like.dtype == mx.bfloat16 else x
    if tuple(x.shape) != shape or x.dtype != like.dtype:
        raise ValueError(f"an array is {x.dtype}{list(x.shape)}, not {like.dtype}{list(shape)}")
    return x
