"""Building the model from a checkpoint, tensor by tensor.

Peak memory is the model plus one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ds4py.cache.rows import RowFormat, row_formats
from ds4py.cache.state import Series, series_of
from ds4py.config import LayerPlan, ModelConfig
from ds4py.errors import ConfigError
from ds4py.formats.bundle import RecordLayout
from ds4py.kernels.build import Launcher
from ds4py.kernels.decoded import DecodedMaps
from ds4py.kernels.hyper import HyperWeights
from ds4py.kernels.ops import F32, Array, Dtype, LinearMaps, Ops, PackedWeight
from ds4py.kernels.rounding import FP4_ROW_BLOCK, FP8_ROW_BLOCK
from ds4py.model.attention import Attention, Compressor
from ds4py.model.block import Block
from ds4py.model.fused import Fused
from ds4py.model.metal import Metal
from ds4py.model.moe import ExpertSource, ExpertWeight, MoE, ResidentExperts
from ds4py.model.mtp import DraftLayer
from ds4py.model.plan import Frequencies
from ds4py.model.reference import Reference
from ds4py.model.transformer import Transformer
from ds4py.weights.maps import FloatMaps, Maps, PackedMaps, Part
from ds4py.weights.source import PackedLayer, Source


@dataclass
class Loader:
    """Reads a checkpoint into modules of one numeric type on one `Ops`."""

    checkpoint: Source
    ops: Ops
    dtype: Dtype
    trained_rounding: bool
    native_rows: bool
    """Keep rows in the bytes of the trained formats; needs trained_rounding."""
    launcher: Launcher | None = None
    """Runs the Metal kernels; None: plain operations."""
    streamed: ExpertSource | None = None
    """Where routed experts come from when they are not loaded."""
    decoded: DecodedMaps | None = None
    """Where resident experts' maps are kept once decoded."""

    def __post_init__(self) -> None:
        self.config: ModelConfig = self.checkpoint.config
        self.freqs = Frequencies(self.config)
        self.fused: Fused = Reference(self.ops, self.config)
        self.maps: Maps = FloatMaps(self.checkpoint, self.ops, self.dtype)
        if self.launcher is not None:
            self.fused = Metal(self.ops, self.config, self.launcher, self.dtype, self.native_rows)
            self.maps = PackedMaps(self.checkpoint, self.dtype, self.launcher.adopt)
        self.resident = ResidentExperts(self.ops, self.config.swiglu_limit)
        self.experts: ExpertSource = self.streamed or self.resident
        if self.trained_rounding:
            _check_rounding(self.config)
        self.rows = row_formats(
            self.ops, self.config, self.dtype, self.trained_rounding, self.native_rows
        )

    def transformer(self) -> Transformer:
        """The main model."""
        c = self.config
        embed = self.maps.table("embed")
        series = series_of(c, c.layers)
        blocks = tuple(
            self._block(f"layers.{plan.index}", plan, slot, series)
            for slot, plan in enumerate(c.layers)
        )
        return Transformer(
            config=c,
            fused=self.fused,
            dtype=self.dtype,
            rows=self.rows,
            freqs=self.freqs,
            embed=embed,
            blocks=blocks,
            hc_head=self._hyper("hc_head"),
            norm=self._vector("norm.weight"),
            head=self._linear("head", wide=True),
            experts=self.experts,
        )

    def draft(self, model: Transformer) -> DraftLayer:
        """The first MTP layer; embedding and head are the main model's."""
        plan, prefix = self.config.mtp_layers[0], "mtp.0"
        return DraftLayer(
            config=self.config,
            layer=plan,
            fused=self.fused,
            freqs=self.freqs,
            embed=model.embed,
            head=model.head,
            e_proj=self._linear(f"{prefix}.e_proj"),
            h_proj=self._linear(f"{prefix}.h_proj"),
            enorm=self._vector(f"{prefix}.enorm.weight"),
            hnorm=self._vector(f"{prefix}.hnorm.weight"),
            block=self._block(prefix, plan, len(self.config.layers), ()),
            hc_head=self._hyper(f"{prefix}.hc_head"),
            norm=self._vector(f"{prefix}.norm.weight"),
        )

    def _vector(self, name: str) -> Array:
        return self.ops.array(self.checkpoint.floats(name))

    def _linear(self, name: str, wide: bool = False) -> LinearMaps:
        return self.maps.pack([Part((name,), wide)])

    def _hyper(self, prefix: str) -> HyperWeights:
        return HyperWeights(
            fn=self.maps.mix(f"{prefix}_fn"),
            base=self._vector(f"{prefix}_base"),
            scale=self.ops.array(self._scale(prefix)),
            norm_eps=self.config.rms_norm_eps,
            eps=self.config.hc_eps,
        )

    def _scale(self, prefix: str) -> F32:
        """One scale per row of fn: [pre | post | comb] share three, the head has one."""
        scale, h = self.checkpoint.floats(f"{prefix}_scale"), self.config.hc_mult
        return np.repeat(scale, (h, h, h * h) if len(scale) == 3 else h)

    def _block(self, prefix: str, plan: LayerPlan, slot: int, series: tuple[Series, ...]) -> Block:
        return Block(
            fused=self.fused,
            hc_attn=self._hyper(f"{prefix}.hc_attn"),
            attn_norm=self._vector(f"{prefix}.attn_norm.weight"),
            attn=self._attention(f"{prefix}.attn", plan, slot, series),
            hc_ffn=self._hyper(f"{prefix}.hc_ffn"),
            ffn_norm=self._vector(f"{prefix}.ffn_norm.weight"),
            ffn=self._feed_forward(f"{prefix}.ffn", plan),
        )

    def _attention(
        self, prefix: str, plan: LayerPlan, slot: int, series: tuple[Series, ...]
    ) -> Attention:
        c, of = self.config, {s.name: s for s in series}
        w_in = [Part((f"{prefix}.{name}",)) for name in ("wq_a", "wkv")]
        w_q = [Part((f"{prefix}.wq_b",))]
        compressor = indexer = None
        if plan.compressed:
            w_in.append(_values(f"{prefix}.compressor"))
            compressor = self._compressor(
                f"{prefix}.compressor", of[f"attn{plan.ratio}"], self.rows.attention
            )
        if plan.indexed:
            name = f"{prefix}.indexer"
            w_in += [_values(f"{name}.compressor"), Part((f"{name}.weights_proj",))]
            w_q.append(Part((f"{name}.wq_b",)))
            indexer = self._compressor(
                f"{name}.compressor", of[f"index{plan.ratio}"], self.rows.index
            )
        return Attention(
            layer=plan,
            slot=slot,
            fused=self.fused,
            w_in=self.maps.pack(w_in),
            w_q=self.maps.pack(w_q),
            wo_a=self.maps.grouped(f"{prefix}.wo_a", c.o_groups),
            wo_b=self._linear(f"{prefix}.wo_b"),
            q_norm=self.maps.vector(f"{prefix}.q_norm.weight"),
            kv_norm=self._vector(f"{prefix}.kv_norm.weight"),
            sink=self._vector(f"{prefix}.attn_sink"),
            compressor=compressor,
            indexer=indexer,
            n_chosen=c.index_topk,
            rows=self.rows.attention,
        )

    def _ape(self, prefix: str) -> F32:
        """[r, 2*c*d]: zeros for the values, the checkpoint's bias for the scores."""
        ape = self.checkpoint.floats(f"{prefix}.ape")
        return np.concatenate([np.zeros_like(ape), ape], axis=1)

    def _compressor(self, prefix: str, series: Series, rows: RowFormat) -> Compressor:
        return Compressor(
            series=series,
            ape=self.ops.array(self._ape(prefix)),
            norm=self._vector(f"{prefix}.norm.weight"),
            format=rows,
        )

    def _feed_forward(self, prefix: str, plan: LayerPlan) -> MoE:
        read = self.checkpoint
        shared = f"{prefix}.shared_experts"
        w_in = [Part((f"{prefix}.gate",), wide=True), Part((f"{shared}.w1",))]
        if self.streamed is None:
            self.resident.weights[plan.index] = self._experts(plan.index, f"{prefix}.experts")
        hashed, gate = plan.hash_routed, f"{prefix}.gate"
        return MoE(
            index=plan.index,
            fused=self.fused,
            w_in=self.maps.pack([*w_in, Part((f"{shared}.w3",))]),
            shared_w2=self._linear(f"{shared}.w2"),
            bias=None if hashed else self._vector(f"{gate}.bias"),
            tid2eid=self.ops.array(read.integers(f"{gate}.tid2eid")) if hashed else None,
            experts=self.experts,
        )

    def _experts(self, layer: int, prefix: str) -> tuple[ExpertWeight, ExpertWeight]:
        packed = self.checkpoint.packed(layer, mapped=self.launcher is not None)
        if packed is not None:
            return self._packed_experts(packed)
        if self.launcher is not None:
            return self._packed_experts(self._records(prefix))
        c, matrix = self.config, self.checkpoint.matrix
        d, n_inner, n = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
        w13 = self.ops.pack_experts(n, 2 * n_inner, d, self.dtype)
        w2 = self.ops.pack_experts(n, d, n_inner, self.dtype)
        for e in range(n):
            w13.put(e, 0, matrix(f"{prefix}.{e}.w1"))
            w13.put(e, n_inner, matrix(f"{prefix}.{e}.w3"))
            w2.put(e, 0, matrix(f"{prefix}.{e}.w2"))
        return w13.done(), w2.done()

    def _records(self, prefix: str) -> PackedLayer:
        """One layer's experts as records of the bytes they are stored in."""
        stored, n = self.checkpoint.stored, self.config.n_routed_experts
        gate, up, down = (stored(f"{prefix}.0.{w}") for w in ("w1", "w3", "w2"))
        layout = RecordLayout(gate.rows.size, up.rows.size, down.rows.size)
        records = np.zeros((n, layout.record_bytes), np.uint8)
        for e in range(n):
            for w, where in zip(("w1", "w3", "w2"), layout.slices(), strict=True):
                records[e, where] = stored(f"{prefix}.{e}.{w}").rows.ravel()
        return PackedLayer(records, layout, (gate.format, up.format, down.format))

    def _packed_experts(self, layer: PackedLayer) -> tuple[PackedWeight, PackedWeight]:
        records = self.maps.array(layer.records)
        gate, up, down = zip(layer.layout.slices(), layer.formats, strict=True)
        c = self.config
        return (
            PackedWeight(records, (gate, up), c.hidden_size, self.decoded),
            PackedWeight(records, (down,), c.moe_intermediate_size, self.decoded),
        )


def _values(prefix: str) -> Part:
    """wkv above wgate: one projection gives a compressor's values and scores."""
    return Part((f"{prefix}.wkv", f"{prefix}.wgate"), wide=True)


def _check_rounding(config: ModelConfig) -> None:
    """The trained round trips need whole blocks."""
    for key, width, block in (
        ("head_dim - qk_rope_head_dim", config.nope_head_dim, FP8_ROW_BLOCK),
        ("index_head_dim", config.index_head_dim, FP4_ROW_BLOCK),
    ):
        if width % block:
            raise ConfigError(
                f"config.json: {key} is {width}; the trained rounding of rows needs a multiple of "
                f"{block} (or open the model with trained_rounding=False)"
            )
