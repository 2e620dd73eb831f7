"""Spending a budget of bytes: which format the gate, up and down maps of each layer get.

Two scores say what a format costs a projection. AlphaQ's needs no data: maps whose spectrum has a
heavy tail (a low exponent) are said to have learned more and to need more bits. The other is
measured: the error that our own encoder leaves. A greedy walk then spends the budget.

On the embedded model AlphaQ's choice lost more than any random one (models/README.md), so the fixed
recipe stays the default; `tools/measure_recipes.py allocation` repeats the comparison.

Sources: AlphaQ (Superone77/AlphaQ: tiles, Hill estimator, cost) and its convex costs, for which the
greedy walk equals their integer programme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ds4py.config import ModelConfig
from ds4py.formats.gguf_blocks import block_format, decode
from ds4py.quant.encode import encode
from ds4py.weights.source import Source

F32 = npt.NDArray[np.float32]

FORMATS = ("IQ2_XXS", "Q2_K", "Q4_K")
"""What is chosen from, the smallest first."""
TILE = 128
MOST_TILES = 256
GAMMA = 10.0
"""How strongly the exponent counts; AlphaQ reports the best results at 10 to 15."""
PROJECTIONS = {"routed.gate": "w1", "routed.up": "w3", "routed.down": "w2"}


class Unit(NamedTuple):
    """One projection of all routed experts of a layer: what gets one format."""

    layer: int
    kind: str
    """A class of the recipe: routed.gate, routed.up or routed.down."""


Costs = Mapping[Unit, Sequence[float]]
"""What each of FORMATS costs a unit."""


def units(config: ModelConfig) -> list[Unit]:
    """Of the main model."""
    return [Unit(plan.index, kind) for plan in config.layers for kind in PROJECTIONS]


def sizes(config: ModelConfig) -> dict[Unit, tuple[int, ...]]:
    """Bytes of each unit in each of FORMATS, without the padding of records."""
    d, inner, n = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    shapes = {"routed.gate": (inner, d), "routed.up": (inner, d), "routed.down": (d, inner)}
    return {
        unit: tuple(
            n * shapes[unit.kind][0] * block_format(f).row_bytes(shapes[unit.kind][1])
            for f in FORMATS
        )
        for unit in units(config)
    }


def matrices(source: Source, unit: Unit) -> Iterable[tuple[str, F32]]:
    """Name and values [out, in] of a unit's maps, one expert after the other."""
    for expert in range(source.config.n_routed_experts):
        name = f"layers.{unit.layer}.ffn.experts.{expert}.{PROJECTIONS[unit.kind]}"
        yield f"{name}.weight", source.matrix(name)


def hill(values: npt.NDArray[np.floating[Any]]) -> float:
    """Tail exponent of a density ~ x^-alpha, from the largest tenth of the values [n] > 0."""
    ordered = np.sort(np.asarray(values, np.float64))
    k = max(10, len(ordered) // 10)
    tail = ordered[-k:] / ordered[-k - 1]
    return 1 + k / float(np.log(tail).sum())


def tail_exponent(matrix: F32, tile: int = TILE) -> float:
    """AlphaQ's alpha of a map [out, in]: over the squared singular values of its tiles.

    At most MOST_TILES tiles, evenly spread; a map smaller than a tile is one tile.
    """
    side = min(tile, *matrix.shape)
    rows, cols = (n // side for n in matrix.shape)
    cut = matrix[: rows * side, : cols * side].reshape(rows, side, cols, side).swapaxes(1, 2)
    tiles = cut.reshape(-1, side, side)
    chosen = np.linspace(0, len(tiles) - 1, min(len(tiles), MOST_TILES)).astype(int)
    spectrum = np.linalg.svd(tiles[chosen].astype(np.float64), compute_uv=False) ** 2
    return hill(spectrum[spectrum > 0])


def alpha_costs(
    source: Source, gamma: float = GAMMA, tile: int = TILE
) -> dict[Unit, tuple[float, ...]]:
    """(median alpha / alpha)^gamma variance 2^(-2 bits), alpha and variance means over experts."""
    alphas, variances = {}, {}
    for unit in units(source.config):
        found = [(tail_exponent(w, tile), float(w.var())) for _, w in matrices(source, unit)]
        alphas[unit], variances[unit] = (float(column) for column in np.mean(found, axis=0))
    middle = float(np.median(list(alphas.values())))
    return {
        unit: tuple(
            (middle / alphas[unit]) ** gamma * variances[unit] * 2 ** (-2 * block_format(f).bits)
            for f in FORMATS
        )
        for unit in alphas
    }


def error_costs(
    source: Source,
    importance: Mapping[str, F32],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[Unit, tuple[float, ...]]:
    """What the encoder leaves of a unit: its importance-weighted squared error, as a share."""
    costs, every = {}, units(source.config)
    for done, unit in enumerate(every, 1):
        left, whole = np.zeros(len(FORMATS)), 0.0
        for name, w in matrices(source, unit):
            weight = importance.get(name, np.ones(w.shape[1], np.float32)).astype(np.float64)
            whole += float((w.astype(np.float64) ** 2 @ weight).sum())
            for i, name_of_format in enumerate(FORMATS):
                error = decode(name_of_format, encode(name_of_format, w, weight)) - w
                left[i] += (error.astype(np.float64) ** 2 @ weight).sum()
        costs[unit] = tuple(float(x) for x in left / whole)
        if progress is not None:
            progress("allocate", done, len(every))
    return costs


def spend(costs: Costs, sizes: Mapping[Unit, Sequence[int]], budget: int) -> dict[Unit, int]:
    """Index of the format of each unit, such that all together take at most `budget` bytes.

    Begins with the smallest and goes on with the change that saves most cost for its bytes. That is
    the best choice for convex costs and equal sizes, and else at most one change away from it.
    """
    chosen = dict.fromkeys(costs, 0)
    left = budget - sum(sizes[unit][0] for unit in costs)
    while True:
        best: tuple[float, Unit, int, int] | None = None
        for unit, now in chosen.items():
            for other in range(now + 1, len(sizes[unit])):
                more = sizes[unit][other] - sizes[unit][now]
                gain = (costs[unit][now] - costs[unit][other]) / more
                if gain > 0 and more <= left and (best is None or gain > best[0]):
                    best = gain, unit, other, more
        if best is None:
            return chosen
        _, unit, other, more = best
        chosen[unit] = other
        left -= more


def as_recipe(name: str, chosen: Mapping[Unit, int]) -> dict[str, Any]:
    """The JSON of a recipe with these formats; everything else is the default's."""
    rules = [
        {"class": unit.kind, "layers": [unit.layer], "format": FORMATS[i]}
        for unit, i in chosen.items()
    ]
    return {"name": name, "rules": rules}
