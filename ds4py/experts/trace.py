"""Routing traces: which experts every layer of every step chose.

A trace is a line of JSON that says what was traced, then entries of little-endian u16, u16, u32 and
ids: `FFFF last n` begins a step of n tokens; `layer k n` and n * k ids u16 are a layer's choice for
them. Everything a cache decides can be computed again from it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.errors import InputError
from ds4py.kernels.ops import Array

VERSION = 1
STEP = 0xFFFF
_ENTRY = struct.Struct("<HHI")

Ids = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class TraceFacts:
    """What was traced."""

    model: str
    n_layers: int
    hash_layers: tuple[int, ...]
    n_experts: int
    n_chosen: int
    swap: float = 0.0
    """Of cache-aware routing, under which the choices depend on the cache."""

    @staticmethod
    def of(model: str, config: ModelConfig, swap: float = 0.0) -> TraceFacts:
        return TraceFacts(
            model,
            len(config.layers),
            tuple(plan.index for plan in config.layers if plan.hash_routed),
            config.n_routed_experts,
            config.num_experts_per_tok,
            swap,
        )


@dataclass
class Step:
    """The choices of one step: per layer, in the order they were made, ids [S, k]."""

    n_tokens: int
    last: bool
    chosen: dict[int, Ids] = field(default_factory=dict)


@dataclass
class Trace:
    """A recorded run."""

    facts: TraceFacts
    steps: list[Step] = field(default_factory=list)

    def decoded(self, layer: int) -> list[frozenset[int]]:
        """The sets a layer chose for single tokens, one after the other."""
        steps = (s.chosen[layer] for s in self.steps if s.n_tokens == 1 and layer in s.chosen)
        return [frozenset(ids[0].tolist()) for ids in steps]


class Recorder:
    """Keeps a trace in memory. A `RoutingTrace`."""

    def __init__(self, facts: TraceFacts):
        self.trace = Trace(facts)
        self._lazy: list[tuple[Step, int, Array]] = []

    def step(self, n_tokens: int, last: bool) -> None:
        self.finish()
        self.trace.steps.append(Step(n_tokens, last))

    def chosen(self, layer: int, ids: Array) -> None:
        if self.trace.steps:  # else a draft before any step
            self._lazy.append((self.trace.steps[-1], layer, ids))

    def finish(self) -> None:
        """Take over the ids of the last step, which by now have been computed."""
        for step, layer, ids in self._lazy:
            step.chosen[layer] = np.asarray(ids).astype(np.uint16)
        self._lazy = []


class Writer(Recorder):
    """Writes a trace to a file, step by step. Raises InputError when it cannot."""

    def __init__(self, path: Path, facts: TraceFacts):
        super().__init__(facts)
        self._path = path
        try:
            self._file: BinaryIO = open(path, "wb")  # noqa: SIM115  closed by `close`
        except OSError as exc:
            raise self._fault(exc) from exc
        header = {"ds4 routing trace": VERSION, **facts.__dict__}
        self._write(json.dumps(header).encode() + b"\n")

    def finish(self) -> None:
        super().finish()
        for step in self.trace.steps:
            self._write(_ENTRY.pack(STEP, step.last, step.n_tokens))
            for layer, ids in step.chosen.items():
                self._write(_ENTRY.pack(layer, ids.shape[1], ids.shape[0]))
                self._write(ids.astype("<u2").tobytes())
        self.trace.steps.clear()

    def close(self) -> None:
        """Write the last step and close the file."""
        self.finish()
        self._file.close()

    def _write(self, data: bytes) -> None:
        try:
            self._file.write(data)
        except OSError as exc:
            raise self._fault(exc) from exc

    def _fault(self, exc: OSError) -> InputError:
        return InputError(f"the trace {self._path} cannot be written ({exc.strerror})")


def read(path: Path) -> Trace:
    """A trace file. Raises InputError when it is none; a cut-off last step is left out."""
    try:
        data = path.read_bytes()
        head, newline, body = data.partition(b"\n")
        header: dict[str, Any] = json.loads(head)
        version = header.pop("ds4 routing trace")
        facts = TraceFacts(**header | {"hash_layers": tuple(header["hash_layers"])})
    except OSError as exc:
        raise InputError(f"the trace {path} cannot be read ({exc.strerror})") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise InputError(f"{path} is no routing trace; make one with --trace") from exc
    if version != VERSION or not newline:
        raise InputError(f"{path} is a trace of version {version}; this program reads {VERSION}")
    return Trace(facts, _steps(path, body, facts))


def _steps(path: Path, body: bytes, facts: TraceFacts) -> list[Step]:
    steps: list[Step] = []
    at = 0
    while at + _ENTRY.size <= len(body):
        layer, k, n = _ENTRY.unpack_from(body, at)
        at += _ENTRY.size
        if layer == STEP:
            steps.append(Step(n, bool(k)))
            continue
        end = at + 2 * k * n
        if k > facts.n_experts or (end <= len(body) and not steps):
            raise InputError(f"{path} is damaged at byte {at}; record the trace again")
        if end > len(body):
            return steps[:-1]
        ids = np.frombuffer(body[at:end], "<u2").reshape(n, k)
        if ids.size and ids.max() >= facts.n_experts:
            raise InputError(f"{path} names expert {ids.max()} of {facts.n_experts}; it is damaged")
        steps[-1].chosen[layer] = ids.astype(np.uint16)
        at = end
    return steps


def reuse(sets: Sequence[frozenset[int]], lag: int = 1) -> float:
    """EOR: the mean share of a token's experts that the token `lag` before chose, too."""
    if len(sets) <= lag:
        return float("nan")
    pairs = zip(sets[lag:], sets[:-lag], strict=True)
    return sum(len(now & before) / len(now) for now, before in pairs) / (len(sets) - lag)


def usage(trace: Trace) -> Mapping[int, npt.NDArray[np.int64]]:
    """How often every expert of every layer was chosen."""
    totals = {layer: np.zeros(trace.facts.n_experts, np.int64) for layer in _layers(trace)}
    for step in trace.steps:
        for layer, ids in step.chosen.items():
            totals[layer] += np.bincount(ids.ravel(), minlength=trace.facts.n_experts)
    return totals


def _layers(trace: Trace) -> list[int]:
    return sorted({layer for step in trace.steps for layer in step.chosen})
