"""How rows are stored, and the growing arrays that hold the compressed ones.

A native row is the bytes of the formats the model was trained with, so storing it loses nothing:
the rounding that training put between a row's computation and its use IS the packing.

    attention row   E4M3 codes of the channels before the rotated tail, one E8M0 scale per 64 of
                    them, zero padding to an even offset, the rotated tail as little-endian BF16.
                    Flash: 448 + 7 + 1 + 128 = 584 bytes. Window and compressed rows alike.
    index row       packed E2M1 (channel 2i in the low nibble of byte i, 2i+1 in the high one), one
                    E8M0 scale per 32 channels. Flash: 64 + 4 = 68 bytes.

DeepSeek's own model keeps the rotated tail in BF16 because its activations are: a float32 run with
trained rounding rounds the tail to BF16 too, and then computes with what the bytes say. Two kinds
of run keep rows as floats: without trained rounding there is nothing to store losslessly in less,
and `dtype="float32"` asked for by name promises the published mathematics, whose float references
round the codes but not the tail.

Row counts live in the sequence state; rows below a count are never rewritten while a state that
counts them can be used. What lies beyond a count is stale.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from ds4py.config import ModelConfig
from ds4py.kernels import rounding
from ds4py.kernels.ops import Array, Dtype, Ops


@dataclass(frozen=True)
class RowLayout:
    """Where the parts of one native row lie, in bytes."""

    n_codes: int
    """Channels stored as codes, before the tail."""
    code_bits: int
    """8: E4M3. 4: E2M1, two in a byte."""
    block: int
    """Channels that share one E8M0 scale."""
    n_tail: int
    """Channels stored as BF16, the last ones."""

    @property
    def scales_at(self) -> int:
        return self.n_codes * self.code_bits // 8

    @property
    def n_scales(self) -> int:
        return self.n_codes // self.block

    @property
    def tail_at(self) -> int:
        end = self.scales_at + self.n_scales
        return end + end % 2

    @property
    def row_bytes(self) -> int:
        return self.tail_at + 2 * self.n_tail


def attention_layout(config: ModelConfig) -> RowLayout:
    """Of window and compressed rows."""
    return RowLayout(
        config.nope_head_dim, 8, rounding.FP8_ROW_BLOCK, config.head_dim - config.nope_head_dim
    )


def index_layout(config: ModelConfig) -> RowLayout:
    """Of the indexer's rows."""
    return RowLayout(config.index_head_dim, 4, rounding.FP4_ROW_BLOCK, 0)


def pack(ops: Ops, layout: RowLayout, x: Array) -> Array:
    """Rows [..., channels] -> uint8 [..., row_bytes], rounded as the model was trained.

    Index rows get their Hadamard transform here, as `rounding.fp4_round` does.
    """
    codes, scales = (rounding.fp8_codes if layout.code_bits == 8 else rounding.fp4_codes)(
        ops, x[..., : layout.n_codes]
    )
    parts = [codes, scales]
    if layout.tail_at > layout.scales_at + layout.n_scales:
        parts.append(ops.zeros((*x.shape[:-1], 1), ops.uint8))
    if layout.n_tail:
        bits = ops.float_bits(x[..., layout.n_codes :].astype(ops.float32))
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        parts.append(bits.astype(ops.uint16).view(ops.uint8))
    return ops.concatenate(parts, axis=-1)


def unpack(ops: Ops, layout: RowLayout, stored: Array) -> Array:
    """uint8 [..., row_bytes] -> float32 [..., channels]; every value is exact."""
    codes = stored[..., : layout.scales_at]
    scales = stored[..., layout.scales_at : layout.scales_at + layout.n_scales]
    if layout.code_bits == 4:
        values = rounding.fp4_values(ops, codes, scales)
    else:
        values = rounding.fp8_values(ops, codes, scales)
    if not layout.n_tail:
        return values
    bits = stored[..., layout.tail_at :].view(ops.uint16).astype(ops.uint32) << 16
    return ops.concatenate([values, ops.bits_float(bits)], axis=-1)


