"""What recipes cost the embedded model: bytes, loss on held-out text, skills.

    python tools/measure_recipes.py table                 # ours against uniform recipes
    python tools/measure_recipes.py allocation            # formats by layer, at equal bytes

Every row is a model that was written and opened: bundles by the quantiser itself, MLX's affine
format as the numbers it stands for. Bytes are those of all weights, without the padding of records.
Loss is that of `ds4py/eval/loss.py`; intervals are 95 %, bootstrapped over documents. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np

from ds4py import Engine, assets
from ds4py.config import ModelConfig
from ds4py.eval import loss, skills
from ds4py.formats import bundle
from ds4py.quant import allocate, imatrix
from ds4py.quant.convert import Converter
from ds4py.quant.recipe import Recipe, class_of
from ds4py.weights.bundle import ROUTED
from ds4py.weights.checkpoint import Checkpoint

PARENT, TINY = (assets.path("models", name) for name in ("tiny-parent", "tiny"))
ROUTED_KINDS = ("routed.gate", "routed.up", "routed.down")
WIDE = ("shared", "head")
"""Classes whose rows hold whole blocks of 256 in the embedded model, beside the routed experts."""
GROUP, SCALE_BYTES = 64, 4
SEED = 5
SKILLS = ("recall", "addition", "tool call", "tool answer", "thinking, addition")


@dataclass(frozen=True)
class Row:
    """One measured model."""

    name: str
    n_bytes: int
    routed_bits: float
    loss: float
    over: str
    """Loss above that of the parent, with its interval."""
    moved: float
    """Kullback-Leibler divergence from the parent, nats per token."""
    skills: Mapping[str, float]


class Bench:
    """The parent, the text, and what the parent says about it."""

    def __init__(self, documents: int, questions: int, place: Path):
        self.config = ModelConfig.load(PARENT)
        self.importance = imatrix.load(TINY / "imatrix.safetensors")
        parent = Engine.open(PARENT)
        assert parent.tokenizer is not None
        self.texts = loss.documents(parent.tokenizer, documents, SEED)
        self.reference = loss.scores(parent, self.texts)
        self.base = loss.losses(self.reference, self.texts)
        self.questions, self.place, self.names = questions, place, map(str, count())

    def source(self) -> Checkpoint:
        return Checkpoint(PARENT, self.config)

    def bundle(self, recipe: Mapping[str, Any], weighted: bool = True) -> Path:
        """The model that `ds4 quantize` makes."""
        target = self.place / next(self.names)
        plan = Recipe.from_dict(recipe, len(self.config.layers))
        Converter(self.source(), target, plan, self.importance if weighted else {}).run()
        return target

    def affine(self, kinds: Sequence[str]) -> tuple[Path, int]:
        """The parent with MLX's 2-bit affine numbers in these classes, and their bytes."""
        source, target, n_bytes = self.source(), self.place / next(self.names), 0
        replaced: dict[str, np.ndarray] = {}
        for name, entry in source.entries.items():
            stem = name.removesuffix(".weight")
            if name.endswith(".weight") and len(entry.shape) == 2 and class_of(name) in kinds:
                w = mx.array(source.matrix(stem))
                parts = mx.quantize(w, group_size=GROUP, bits=2)
                replaced[name] = np.array(mx.dequantize(*parts, group_size=GROUP, bits=2))
                n_bytes += w.size // 4 + w.size // GROUP * SCALE_BYTES
        kept = {n: e for n, e in source.entries.items() if _owner(n) not in replaced}
        tensors = [
            bundle.NewTensor(n, "F32", w.shape, w.nbytes, lambda w=w: [w])
            for n, w in replaced.items()
        ] + [
            bundle.NewTensor(n, e.dtype, e.shape, e.n_bytes, lambda e=e: [e.read()])
            for n, e in kept.items()
        ]
        target.mkdir()
        bundle.write(target / "model.safetensors", tensors)
        for file in ("config.json", "tokenizer.model"):
            (target / file).write_bytes((PARENT / file).read_bytes())
        return target, n_bytes + sum(e.n_bytes for e in kept.values())

    def measure(self, name: str, path: Path, n_bytes: int, routed_bits: float) -> Row:
        engine = Engine.open(path)
        found = loss.scores(engine, self.texts)
        nats = loss.losses(found, self.texts)
        results = skills.run(engine, self.questions, SEED) if self.questions else []
        row = Row(
            name=name,
            n_bytes=n_bytes,
            routed_bits=round(routed_bits, 4),
            loss=loss.per_token(nats, self.texts),
            over=str(loss.difference(nats, self.base, self.texts)),
            moved=loss.per_token(loss.divergences(self.reference, found), self.texts),
            skills={r.name: r.value for r in results if r.name in SKILLS},
        )
        print(line(row), flush=True)
        return row

    def sized(self, path: Path) -> tuple[int, float]:
        """Bytes of a bundle's weights without padding, and bits of a routed weight."""
        made = Converter(self.source(), path, Recipe.from_dict({}, len(self.config.layers)))
        recipe = json.loads((path / "recipe.json").read_text())
        routed = sum(
            self.config.n_routed_experts * sum(allocate_bytes(self.config, formats))
            for formats in recipe["experts"].values()
        )
        weights = sum(
            int(np.prod(shape)) for name, shape in made.shapes.items() if ROUTED.search(name)
        )
        dense = (path / "dense.safetensors").stat().st_size
        return dense + routed, 8 * routed / weights


