"""The recipe: which tensor gets which format.

A recipe is JSON: `formats` maps a class of tensors to a format, `rules` override classes for some
layers. "keep" stores a tensor's bits as the checkpoint has them.

    {"name": "2bit", "formats": {"routed.down": "Q2_K"},
     "rules": [{"class": "routed", "layers": "last 6", "format": "Q4_K"}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds4py.errors import InputError

KEEP = "keep"
FORMATS = (KEEP, "Q8_0", "Q6_K", "Q4_K", "Q2_K", "IQ2_XXS", "MXFP4")

DEFAULT: Mapping[str, str] = {
    "routed.gate": "IQ2_XXS",
    "routed.up": "IQ2_XXS",
    "routed.down": "Q2_K",
    "shared": "Q8_0",
    "attention": "Q8_0",
    "head": "Q8_0",
    "draft": "Q8_0",
    "embed": KEEP,
    "indexer": KEEP,
    "compressor": KEEP,
    "router": KEEP,
    "hyper": KEEP,
    "norm": KEEP,
}
"""Asymmetric: what every token reads keeps 8 bits or more, the routed experts 2."""

PATTERNS: tuple[tuple[str, str], ...] = (
    (r"ffn\.experts\.\d+\.w1\.weight$", "routed.gate"),
    (r"ffn\.experts\.\d+\.w3\.weight$", "routed.up"),
    (r"ffn\.experts\.\d+\.w2\.weight$", "routed.down"),
    (r"ffn\.shared_experts\.", "shared"),
    (r"attn\.indexer\.(wq_b|weights_proj)\.", "indexer"),
    (r"compressor\.(wkv|wgate|ape)", "compressor"),
    (r"attn\.(wq_a|wq_b|wkv|wo_a|wo_b)\.", "attention"),
    (r"[eh]_proj\.", "draft"),
    (r"ffn\.gate\.", "router"),
    (r"hc_(attn|ffn|head)_", "hyper"),
    (r"norm\.weight$|attn_sink$", "norm"),
    (r"^embed\.", "embed"),
    (r"^head\.", "head"),
)


def default_format(name: str, kept: str = "BF16") -> str:
    """The default recipe's format of a tensor; `kept`: of what it keeps as it is."""
    chosen = DEFAULT[class_of(name)]
    return kept if chosen == KEEP else chosen


def class_of(name: str) -> str:
    """The class of a checkpoint tensor."""
    return next(kind for pattern, kind in PATTERNS if re.search(pattern, name))


@dataclass(frozen=True)
class Rule:
    """One exception: a class (or a class's prefix, as "routed") in some layers."""

    kind: str
    layers: frozenset[int] | None
    """None = all."""
    format: str


@dataclass(frozen=True)
class Recipe:
    """A format for every tensor."""

    name: str
    formats: Mapping[str, str]
    rules: tuple[Rule, ...] = ()
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @staticmethod
    def load(path: Path | None, n_layers: int) -> Recipe:
        """A recipe file, or the default for None. Raises InputError naming what is wrong."""
        if path is None:
            return Recipe.from_dict({}, n_layers)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise InputError(f"{path} cannot be read as a JSON recipe ({exc})") from exc
        return Recipe.from_dict(raw, n_layers)

    @staticmethod
    def from_dict(raw: Any, n_layers: int) -> Recipe:
        """`n_layers`: what "last 6" counts from. Raises InputError."""
        if not isinstance(raw, dict) or set(raw) - {"name", "about", "formats", "rules"}:
            raise InputError(f"a recipe has name, about, formats and rules; this one is {raw!r}")
        formats = dict(DEFAULT)
        for kind, fmt in dict(raw.get("formats", {})).items():
            if kind not in DEFAULT:
                raise InputError(f"recipe: no class {kind!r}; there are {', '.join(DEFAULT)}")
            formats[kind] = _format(fmt)
        rules = tuple(_rule(rule, n_layers) for rule in raw.get("rules", []))
        return Recipe(str(raw.get("name", "default")), formats, rules, raw)

    def format_of(self, name: str) -> str:
        """The format of a checkpoint tensor; of several rules the last that fits decides."""
        kind, layer = class_of(name), re.match(r"layers\.(\d+)\.", name)
        chosen = self.formats[kind]
        for rule in self.rules:
            fits = kind == rule.kind or kind.startswith(f"{rule.kind}.")
            here = rule.layers is None or (layer is not None and int(layer[1]) in rule.layers)
            if fits and here:
                chosen = rule.format
        return chosen


def _format(name: Any) -> str:
    if name not in FORMATS:
        raise InputError(f"recipe: no format {name!r}; there are {', '.join(FORMATS)}")
    return str(name)


def _rule(raw: Any, n_layers: int) -> Rule:
    if not isinstance(raw, dict) or set(raw) - {"class", "layers", "format"}:
        raise InputError(f"recipe: a rule has class, layers and format; this one is {raw!r}")
    kind = raw.get("class")
    if not any(k == kind or k.startswith(f"{kind}.") for k in DEFAULT):
        raise InputError(f"recipe: no class {kind!r}; there are {', '.join(DEFAULT)}")
    return Rule(str(kind), _layers(raw.get("layers"), n_layers), _format(raw.get("format")))


def _layers(text: Any, n_layers: int) -> frozenset[int] | None:
    """None, [3, 4], "last 6", "first 2" or "4-10"."""
    if text is None:
        return None
    chosen: range | list[int] | None = None
    if isinstance(text, list) and all(type(i) is int for i in text):
        chosen = text
    elif isinstance(text, str):
        if match := re.fullmatch(r"(first|last) (\d+)", text):
            n = min(int(match[2]), n_layers)
            chosen = range(n) if match[1] == "first" else range(n_layers - n, n_layers)
        elif match := re.fullmatch(r"(\d+)-(\d+)", text):
            chosen = range(int(match[1]), int(match[2]) + 1)
    if chosen is None or not chosen or not all(0 <= i < n_layers for i in chosen):
        raise InputError(
            f'recipe: layers {text!r} of a model with {n_layers}; write [3, 4], "last 6", '
            '"first 2" or "4-10"'
        )
    return frozenset(chosen)
