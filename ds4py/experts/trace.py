"""Routing traces: which experts every layer of every step chose, and which it might have.

A trace is a line of JSON that says what was traced, then little-endian entries that each begin with
u16, u16, u32:

    FFFF    last  n   begins a step of n tokens
    layer   k     n   a layer's choice for them: u16 ids [n, k]
    4000 + layer  m  n  of a step of decoding in a score-routed layer, the m best experts: u16 ids
                      [n, m], best first; f32 selection scores [n, m]; f32 scores without bias
                      [n, m]; f32 range of all experts' selection scores [n]
    8000 + layer  k  n  where the next layer's router was asked ahead, its guess: u16 ids [n, k]

Everything a cache, a swap or a read ahead decides can be computed again from it. Version 1 had ids
alone, and is read as a trace without scores.
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
from ds4py.experts.policy import DECODE_ROWS
from ds4py.experts.swaps import Ranked
from ds4py.kernels.ops import Array

VERSION = 2
STEP, SCORES, FORESEEN = 0xFFFF, 0x4000, 0x8000
_ENTRY = struct.Struct("<HHI")

Ids = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]


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


@dataclass(frozen=True)
class Candidates:
    """The best experts of a step's tokens in one layer, as `Ranked` for each."""

    ids: Ids
    """[S, m]"""
    q: F32
    """[S, m]"""
    score: F32
    """[S, m]"""
    spread: F32
    """[S]"""

    @staticmethod
    def of(score: npt.NDArray[np.floating], bias: npt.NDArray[np.floating]) -> Candidates:
        """score [S, E], bias [E]"""
        ranked = [Ranked.of(row, bias.astype(np.float32)) for row in score.astype(np.float32)]
        return Candidates(
            np.array([r.ids for r in ranked], np.uint16),
            np.array([r.q for r in ranked], np.float32),
            np.array([r.score for r in ranked], np.float32),
            np.array([r.spread for r in ranked], np.float32),
        )

    def token(self, n: int) -> Ranked:
        """Those of one token."""
        return Ranked(self.ids[n], self.q[n], self.score[n], float(self.spread[n]))

    def pack(self) -> bytes:
        """As in a file."""
        floats = (a.astype("<f4").tobytes() for a in (self.q, self.score, self.spread))
        return self.ids.astype("<u2").tobytes() + b"".join(floats)

    @staticmethod
    def n_bytes(n: int, m: int) -> int:
        """Of n tokens with m candidates each."""
        return n * (m * 10 + 4)

    @staticmethod
    def unpack(data: bytes, n: int, m: int) -> Candidates:
        """What `pack` made."""
        ids = np.frombuffer(data, "<u2", n * m).reshape(n, m).astype(np.uint16)
        floats = np.frombuffer(data, "<f4", offset=2 * n * m).astype(np.float32)
        q, score = floats[: 2 * n * m].reshape(2, n, m)
        return Candidates(ids, q, score, floats[2 * n * m :])


@dataclass
class Step:
    """The choices of one step: per layer, in the order they were made, ids [S, k]."""

    n_tokens: int
    last: bool
    chosen: dict[int, Ids] = field(default_factory=dict)
    scored: dict[int, Candidates] = field(default_factory=dict)
    """What could have been chosen: of steps of decoding, by score-routed layer."""
    foreseen: dict[int, Ids] = field(default_factory=dict)
    """What the layer before's streams let expect, where that was asked."""


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
        self._chosen: list[tuple[Step, int, Array]] = []
        self._scored: list[tuple[Step, int, Array, Array]] = []
        self._foreseen: list[tuple[Step, int, Array]] = []

    def step(self, n_tokens: int, last: bool) -> None:
        self.finish()
        self.trace.steps.append(Step(n_tokens, last))

    def chosen(self, layer: int, ids: Array) -> None:
        if self.trace.steps:  # else a draft before any step
            self._chosen.append((self.trace.steps[-1], layer, ids))

    def scored(self, layer: int, score: Array, bias: Array) -> None:
        if self.trace.steps and score.shape[0] <= DECODE_ROWS:
            self._scored.append((self.trace.steps[-1], layer, score, bias))

    def foreseen(self, layer: int, ids: Array) -> None:
        if self.trace.steps:
            self._foreseen.append((self.trace.steps[-1], layer, ids))

    def finish(self) -> None:
        """Take over what the last step chose, which by now has been computed."""
        for step, layer, ids in self._chosen:
            step.chosen[layer] = np.asarray(ids).astype(np.uint16)
        for step, layer, score, bias in self._scored:
            step.scored[layer] = Candidates.of(np.asarray(score), np.asarray(bias))
        for step, layer, ids in self._foreseen:
            step.foreseen[layer] = np.asarray(ids).astype(np.uint16)
        self._chosen, self._scored, self._foreseen = [], [], []


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
                self._entry(layer, ids, ids.astype("<u2").tobytes())
                if (best := step.scored.get(layer)) is not None:
                    self._entry(SCORES | layer, best.ids, best.pack())
                if (guess := step.foreseen.get(layer)) is not None:
                    self._entry(FORESEEN | layer, guess, guess.astype("<u2").tobytes())
        self.trace.steps.clear()

    def close(self) -> None:
        """Write the last step and close the file."""
        self.finish()
        self._file.close()

    def _entry(self, what: int, ids: Ids, data: bytes) -> None:
        self._write(_ENTRY.pack(what, ids.shape[1], ids.shape[0]) + data)

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
    if version not in (1, VERSION) or not newline:
        raise InputError(
            f"{path} is a trace of version {version}; this program reads 1 and {VERSION}"
        )
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
        scores, layer = layer & (SCORES | FORESEEN), layer & ~(SCORES | FORESEEN)
        end = at + (Candidates.n_bytes(n, k) if scores == SCORES else 2 * k * n)
        if k > facts.n_experts or (end <= len(body) and not steps):
            raise InputError(f"{path} is damaged at byte {at}; record the trace again")
        if end > len(body):
            return steps[:-1]
        ids = np.frombuffer(body[at:end], "<u2", n * k).reshape(n, k).astype(np.uint16)
        if ids.size and ids.max() >= facts.n_experts:
            raise InputError(f"{path} names expert {ids.max()} of {facts.n_experts}; it is damaged")
        if scores == SCORES:
            steps[-1].scored[layer] = Candidates.unpack(body[at:end], n, k)
        else:
            (steps[-1].foreseen if scores else steps[-1].chosen)[layer] = ids
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
