"""A sequence state as one safetensors file: everything needed to continue bit for bit.

Arrays are little-endian; bfloat16 travels as its bits. The metadata says which model, numerics and
position the file belongs to. Written beside the target and renamed, so that a kill leaves the old
file or the new one.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py.cache.state import Frontier, SequenceState
from ds4py.errors import InputError
from ds4py.kernels.ops import Array, Ops

VERSION = 2


def save(
    path: Path, state: SequenceState, tokens: list[int], logits: mx.array | None, identity: str
) -> None:
    """Write state, token ids and next-token logits. `identity` names model and numerics."""
    from safetensors.numpy import save as serialise

    frontier = state.frontier
    arrays = {"tokens": np.asarray(tokens, np.int64), "window": _bits(frontier.window)}
    for s in state.series:
        arrays[f"values.{s.name}"] = _bits(frontier.values[s.name])
        arrays[f"rows.{s.name}"] = _bits(state.rows[s.name].data[:, : s.count(state.position)])
    if logits is not None:
        arrays["logits"] = _bits(logits)
    header = {"version": VERSION, "identity": identity, "position": state.position}
    data = serialise(arrays, metadata={"ds4py": json.dumps(header)})
    _write_atomically(path, data)


def load(path: Path, state: SequenceState, identity: str) -> tuple[list[int], mx.array | None]:
    """Fill an empty `state` from a file -> token ids, logits. Raises InputError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("ds4py", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; save a session there first") from None
    except (OSError, SafetensorError, ValueError) as exc:
        raise InputError(f"{path} is not a readable snapshot ({exc})") from exc
    if header.get("version") != VERSION:
        raise InputError(
            f"{path} is a snapshot of version {header.get('version')}; this program reads {VERSION}"
        )
    if header.get("identity") != identity:
        raise InputError(
            f"{path} was saved from another model or with other numerics; open it with the model "
            "and options it was made with"
        )
    try:
        return _fill(state, arrays, int(header["position"]))
    except (KeyError, ValueError, TypeError) as exc:
        raise InputError(f"{path} is damaged ({exc}); save the session again") from exc


def _fill(
    state: SequenceState, arrays: dict[str, npt.NDArray[Any]], position: int
) -> tuple[list[int], mx.array | None]:
    empty, ops = state.frontier, state.ops
    tokens = [int(t) for t in arrays["tokens"]]
    if position < 0 or len(tokens) != position:
        raise ValueError(f"{len(tokens)} tokens for position {position}")
    values, rows = {}, {}
    for s in state.series:
        values[s.name] = _array(ops, arrays[f"values.{s.name}"], empty.values[s.name])
        data = state.rows[s.name].data
        rows[s.name] = _array(
            ops, arrays[f"rows.{s.name}"], data, (data.shape[0], s.count(position), data.shape[2])
        )
    window = _array(ops, arrays["window"], empty.window)
    logits = mx.array(arrays["logits"]) if "logits" in arrays else None
    for name, array in rows.items():
        state.rows[name].write(0, array)
    state.restore(Frontier(position, window, values))
    mx.eval(state.pending())  # nothing lazy still refers to the file's arrays
    return tokens, logits


def _bits(x: Array) -> npt.NDArray[Any]:
    """A contiguous host copy; bfloat16 as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, order="C")


def _array(
    ops: Ops, bits: npt.NDArray[Any], like: Array, shape: tuple[int, ...] | None = None
) -> Array:
    shape = tuple(like.shape) if shape is None else shape
    x = ops.array(bits)
    x = x.view(mx.bfloat16) if like.dtype == mx.bfloat16 else x
    if tuple(x.shape) != shape or x.dtype != like.dtype:
        raise ValueError(f"an array is {x.dtype}{list(x.shape)}, not {like.dtype}{list(shape)}")
    return x


def _write_atomically(path: Path, data: bytes) -> None:
    """Private by default: a snapshot holds a conversation."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as exc:
        raise InputError(f"{path.parent} cannot be written ({exc.strerror})") from exc
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except OSError as exc:
        raise InputError(f"{path} cannot be written ({exc.strerror})") from exc
    finally:
        if os.path.exists(name):
            os.unlink(name)
