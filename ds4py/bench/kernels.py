"""What one step costs, counted without running it: launches, bytes, host time.

The step is built exactly as the decode loop builds it, inside a trace of MLX's, where kernels may
be launched without a GPU; nothing is computed. Launches are counted in the graph, those of MLX's
own operations too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from time import perf_counter, process_time
from typing import Any, cast

import mlx.core as mx
import numpy.typing as npt

from ds4py import assets
from ds4py.bench import speed, traffic
from ds4py.bench.blank import Blank, FormatOf, unallocated
from ds4py.cache.rows import capacity
from ds4py.cache.state import SequenceState
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
IN_PLACE = "SliceUpdate"
"""Writes a state's new rows into the old ones' memory."""
KERNEL = "CustomKernel"
REPEAT = 12
"""Times a step is built; the first ones are recorded, the others replay them."""
TOGETHER = (2, 4, 8)
"""Sequences that are decoded in one step."""


@dataclass(frozen=True)
class StepCost:
    """One step, its commit and the choice of the next token."""

    position: int
    """Tokens before the step, of each sequence."""
    n_tokens: int
    """Of each sequence."""
    n_sequences: int
    kernels: dict[str, int]
    """Launches of the project's kernels, by name."""
    operations: dict[str, int]
    """Launches of MLX's own operations, by primitive; a concatenation is one per input."""
    largest: tuple[str, int]
    """What makes the largest new buffer, and its bytes."""
    new_bytes: int
    """Of all new buffers, most of which share memory one after the other."""
    build_ms: float
    """Processor time of building the step: the least of several."""
    n_bytes: dict[str, int]
    """What a step of one token must read, by class."""

    @property
    def launches(self) -> int:
        return sum(self.kernels.values()) + sum(self.operations.values())


class _Exported(MlxOps):
    """Operations that MLX can export."""

    def copy(self, x: mx.array) -> mx.array:
        return x + mx.array(0, x.dtype)  # a copy has no other name there


def trace_step(
    config: ModelConfig,
    format_of: FormatOf,
    position: int,
    n_tokens: int = 1,
    n_sequences: int = 1,
) -> StepCost:
    """A step of `n_tokens` of each sequence after `position` tokens."""
    launcher = Launcher(METAL_KERNEL, adopt=_blank, lazy=True)
    loader = Loader(
        Blank(config, format_of), cast(Ops, _Exported()), mx.bfloat16, True, True, launcher
    )
    model = loader.transformer()
    times = []

    def build() -> list[Array]:
        states = [state_at(model, position) for _ in range(n_sequences)]
        tokens = unallocated((n_sequences * n_tokens,), mx.int32)
        start = process_time()
        arrays = step(model, states, tokens, launcher)
        times.append(process_time() - start)
        return arrays

    nodes = graph(build, REPEAT if n_tokens == 1 else 2)
    kernels, operations, sizes = _count(nodes)
    n_bytes = traffic.bytes_per_token(model, loader.resident, state_at(model, position))
    return StepCost(
        *(position, n_tokens, n_sequences, kernels, operations),
        *(max(sizes, key=lambda made: made[1]), sum(size for _, size in sizes)),
        *(1000 * min(times), n_bytes if n_tokens == n_sequences == 1 else {}),
    )


def _blank(host: npt.NDArray[Any]) -> mx.array:
    return unallocated(host.shape, getattr(mx, host.dtype.name))


def step(
    model: Transformer, states: Sequence[SequenceState], tokens: mx.array, launcher: Launcher
) -> list[Array]:
    """As `engine.decode` does it: what one step leaves to evaluate."""
    n = tokens.shape[0] // len(states)
    sequences = [(state, n) for state in states]
    logits, deltas = model.step_together(tokens, sequences, len(states))
    arrays: list[Array] = [logits]
    for i, (state, delta) in enumerate(zip(states, deltas, strict=True)):
        state.commit(delta, n)
        sampler = Sampler(SamplingOptions(seed=1), [], logits.shape[-1], launcher=launcher)
        token = sampler(logits[i : i + 1].squeeze(0), state.position)
        arrays += [token, *state.pending()]
    return arrays


def state_at(model: Transformer, position: int) -> SequenceState:
    """A sequence of that length, never computed."""
    state = model.new_state()
    for s in state.series:
        store = state.rows[s.name]
        n_layers, _, width = store.data.shape
        shape = (n_layers, capacity(s.count(position)), width)
        store.data = unallocated(shape, store.data.dtype)
    values = {name: unallocated(v.shape, mx.float32) for name, v in state.frontier.values.items()}
    window = unallocated(state.frontier.window.shape, state.frontier.window.dtype)
    state.frontier = replace(state.frontier, position=position, window=window, values=values)
    return state


Node = dict[str, Any]


def graph(build: Callable[[], list[Array]], repeat: int = 1) -> list[Node]:
    """The graph of what `build` makes the last of several times, as MLX exports it: constants, and
    a node for every primitive: its name, arguments, inputs and outputs."""
    nodes: list[Node] = []

    def traced(unused: mx.array) -> list[Array]:
        made = build()
        for _ in range(1, repeat):
            made = build()
        return made

    mx.export_function(nodes.append, traced, mx.zeros(()))
    return nodes


def _count(nodes: Sequence[Node]) -> tuple[dict[str, int], dict[str, int], list[tuple[str, int]]]:
    """Launches of kernels, of MLX's operations, and every new buffer's bytes with its maker."""
    kernels, operations, sizes = Counter[str](), Counter[str](), list[tuple[str, int]]()
    for node in nodes:
        name = node.get("name")
        if name is None or name in VIEWS:
            continue
        if name == KERNEL:
            name = _kernel_name(node["arguments"][0])
            kernels[name] += 1
        else:
            operations[name] += len(node["inputs"]) if name == "Concatenate" else 1
        if name != IN_PLACE:
            made = (prod(shape) * dtype.size for _, shape, dtype in node["outputs"])
            sizes += [(name, size) for size in made]
    return dict(kernels), dict(operations), sizes


@cache
def _kernel_name(function: str) -> str:
    """Of the file it comes from; MLX appends the template's values."""
    names = (path.stem for path in assets.path("metal").glob("*.metal"))
    return next(name for name in names if function.startswith(f"custom_kernel_{name}_"))


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