@dataclass(frozen=True)
class RowFormat:
    """How rows of one kind are kept: packed on the way into the state, unpacked where read."""

    ops: Ops
    layout: RowLayout
    dtype: Dtype
    """Of the model's activations."""
    native: bool
    """Bytes of `layout`; else floats of `dtype`."""
    rounded: bool
    """Whether rows get their trained rounding; native rows always do."""

    @property
    def width(self) -> int:
        """Length of a stored row, in `stored_dtype`."""
        channels = self.layout.n_codes + self.layout.n_tail
        return self.layout.row_bytes if self.native else channels

    @property
    def stored_dtype(self) -> Dtype:
        return self.ops.uint8 if self.native else self.dtype

    def pack(self, x: Array) -> Array:
        """Rows [..., channels] as computed -> [..., width] as stored."""
        if self.native:
            return pack(self.ops, self.layout, x)
        if not self.rounded:
            return x
        if self.layout.code_bits == 4:
            return rounding.fp4_round(self.ops, x)
        return rounding.fp8_round(self.ops, x, self.layout.n_codes)

    def unpack(self, stored: Array) -> Array:
        """Stored rows [..., width] -> [..., channels] in `dtype`, as the model reads them."""
        if not self.native:
            return stored
        return self.ops.cast(unpack(self.ops, self.layout, stored), self.dtype)


@dataclass(frozen=True)
class RowFormats:
    """The formats of one model's rows."""

    attention: RowFormat
    index: RowFormat


def row_formats(
    ops: Ops, config: ModelConfig, dtype: Dtype, rounded: bool, native: bool
) -> RowFormats:
    """Formats for activations of `dtype`; native needs rounded."""
    assert rounded or not native
    layouts = attention_layout(config), index_layout(config)
    return RowFormats(*(RowFormat(ops, layout, dtype, native, rounded) for layout in layouts))


FIRST_CAPACITY = 256
"""Rows allocated at first, a multiple of every tile."""
LARGEST_STEP = 16384
"""Rows a store grows by at most: until then it doubles."""


def capacity(n_rows: int) -> int:
    """Rows to allocate for `n_rows`: growing copies little, and little is left empty."""
    rows = 0
    while rows < n_rows:
        rows += min(max(rows, FIRST_CAPACITY), LARGEST_STEP)
    return rows


class RowStore:
    """Append-only rows of all layers of one series: [layers, capacity, width].

    Copy on write: a store that was shared keeps the array and may append to it; it moves to a new
    one before it overwrites rows that others read. The store it was shared with reads the same
    array and moves before its first write.
    """

    def __init__(self, ops: Ops, n_layers: int, width: int, dtype: Dtype):
        self._ops = ops
        self.data: Array = ops.zeros((n_layers, 0, width), dtype)
        self._borrowed = False
        self._lent = 0
        """Rows that others may still read."""

    @property
    def row_bytes(self) -> int:
        """Of one layer's row."""
        return int(self.data.itemsize) * int(self.data.shape[2])

    def share(self, n_rows: int) -> RowStore:
        """A store whose first n rows are these, without a copy."""
        other = copy.copy(self)
        other._borrowed, other._lent = True, n_rows
        self._lent = max(self._lent, n_rows)
        return other

    def write(self, start: int, rows: Array) -> None:
        """Place rows [layers, n, width] at start, growing when needed."""
        end = start + rows.shape[1]
        if self._borrowed or start < self._lent:
            self._move(start, end)
        elif end > self.data.shape[1]:
            self._move(self.data.shape[1], end)
        self.data[:, start:end] = rows

    def _move(self, n_kept: int, n_rows: int) -> None:
        """To a new array with the first rows of the old one and room for `n_rows`."""
        n_layers, _, width = self.data.shape
        room = self._ops.zeros((n_layers, capacity(n_rows) - n_kept, width), self.data.dtype)
        self.data = self._ops.concatenate([self.data[:, :n_kept], room], axis=1)
        self._borrowed, self._lent = False, 0
