"""What an expert record means: the maps that lie in it."""

from __future__ import annotations

from ds4py.config import ModelConfig
from ds4py.formats.bundle import LayerRecords
from ds4py.kernels.ops import Array, PackedWeight


def maps_of(
    layer: LayerRecords, records: Array, config: ModelConfig
) -> tuple[PackedWeight, PackedWeight]:
    """Gate and up, and down, as maps over records uint8 [n, record_bytes or more]."""
    gate, up, down = zip(layer.layout.slices(), layer.formats, strict=True)
    return (
        PackedWeight(records, (gate, up), config.hidden_size),
        PackedWeight(records, (down,), config.moe_intermediate_size),
    )
