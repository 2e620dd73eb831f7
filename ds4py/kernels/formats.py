"""Matrices in the bytes they are stored in, as the kernels read them.

metal/include/formats.h is the other side of this: the same codes and the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ds4py.formats import fp_blocks
from ds4py.formats.gguf_blocks import FORMATS, block_format, decode, decode_mlx
from ds4py.kernels.ops import Array, PackedWeight

PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
"""Formats of rows without blocks, and the bytes of a value."""
FP8 = "FP8"
"""Blocks of an E8M0 scale and its 128 E4M3 codes, fewer at the end of a row."""
CODES = {"F32": 0, "F16": 1, "BF16": 30, FP8: 128} | {f.name: f.gguf_type for f in FORMATS.values()}
"""What the kernels call a format."""
OCTET = 8
"""Values a lane reads at a time: rows are a multiple of it long."""


@dataclass(frozen=True)
class PackedMatrix:
    """One linear map [out, in], or several of them one below the other."""

    format: str
    """A key of CODES."""
    rows: Array
    """uint8 [out, bytes of a row], beginning at a multiple of 16 bytes in its buffer."""
    n_in: int
    kind: tuple[int, int, int] = field(init=False)
    """What kernels are compiled for: code, out, in."""

    def __post_init__(self) -> None:
        want = row_bytes(self.format, self.n_in)
        assert self.n_in % OCTET == 0, f"{self.n_in} inputs are not a multiple of {OCTET}"
        assert self.rows.shape[1:] == (want,), f"rows {self.rows.shape} are not {want} bytes long"
        kind = CODES[self.format], self.rows.shape[0], self.n_in
        object.__setattr__(self, "kind", kind)  # once, because every launch asks

    @property
    def code(self) -> int:
        return self.kind[0]


@dataclass(frozen=True)
class ExpertRecords:
    """Routed experts, one record per slot: gate, up and down map somewhere in each."""

    records: Array
    """uint8 [slots, record_bytes], beginning at a multiple of 16 bytes in its buffer."""
    formats: tuple[str, str]
    """Of gate and up, and of down."""
    starts: tuple[int, int, int]
    """First byte of gate, up and down in a record."""
    n_in: int
    n_inner: int

    @classmethod
    def of(cls, w13: PackedWeight, w2: PackedWeight) -> ExpertRecords:
        """From the two maps of `moe.routed`, which share their records."""
        (gate, gate_format), (up, up_format) = w13.parts
        ((down, down_format),) = w2.parts
        assert gate_format == up_format and w13.records is w2.records
        starts = (gate.start, up.start, down.start)
        assert all(start % 4 == 0 for start in (*starts, w13.records.shape[1]))
        return cls(w13.records, (gate_format, down_format), starts, w13.n_in, w2.n_in)

    def matrices(self, slot: int) -> tuple[PackedMatrix, PackedMatrix, PackedMatrix]:
        """Gate, up and down of one slot."""
        shapes = ((self.n_inner, self.n_in), (self.n_inner, self.n_in), (self.n_in, self.n_inner))
        names = (self.formats[0], *self.formats)
        made = []
        for start, name, (n_out, n_in) in zip(self.starts, names, shapes, strict=True):
            width = row_bytes(name, n_in)
            part = self.records[slot, start : start + n_out * width]
            made.append(PackedMatrix(name, part.reshape(n_out, width), n_in))
        return made[0], made[1], made[2]


def row_bytes(name: str, n_in: int) -> int:
    """Bytes of a row of `n_in` values. WeightsError when no whole number of blocks fits."""
    if name in PLAIN:
        return PLAIN[name] * n_in
    if name == FP8:
        return n_in + -(-n_in // fp_blocks.FP8_BLOCK)
    return block_format(name).row_bytes(n_in)


def row_values(name: str, n_bytes: int) -> int:
    """Values of a row of `n_bytes`: `row_bytes` undone."""
    if name in PLAIN:
        return n_bytes // PLAIN[name]
    if name == FP8:
        return n_bytes * fp_blocks.FP8_BLOCK // (fp_blocks.FP8_BLOCK + 1)
    return block_format(name).row_values(n_bytes)


def unpack(name: str, rows: Array, n_in: int) -> Array:
    """uint8 [..., bytes of a row] -> float32 [..., n_in], lazily where the rows are MLX's."""
    lazy = isinstance(rows, mx.array)
    if name == "BF16" and not lazy:
        return fp_blocks.decode_bf16(np.ascontiguousarray(rows).view(np.uint16))
    if name in PLAIN:
        if not lazy:
            kind = np.dtype(np.float32 if name == "F32" else np.float16)
            return np.ascontiguousarray(rows).view(kind).astype(np.float32)
        return rows.view({"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[name]).astype(
            mx.float32
        )
    if name == FP8:
        xp = mx if lazy else np
        codes, scales = xp.array(fp_blocks.E4M3), xp.array(fp_blocks.E8M0)
        block = np.arange(n_in) // fp_blocks.FP8_BLOCK
        first = block * (fp_blocks.FP8_BLOCK + 1)
        values, scale = rows[..., xp.array(np.arange(n_in) + block + 1)], rows[..., xp.array(first)]
        return codes[values] * scales[scale]
    return (decode_mlx if lazy else decode)(name, rows)
