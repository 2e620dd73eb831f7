"""Whether reading ahead by the next layer's router pays, by how often it is right.

    python tools/measure_prefetch.py

Made-up traces of V4-Flash's shape (43 layers, 6 of 256 experts, 3 layers routed by token id, 27 %
of the experts used again) on a clock that only counts (`ds4py/bench/ahead.py`). `ds4 bench experts
--trace` judges a model's own trace the same way, if it was recorded with `--prefetch router`.
"""

import argparse
import json
from dataclasses import asdict

from ds4py.bench.ahead import RATIOS, gains, made_up

REUSE = 0.27
RECALLS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
SIZES = (1, 2, 4, 12)
"""Tokens' worth of experts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="tokens of each trace")
    given = parser.parse_args()
    rows = []
    print("| guessed | slots | reads | " + " | ".join(f"{r:g}:1" for r in RATIOS) + " |")
    print("|---|---|---|" + "---|" * len(RATIOS))
    for recall in RECALLS:
        trace = made_up(given.steps, REUSE, recall)
        least = trace.facts.n_layers * trace.facts.n_chosen
        for size in SIZES:
            found = list(gains(trace, [size * least]))
            more = max(gain.more_reads for gain in found)
            speeds = " | ".join(f"{gain.speed:.2f}" for gain in found)
            print(f"| {recall:.0%} | {size * least} | {more:+.0%} | {speeds} |", flush=True)
            rows += [{"recall": recall} | asdict(gain) for gain in found]
    print(json.dumps({"bench": "prefetch", "rows": rows}))


if __name__ == "__main__":
    main()