def allocate_bytes(config: ModelConfig, formats: Sequence[str]) -> tuple[int, ...]:
    """Bytes of gate, up and down of one expert."""
    d, inner = config.hidden_size, config.moe_intermediate_size
    shapes = ((inner, d), (inner, d), (d, inner))
    return tuple(
        rows * allocate.block_format(f).row_bytes(cols)
        for f, (rows, cols) in zip(formats, shapes, strict=True)
    )


def _owner(name: str) -> str:
    """The weight that a scale belongs to."""
    return f"{name.removesuffix('.scale')}.weight" if name.endswith(".scale") else name


HEAD = "| recipe | bytes | routed bits | loss | above the parent | divergence | skills |"


def line(row: Row) -> str:
    marks = " / ".join(f"{100 * row.skills[n]:.0f}" for n in SKILLS if n in row.skills) or "-"
    return (
        f"| {row.name} | {row.n_bytes:,} | {row.routed_bits:.3f} | {row.loss:.4f} | {row.over} | "
        f"{row.moved:.4f} | {marks} |"
    )


def table(bench: Bench) -> list[Row]:
    """Ours, and the same bits for everything."""
    source = bench.source()
    whole = sum(e.n_bytes for e in source.entries.values())
    rows = [bench.measure("unquantised (FP4 experts, FP8)", PARENT, whole, 4.25)]

    def made(name: str, recipe: Mapping[str, Any], weighted: bool = True) -> None:
        path = bench.bundle(recipe, weighted)
        rows.append(bench.measure(name, path, *bench.sized(path)))

    def uniform(fmt: str, kinds: Sequence[str]) -> dict[str, Any]:
        return {"name": fmt, "formats": dict.fromkeys(kinds, fmt)}

    made("**ours**", {})
    made("ours without imatrix", {}, weighted=False)
    for kinds, what in ((ROUTED_KINDS, "routed experts"), ((*ROUTED_KINDS, *WIDE), "all matrices")):
        path, n_bytes = bench.affine(kinds)
        rows.append(bench.measure(f"MLX affine 2 bits, group 64: {what}", path, n_bytes, 2.5))
        made(f"IQ2_XXS: {what}", uniform("IQ2_XXS", kinds))
        made(f"IQ2_XXS without imatrix: {what}", uniform("IQ2_XXS", kinds), weighted=False)
        made(f"Q4_K: {what}", uniform("Q4_K", kinds))
    return rows


