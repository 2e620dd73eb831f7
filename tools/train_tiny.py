#!/usr/bin/env python3
"""Train the embedded model: make its data, train, score, export.

    python tools/train_tiny.py --out runs/tiny --minutes 85
    python tools/train_tiny.py --out runs/tiny --resume          # continue after an interruption
    python tools/train_tiny.py --out runs/tiny --export models/tiny-parent

Needs the `train` extra. A run is a folder: `state.pt` (weights, optimiser, clock), `curve.jsonl`,
`tokenizer.model`, and `plan.json`, the schedule, which is read again every ten steps and may be
edited while the run goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from tiny import data, export, loop
from tiny.config import CONFIG
from tiny.layers import Mode
from tiny.model import Model
from tiny.score import report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, help="length of the schedule")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="continue from state.pt")
    parser.add_argument("--export", type=Path, help="write the bundle here instead of training")
    parser.add_argument("--score", type=int, default=100, help="held-out cases per skill")
    return parser.parse_args()


def tokenizer(folder: Path, seed: int) -> bytes:
    """The run's tokenizer, made at its start."""
    path = folder / "tokenizer.model"
    if not path.exists():
        path.write_bytes(data.train_tokenizer(CONFIG["vocab_size"], seed))
    return path.read_bytes()


def train(args: argparse.Namespace, pieces: bytes) -> None:
    plan = loop.Plan()
    saved = args.out / "plan.json"
    if args.resume and saved.exists():
        plan = loop.Plan(**json.loads(saved.read_text()))
    if args.minutes is not None:
        plan.minutes = args.minutes
    run = loop.Run(args.out, data.Coder(pieces), args.seed, plan)
    if args.resume:
        run.load(args.out / "state.pt")
    run.train()


def write(args: argparse.Namespace, pieces: bytes) -> None:
    """Export the run's last state and score what was written."""
    model = Model(CONFIG)
    model.load_state_dict(torch.load(args.out / "state.pt", weights_only=False)["model"])
    size = export.write(model, pieces, args.export)
    (args.export / "curve.csv").write_text(export.curve(args.out / "curve.jsonl"))
    print(f"{args.export}: {size / 2**20:.1f} MiB")
    mode = Mode(row_rounding=True, select=True)
    scores = report(export.read(args.export), mode, data.Coder(pieces), args.score)
    print(json.dumps(scores, indent=1))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    pieces = tokenizer(args.out, args.seed)
    (write if args.export else train)(args, pieces)


if __name__ == "__main__":
    main()
