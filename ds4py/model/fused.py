"""The operations a step is made of, cut where Metal launches kernels.

The model's text is written once against `Fused`. `reference.Reference` composes each operation of
plain array operations; on Metal each is one launch or a few. What one operation hands to the next
(`Residual`, `Routing`) is that set's own business: the text passes it on without looking inside.

Shape letters as in `transformer`: S new tokens, H streams, D hidden, E experts, k chosen experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from ds4py.cache.state import LayerDelta, Stack
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.ops import Array, LinearMaps, Ops

if TYPE_CHECKING:
    from ds4py.model.attention import Attention
    from ds4py.model.moe import MoE
    from ds4py.model.mtp import DraftLayer
    from ds4py.model.plan import StepPlans


@dataclass(frozen=True)
class Streams:
    """The residual streams between two sublayers."""

    values: Array
    """[S, H, D]"""
    partials: Array | None = None
    """What the kernel that wrote `values` already summed for their reader: float32 [P, S, R + 1],
    products with the R rows of its fn and the sum of squares, in P parts. None: not summed."""

    def last(self, n: int) -> Streams:
        """Those of the last n positions."""
        first, sums = self.values.shape[0] - n, self.partials
        if not first:
            return self
        if sums is not None:
            sums = mx.take(sums, mx.arange(first, first + n), axis=1)  # a slice has gaps
        return Streams(self.values[first:], sums)


@dataclass(frozen=True)
class Residual:
    """What a sublayer's output will be added to."""

    streams: Array
    """[S, H, D]"""
    gates: Any
    """How the output and the old streams make the new ones: post [S, H] and comb [S, H, H]."""


@dataclass(frozen=True)
class Routing:
    """Each token's experts."""

    ids: Array
    """[S, k] int32"""
    weights: Array
    """[S, k] float32"""
    shared: Any = None
    """Products of the shared expert that came with the router's."""


class Fused(Protocol):
    """What both sets offer. `reader` is the hyper-connection that reads the result."""

    @property
    def ops(self) -> Ops:
        """The array operations around the fused ones."""
        ...

    def embed(self, table: Array, tokens: Array, n_streams: int, reader: HyperWeights) -> Streams:
        """Rows `tokens` [S] of table [V, D], once per stream."""
        ...

    def enter(self, streams: Streams, reader: HyperWeights, norm: Array) -> tuple[Array, Residual]:
        """Mix the streams into a sublayer's input, normed: [S, D], and keep the rest."""
        ...

    def project(self, x: Array, layer: Attention, plans: StepPlans) -> Any:
        """x [S, D] through the maps that share it, and the latent query, normed, through w_q: for
        `attend` to read."""
        ...

    def attend(
        self, projected: Any, layer: Attention, plans: StepPlans
    ) -> tuple[Any, list[LayerDelta]]:
        """Norm and rotate queries; norm, rotate and pack the new rows; pool windows that close;
        choose compressed rows; attend to window and compressed rows, and rotate back: for each
        sequence of the step, which sees its own rows only. For `leave`, and what the layer adds to
        each sequence."""
        ...

    def leave(
        self, attended: Any, layer: Attention, residual: Residual, reader: HyperWeights
    ) -> Streams:
        """Each group of heads through its own map, side by side through wo_b, into the streams."""
        ...

    def route(self, x: Array, layer: MoE, tokens: Array) -> Routing:
        """Choose experts for x [S, D]; hash-routed layers look at the token ids [S]."""
        ...

    def experts(
        self, x: Array, layer: MoE, routing: Routing, residual: Residual, reader: HyperWeights
    ) -> Streams:
        """x [S, D] through the chosen experts and the shared one, added to the streams."""
        ...

    def draft(self, layer: DraftLayer, streams: Array, tokens: Array) -> Streams:
        """The draft layer's input: streams [S, H, D] of a position and the token after it [S]."""
        ...

    def rows(self, x: Array, layer: Attention, plans: StepPlans) -> list[LayerDelta]:
        """Window rows of a layer without compressor, of x [S, D] as in `project`, without what
        attends to them."""
        ...

    def head(
        self, streams: Streams, reader: HyperWeights, norm: Array, weight: LinearMaps
    ) -> mx.array:
        """Float32 logits [S, V]."""
        ...

    @property
    def stack(self) -> Stack | None:
        """How a commit stacks layers; None: by plain operations."""
        ...
