"""Draws a routing trace: which experts each layer used, and what caches of them would hit.

    ds4 generate "..." --trace run.trace
    python tools/plot_experts.py run.trace experts.png

Needs matplotlib (extra `tools`). The ending of the second name chooses the format: png, svg, pdf.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from ds4py.bench.experts import cache_curve
from ds4py.experts.simulate import POLICIES
from ds4py.experts.trace import Trace, read, usage

STYLES = {"lru": ("LRU", "-o"), "decayed": ("decayed frequency", "--s"), "belady": ("Belady", ":^")}


def heat_map(axes: Axes, trace: Trace) -> None:
    """Share of a layer's choices that fell on each expert, the most used first."""
    counts = usage(trace)
    shares = np.array([np.sort(c)[::-1] / max(1, c.sum()) for c in counts.values()])
    even = 1 / trace.facts.n_experts
    image = axes.imshow(
        shares / even, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0
    )
    axes.set_xlabel("experts of the layer, most used first")
    axes.set_ylabel("layer")
    labels = [f"{n} (hash)" if n in trace.facts.hash_layers else str(n) for n in counts]
    every = max(1, len(labels) // 16)
    axes.set_yticks(range(0, len(labels), every), labels[::every])
    axes.figure.colorbar(image, ax=axes, label="times an even share")
    axes.set_title("Use of experts")


def curves(axes: Axes, trace: Trace) -> None:
    """Hit rate over cache size."""
    found = cache_curve(trace)
    whole = trace.facts.n_layers * trace.facts.n_experts
    for policy in POLICIES:
        label, style = STYLES[policy]
        points = [r for r in found if r.policy == policy]
        sizes = [100 * r.slots / whole for r in points]
        axes.plot(sizes, [100 * r.hit_rate for r in points], style, label=label, markersize=4)
    axes.set_xlabel("slots, % of all experts")
    axes.set_ylabel("experts in memory or read ahead, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.set_title("What a cache hits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    trace = read(given.trace)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    n_tokens = sum(step.n_tokens for step in trace.steps)
    figure.suptitle(f"{trace.facts.model}: {n_tokens} tokens in {len(trace.steps)} steps")
    heat_map(left, trace)
    curves(right, trace)
    figure.savefig(given.target, dpi=130)


if __name__ == "__main__":
    main()
