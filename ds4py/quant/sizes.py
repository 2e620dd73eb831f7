"""What a recipe will make of a model, computed from its config: bytes by class, nothing fetched.

Sizes as published follow from which tensors DeepSeek stores how; for Flash and Pro their sum is the
`total_size` of the published index, to the byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds4py.config import ModelConfig
from ds4py.formats.bundle import RECORD_ALIGN
from ds4py.formats.fp_blocks import scale_shape
from ds4py.formats.gguf import size_of
from ds4py.formats.gguf_blocks import block_format
from ds4py.quant.recipe import KEEP, Recipe, class_of
from ds4py.quant.to_gguf import type_of
from ds4py.weights import names
from ds4py.weights.bundle import ROUTED
from ds4py.weights.gguf import slots

_FP8 = re.compile(
    r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$"
    r"|shared_experts\.w[123]\.weight$|[eh]_proj\.weight$"
)
_F32 = re.compile(r"hc_|\.ape$|attn_sink$|gate\.bias$")


@dataclass
class ClassSize:
    """The tensors of one class of the recipe, added up; `draft layers` are a class of their own."""

    name: str
    tensors: int = 0
    parameters: int = 0
    n_bytes: int = 0

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.n_bytes / self.parameters if self.parameters else 0.0


Sizes = dict[str, ClassSize]


def published(config: ModelConfig) -> Sizes:
    """The checkpoint as DeepSeek publishes it: experts FP4, most matrices FP8."""
    return _added(config, _published)


def of_bundle(config: ModelConfig, recipe: Recipe) -> Sizes:
    """The bundle that `ds4 quantize` makes of it; records with their padding."""

    def size(name: str, shape: tuple[int, ...]) -> int:
        fmt = recipe.format_of(name)
        if fmt == KEEP or not (name.endswith(".weight") and len(shape) == 2):
            return _published(name, shape)
        return shape[0] * block_format(fmt).row_bytes(shape[1])

    sizes = _added(config, size)
    shapes = _shapes(config)
    for prefix in {name.split(".ffn.experts.")[0] for name in shapes if ROUTED.search(name)}:
        stem = f"{prefix}.ffn.experts.0"
        used = sum(size(n, shapes[n]) for n in (f"{stem}.w{i}.weight" for i in (1, 2, 3)))
        padding = config.n_routed_experts * (-used % RECORD_ALIGN)
        sizes[_class(f"{stem}.w2.weight")].n_bytes += padding
    return sizes


def of_gguf(config: ModelConfig, recipe: Recipe) -> Sizes:
    """The tensors of the GGUF file that `ds4 quantize --to gguf` makes, without a draft layer.

    Raises InputError for a recipe that layout has no place for.
    """
    sizes: Sizes = {}
    for slot in slots(config):
        _add(sizes, slot.holds[0], math.prod(slot.dims), size_of(type_of(slot, recipe), slot.dims))
    return sizes


def total(sizes: Mapping[str, ClassSize]) -> ClassSize:
    """All classes together."""
    every = sizes.values()
    return ClassSize(
        "all",
        sum(s.tensors for s in every),
        sum(s.parameters for s in every),
        sum(s.n_bytes for s in every),
    )


def _published(name: str, shape: tuple[int, ...]) -> int:
    n = math.prod(shape)
    if ROUTED.search(name):
        return n // 2 + math.prod(scale_shape("I8", (shape[0], shape[1])))
    if _FP8.search(name):
        return n + math.prod(scale_shape("F8_E4M3", (shape[0], shape[1])))
    if name.endswith("tid2eid"):
        return 8 * n
    return n * (4 if _F32.search(name) else 2)


def _shapes(config: ModelConfig) -> names.Shapes:
    draft = names.expected_draft(config) if config.mtp_layers else {}
    return names.expected(config) | draft


def _added(config: ModelConfig, size: Callable[[str, tuple[int, ...]], int]) -> Sizes:
    sizes: Sizes = {}
    for name, shape in _shapes(config).items():
        _add(sizes, name, math.prod(shape), size(name, shape))
    return sizes


def _add(sizes: Sizes, name: str, parameters: int, n_bytes: int) -> None:
    kind = _class(name)
    found = sizes.setdefault(kind, ClassSize(kind))
    found.tensors += 1
    found.parameters += 0 if name.endswith("tid2eid") else parameters
    found.n_bytes += n_bytes


def _class(name: str) -> str:
    return "draft layers" if name.startswith("mtp.") else class_of(name)