def allocation(bench: Bench) -> list[Row]:
    """Formats chosen by each score at the bytes of the fixed recipe."""
    config, source = bench.config, bench.source()
    sizes = allocate.sizes(config)
    fixed = {u: int(u.kind == "routed.down") for u in sizes}
    budget = sum(sizes[u][i] for u, i in fixed.items())
    alpha = allocate.alpha_costs(source, tile=32)
    chosen: list[tuple[str, Mapping[allocate.Unit, int]]] = [("the fixed recipe", fixed)]
    chosen += [(f"random {i}", _random(sizes, budget, i)) for i in range(5)]
    for name, costs in (
        ("AlphaQ inverted", allocate.alpha_costs(source, -allocate.GAMMA, tile=32)),
        ("AlphaQ", alpha),
        ("round-trip error", allocate.error_costs(source, bench.importance)),
        ("oracle: each projection alone", _oracle(bench, sizes, budget)),
    ):
        chosen.append((name, allocate.spend(costs, sizes, budget)))
    rows = []
    for name, choice in chosen:
        path = bench.bundle(allocate.as_recipe(name, choice))
        spelled = " ".join(f"{u.layer}{u.kind[7]}{i}" for u, i in choice.items() if i)
        rows.append(bench.measure(f"{name} ({spelled})", path, *bench.sized(path)))
    return rows


def _random(
    sizes: Mapping[allocate.Unit, Sequence[int]], budget: int, seed: int
) -> dict[allocate.Unit, int]:
    """One step at a time for a projection drawn from those that still fit."""
    rng, chosen = Random(seed), dict.fromkeys(sizes, 0)
    left = budget - sum(size[0] for size in sizes.values())
    while fits := [
        u
        for u, i in chosen.items()
        if i + 1 < len(sizes[u]) and sizes[u][i + 1] - sizes[u][i] <= left
    ]:
        unit = rng.choice(fits)
        left -= sizes[unit][chosen[unit] + 1] - sizes[unit][chosen[unit]]
        chosen[unit] += 1
    return chosen


def _oracle(
    bench: Bench, sizes: Mapping[allocate.Unit, Sequence[int]], budget: int
) -> dict[allocate.Unit, tuple[float, ...]]:
    """Loss with one projection in a larger format and all others in the smallest, on other text.

    Formats that no budget has room for are not tried.
    """
    tokenizer = Engine.open(PARENT).tokenizer
    assert tokenizer is not None
    texts = loss.documents(tokenizer, max(1, len(bench.texts) // 10), SEED + 1)
    spare = budget - sum(size[0] for size in sizes.values())

    def of(choice: Mapping[allocate.Unit, int]) -> float:
        engine = Engine.open(bench.bundle(allocate.as_recipe("trial", choice)))
        return loss.per_token(loss.losses(loss.scores(engine, texts), texts), texts)

    least = dict.fromkeys(sizes, 0)
    base = of(least)
    return {
        u: (
            base,
            *(of(least | {u: i}) if n - size[0] <= spare else base for i, n in _larger(size)),
        )
        for u, size in sizes.items()
    }


def _larger(size: Sequence[int]) -> list[tuple[int, int]]:
    return list(enumerate(size))[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("table", "allocation"))
    parser.add_argument("--documents", type=int, default=300, help="of each of five kinds")
    parser.add_argument("--questions", type=int, default=100, help="per skill, 0 for none")
    given = parser.parse_args()
    jobs: dict[str, Callable[[Bench], list[Row]]] = {"table": table, "allocation": allocation}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(given.documents, given.questions, Path(place))
        print(HEAD)
        print("|---" * HEAD.count(" | ") + "|---|")
        rows = jobs[given.what](bench)
    json.dump({"measure": given.what, "rows": [asdict(row) for row in rows]}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
