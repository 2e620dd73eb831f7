"""`ds4 inspect`: what a model is, from its config and the headers of its tensor files.

No weight is read, so it answers at once for a model of any size.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds4py.cli import planned
from ds4py.cli.layout import memory_lines, memory_report
from ds4py.cli.model import announce
from ds4py.cli.settings import ModelChoice, models_directory
from ds4py.errors import OptionsError

if TYPE_CHECKING:
    from ds4py.config import LayerPlan, ModelConfig
    from ds4py.hub.manifest import Manifest
    from ds4py.weights.files import ModelFiles
    from ds4py.weights.source import Entry

# The first that matches names a tensor's class. Patterns are parts of the checkpoint's names.
_CLASSES = (
    (r"^mtp\.", "draft layers"),
    (r"\.ffn\.experts\.", "routed experts"),
    (r"\.ffn\.shared_experts\.", "shared experts"),
    (r"\.ffn\.gate\.", "routers"),
    (r"\.attn\.indexer\.", "indexers"),
    (r"\.attn\.compressor\.", "compressors"),
    (r"\.attn\.", "attention"),
    (r"(^|\.)hc_", "hyper-connections"),
    (r"^embed\.", "embedding"),
    (r"^head\.", "head"),
    (r"norm\.weight$", "norms"),
)


@dataclass
class TensorClass:
    """Tensors that do the same work, added up."""

    name: str
    count: int = 0
    n_bytes: int = 0
    parameters: int = 0
    dtypes: set[str] = field(default_factory=set)

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.n_bytes / self.parameters if self.parameters else 0.0

    def add(self, name: str, entry: "Entry") -> None:
        self.count += 1
        self.n_bytes += entry.n_bytes
        self.parameters += parameters(name, entry)
        self.dtypes.add(entry.dtype)


def run(model: ModelChoice, context: int | None, memory: str | None, json: bool = False) -> int:
    """Print what the model is and where its memory goes; the exit code."""
    from json import dumps

    from ds4py.engine.engine import resolve
    from ds4py.weights.files import ModelFiles

    announce(model)
    absent = _absent(model.name)
    if absent is not None:
        _check_context(absent.config["max_position_embeddings"], context)
        made = planned.Planned(absent, context, memory)
        if json:
            print(dumps(planned.report(made)))
        else:
            planned.show(made)
        return 0
    files = ModelFiles.at(resolve(model.name, models_directory()))
    _check_context(files.config.longest_context, context)
    if json:
        print(dumps(report(model.name, files, context, memory)))
    else:
        show(model.name, files, context, memory)
    return 0


def _check_context(most: int, context: int | None) -> None:
    if context is not None and context < 1:
        raise OptionsError(f"--context is {context}; give a number of tokens, 1 or more")
    if context is not None and context > most:
        raise OptionsError(f"--context is {context}; this model goes to {most} tokens")


def show(name: str, files: "ModelFiles", context: int | None, memory: str | None) -> None:
    """Lines and a table for people."""
    from ds4py.engine.memory import plan_files

    config, classes = files.config, classify(files.tensors())
    lines = [
        ("model", f"{name} ({files.path})"),
        *facts(config, classes),
        ("context", f"{config.max_position_embeddings} tokens at most"),
        *memory_lines(config, *plan_files(files, context, memory)),
    ]
    for title, text in lines:
        print(f"{title:12}{text}")
    print()
    print("\n".join(table(classes)))


def report(
    name: str, files: "ModelFiles", context: int | None, memory: str | None
) -> dict[str, Any]:
    """The same for scripts. Sizes in bytes."""
    from ds4py.engine.memory import plan_files

    config, classes = files.config, classify(files.tensors())
    total, active, draft = counts(config, classes)
    return {
        "model": name,
        "here": True,
        "path": str(files.path),
        "family": "DeepSeek V4",
        "context": config.max_position_embeddings,
        "parameters": total,
        "active_parameters": active,
        "draft_parameters": draft,
        "classes": [
            {
                "name": c.name,
                "tensors": c.count,
                "parameters": c.parameters,
                "bytes": c.n_bytes,
                "bits_per_weight": c.bits,
                "stored_as": sorted(c.dtypes),
            }
            for c in classes
        ],
        "memory": memory_report(config, *plan_files(files, context, memory)),
    }


def _absent(name: str) -> "Manifest | None":
    """The manifest of a model that is known and not on this machine, if it tells the config."""
    from ds4py.hub import manifest, place

    known = None if Path(name).exists() else manifest.load(name)
    here = place.find(name, models_directory()) if known is not None else None
    return known if known is not None and known.config and here is None else None


def classify(tensors: Mapping[str, "Entry"]) -> list[TensorClass]:
    """All tensors in their classes, the largest first."""
    classes: dict[str, TensorClass] = {}
    for name, entry in tensors.items():
        matches = (title for pattern, title in _CLASSES if re.search(pattern, name))
        title = next(matches, "other")
        classes.setdefault(title, TensorClass(title)).add(name, entry)
    return sorted(classes.values(), key=lambda c: -c.n_bytes)


def parameters(name: str, entry: "Entry") -> int:
    """How many weights a tensor holds: none in scales and tables, two in each byte of FP4."""
    if name.endswith((".scale", "tid2eid")):
        return 0
    return math.prod(entry.shape) * (2 if entry.dtype == "I8" else 1)


def counts(config: "ModelConfig", classes: Iterable[TensorClass]) -> tuple[int, int, int]:
    """Parameters: all of the main model, those used for one token, and of draft layers."""
    by_name = {c.name: c.parameters for c in classes}
    draft = by_name.pop("draft layers", 0)
    total, routed = sum(by_name.values()), by_name.get("routed experts", 0)
    active = total - routed + routed * config.num_experts_per_tok // config.n_routed_experts
    return total, active, draft


def facts(config: "ModelConfig", classes: Iterable[TensorClass]) -> Iterator[tuple[str, str]]:
    """Lines about the model itself."""
    total, active, draft = counts(config, classes)
    yield "family", "DeepSeek V4"
    yield (
        "parameters",
        f"{amount(total)}, of them {amount(active)} used for each token"
        + (f"; {amount(draft)} more in draft layers" if draft else ""),
    )
    yield (
        "width",
        f"{config.hidden_size} in {config.hc_mult} streams, {config.num_attention_heads} heads "
        f"of {config.head_dim}, vocabulary {config.vocab_size}",
    )
    yield (
        "experts",
        f"{config.num_experts_per_tok} of {config.n_routed_experts} and 1 shared, "
        f"width {config.moe_intermediate_size}",
    )
    for number, text in enumerate(schedule(config.layers)):
        yield "" if number else "layers", text
    if config.mtp_layers:
        yield "draft", f"{len(config.mtp_layers)} multi-token prediction layer(s)"
    elif config.dspark:
        yield "draft", "DSpark draft layers, set aside"


def schedule(layers: Iterable["LayerPlan"]) -> Iterator[str]:
    """`0-1 sliding window; experts by token id`, one line for each run of equal layers.

    Layers that alternate are listed together.
    """
    named = [(plan.index, describe_layer(plan)) for plan in layers]
    for _, group in groupby(named, key=lambda item: item[1][1]):
        members = list(group)
        for text in dict.fromkeys(kind for _, (kind, _) in members):
            numbers = [index for index, (kind, _) in members if kind == text]
            yield f"{ranges(numbers)}: {text}, {members[0][1][1]}"


def describe_layer(plan: "LayerPlan") -> tuple[str, str]:
    """(attention, routing) of one layer, in words."""
    routing = "experts by token id" if plan.hash_routed else "experts by score"
    if not plan.compressed:
        return "sliding window", routing
    chosen = ", chosen by an indexer" if plan.indexed else ""
    return f"window and rows of {plan.ratio} tokens{chosen}", routing


def ranges(numbers: list[int]) -> str:
    """[0, 1, 2] -> `0-2`; every second one, [3, 5, 7, 9], -> `3,5,..,9`; others in full."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}" if step else str(numbers[0])
    if len(numbers) > 3 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        return f"{numbers[0]},{numbers[1]},..,{numbers[-1]}"
    return ",".join(map(str, numbers))


def table(classes: Iterable[TensorClass]) -> Iterator[str]:
    """The tensor classes in columns."""
    from ds4py.sizes import format_size

    rows = [*classes]
    total = TensorClass("all", sum(c.count for c in rows), sum(c.n_bytes for c in rows))
    total.parameters = sum(c.parameters for c in rows)
    yield f"{'tensors':18} {'count':>7} {'parameters':>11} {'size':>10} {'bits':>6}   stored as"
    for row in [*rows, total]:
        yield (
            f"{row.name:18} {row.count:7} {amount(row.parameters):>11} "
            f"{format_size(row.n_bytes):>10} {row.bits:6.2f}   {', '.join(sorted(row.dtypes))}"
        ).rstrip()


def amount(number: int) -> str:
    """284_000_000_000 -> `284.0 B`."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)
