"""What one step costs, counted without running it: launches, bytes, host time.

The step is built exactly as the decode loop builds it, inside a trace of MLX's, where kernels may
be launched without a GPU; nothing is computed. Launches are counted in the graph, those of MLX's
own operations too.
"""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, cast

import mlx.core as mx
import numpy.typing as npt

from ds4py.bench import speed, traffic
from ds4py.bench.blank import Blank, FormatOf, unallocated
from ds4py.cache.rows import capacity
from ds4py.cache.state import Frontier, SequenceState
from ds4py.config import ModelConfig
from ds4py.engine.engine import Engine
from ds4py.engine.options import SamplingOptions
from ds4py.engine.sampling import Sampler
from ds4py.kernels.build import METAL_KERNEL, Launcher
from ds4py.kernels.ops import Array, MlxOps, Ops
from ds4py.model.moe import ResidentExperts
from ds4py.model.transformer import Transformer
from ds4py.weights.load import Loader

VIEWS = frozenset(
    "AsStrided Broadcast BroadcastAxes ExpandDims Flatten Reshape Slice Split Squeeze StopGradient "
    "Transpose Unflatten View".split()
)
"""MLX operations that only look at their input in another way."""
KERNEL = "CustomKernel"
REPEAT = 20
"""Times a step is built; the first one plans its launches, the others replay them."""


@dataclass(frozen=True)
class StepCost:
    """One step, its commit and the choice of the next token."""

    position: int
    """Tokens before the step."""
    n_tokens: int
    kernels: dict[str, int]
    """Launches of the project's kernels, by name."""
    operations: dict[str, int]
    """Launches of MLX's own operations, by primitive; a concatenation is one per input."""
    largest: tuple[str, int]
    """The kernel with the largest new buffer, and its bytes."""
    build_ms: float
    """Processor time of building the step: the least of several."""
    n_bytes: dict[str, int]
    """What a step of one token must read, by class."""

    @property
    def launches(self) -> int:
        return sum(self.kernels.values()) + sum(self.operations.values())


class _Traced(Exception):
    """Ends a trace before MLX would evaluate what it captured."""


def trace_step(
    config: ModelConfig, format_of: FormatOf, position: int, n_tokens: int = 1
) -> StepCost:
    """A step of `n_tokens` after `position` tokens."""
    launcher = _Recorder()
    loader = Loader(
        Blank(config, format_of), cast(Ops, MlxOps()), mx.bfloat16, True, True, launcher
    )
    model = loader.transformer()
    found: list[StepCost] = []

    def traced(tokens: mx.array) -> mx.array:
        best, arrays = float("inf"), list[Array]()
        for _ in range(REPEAT):
            arrays.clear()  # its graph is gone by then in the decode loop, too
            launcher.counters.clear()
            state = state_at(model, position)
            known, _ = _graph([*launcher.adopted, *state.pending()])
            start = process_time()
            arrays = _step(model, state, tokens, launcher)
            best = min(best, process_time() - start)
        kernels, operations = dict(launcher.counters), _operations(arrays, known)
        n_bytes = traffic.bytes_per_token(model, loader.resident, state_at(model, position))
        cost = StepCost(
            position, n_tokens, kernels, operations, launcher.largest, 1000 * best, n_bytes
        )
        found.append(cost)
        raise _Traced

    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(_Traced):
        path, tokens = str(Path(folder) / "step"), mx.zeros((n_tokens,), mx.int32)
        mx.export_function(path, traced, tokens)
    return found[0]


def _step(
    model: Transformer, state: SequenceState, tokens: mx.array, launcher: Launcher
) -> list[Array]:
    """As `engine.decode` does it."""
    logits, delta = model.step(tokens, state, 1)
    state.commit(delta, tokens.shape[0])
    sampler = Sampler(SamplingOptions(seed=1), [], logits.shape[-1], launcher=launcher)
    return [sampler(logits[-1], state.position), logits, *state.pending()]


def state_at(model: Transformer, position: int) -> SequenceState:
    """A sequence of that length, never computed."""
    state = model.new_state()
    for s in state.series:
        store = state.rows[s.name]
        n_layers, _, width = store.data.shape
        store.data = mx.zeros((n_layers, capacity(s.count(position)), width), store.data.dtype)
    values = {name: mx.zeros(v.shape) for name, v in state.frontier.values.items()}
    window = mx.zeros(state.frontier.window.shape, state.frontier.window.dtype)
    state.frontier = Frontier(position, window, values)
    return state


class _Recorder(Launcher):
    """A launcher that remembers the largest buffer of a step."""

    def __init__(self) -> None:
        super().__init__(METAL_KERNEL, adopt=self._adopt)
        self.largest = ("", 0)
        self.adopted: list[mx.array] = []

    def _adopt(self, host: npt.NDArray[Any]) -> mx.array:
        self.adopted.append(unallocated(host))
        return self.adopted[-1]

    def launch(self, name: str, *rest: Any) -> list[Array]:
        for shape, dtype in rest[-1]:
            self.largest = max(self.largest, (name, prod(shape) * dtype.size), key=lambda x: x[1])
        return super().launch(name, *rest)


def _operations(arrays: list[Array], known: Container[str]) -> dict[str, int]:
    """Launches of MLX's own operations in the graph below `arrays`, without `known` nodes."""
    nodes, inputs = _graph(arrays)
    counted: Counter[str] = Counter()
    for node, name in nodes.items():
        if name != KERNEL and name not in VIEWS and node not in known:
            counted[name] += inputs[node] if name == "Concatenate" else 1
    return dict(counted)


def _graph(arrays: list[Array]) -> tuple[dict[str, str], Counter[str]]:
    """The primitives below some arrays, and how many inputs each has."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    nodes = dict(re.findall(r'\{ (\d+) \[label ="(\w+)"', text.getvalue()))
    return nodes, Counter(re.findall(r"-> (\d+)$", text.getvalue(), re.MULTILINE))


@dataclass(frozen=True)
class TokenTime:
    """Decoding on this machine's GPU, against how fast it reads memory."""

    position: int
    ms: float
    gb_per_s: float
    limit_gb_per_s: float
    """Of summing a large array: what plain reading reaches here."""


def time_token(engine: Engine, position: int, n_tokens: int = 32) -> TokenTime:
    """Milliseconds per token after `position` tokens, the experts resident."""
    prompt = speed.make_prompt(engine, position)
    session = engine.session()
    session.sync(prompt)
    options = SamplingOptions(max_tokens=n_tokens, temperature=0.0, stop_at_eos=False)
    steps = session.generate(options)
    next(steps)
    start = perf_counter()
    n = sum(1 for _ in steps)
    seconds = (perf_counter() - start) / n
    state = state_at(engine.model, position)
    assert isinstance(engine.experts, ResidentExperts)
    n_bytes = sum(traffic.bytes_per_token(engine.model, engine.experts, state).values())
    return TokenTime(position, 1000 * seconds, n_bytes / seconds / 1e9, memory_rate() / 1e9)


def memory_rate(n_bytes: int = 1 << 30) -> float:
    """Bytes per second of reading one large array on MLX's default device, the best of three."""
    values = mx.zeros((n_bytes // 4096, 1024))
    mx.eval(values)
    best = float("inf")
    for _ in range(3):
        start = perf_counter()
        mx.eval(values.sum())
        best = min(best, perf_counter() - start)
    return n_bytes / best
