"""What cache-aware routing costs the embedded model: loss on held-out text against misses saved.

    python tools/measure_swaps.py --documents 10

The embedded model chooses 2 experts of 16, of which none may be swapped. So each expert of its
parent is cut into three by inner channels: 6 of 48 are chosen and the function is the same. Texts
are computed one token at a time, as in decoding, at several cache sizes and regrets, and compared
with the exact model on the same texts. Intervals are 95 %, bootstrapped over documents. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ds4py import Engine, EngineOptions, assets
from ds4py.config import ModelConfig
from ds4py.eval import loss
from ds4py.experts.options import StreamingOptions
from ds4py.experts.simulate import replay, total
from ds4py.experts.trace import Recorder, TraceFacts
from ds4py.formats import bundle
from ds4py.quant.convert import Converter
from ds4py.quant.recipe import Recipe
from ds4py.weights.bundle import ROUTED
from ds4py.weights.checkpoint import Checkpoint

PARENT = assets.path("models", "tiny-parent")
PIECES = 3
SIZES, REGRETS = (0.2, 0.4, 0.6), (0.05, 1.0)
"""Shares of all experts that are in memory; of a layer's range of scores."""
SEED = 7


@dataclass(frozen=True)
class Row:
    """One cache size and regret."""

    slots: int
    regret: float
    misses: float
    """Per token."""
    swapped: float
    """Share of the experts chosen."""
    kept_mass: float
    over: str
    """Loss above that of the exact model, nats per token, with its interval."""


def cut(target: Path) -> None:
    """The parent with every expert in PIECES, as a checkpoint of float32."""
    raw = json.loads((PARENT / "config.json").read_text())
    source = Checkpoint(PARENT, ModelConfig.load(PARENT))
    for key in ("n_routed_experts", "num_experts_per_tok", "routed_scaling_factor"):
        raw[key] *= PIECES
    raw.pop("quantization_config")
    raw.pop("expert_dtype")
    tensors = [
        bundle.NewTensor(name, str(kind), x.shape, x.nbytes, lambda x=x: [x])
        for name, kind, x in pieces(source)
    ]
    target.mkdir()
    bundle.write(target / "model.safetensors", tensors)
    (target / "config.json").write_text(json.dumps(raw))
    (target / "tokenizer.model").write_bytes((PARENT / "tokenizer.model").read_bytes())


def pieces(source: Checkpoint) -> Iterator[tuple[str, str, NDArray[Any]]]:
    """Name, type and data of each tensor. Piece p of expert e is expert 3 e + p; all have the
    width of the whole, and zeros for the channels of the others."""
    for name in source.entries:
        stem, routed = name.removesuffix(".weight"), ROUTED.search(name)
        if name.startswith("mtp.") or name.endswith(".scale"):
            continue
        if name.endswith("tid2eid"):
            ids = source.integers(name).astype(np.int64)[:, :, None] * PIECES + np.arange(PIECES)
            yield name, "I64", ids.reshape(len(ids), -1)
        elif name.endswith(("ffn.gate.weight", "ffn.gate.bias")):
            yield name, "F32", np.repeat(source.floats(name), PIECES, axis=0)
        elif routed is not None:
            whole, expert = source.matrix(stem), int(routed[3])
            for p, channels in enumerate(np.array_split(np.arange(len(whole)), PIECES)):
                part = whole
                if routed[4] != "2":
                    part = np.zeros_like(whole)
                    part[channels] = whole[channels]
                number = expert * PIECES + p
                yield name.replace(f"experts.{expert}.", f"experts.{number}."), "F32", part
        else:
            matrix = name.endswith(".weight") and len(source.entries[name].shape) == 2
            yield name, "F32", source.matrix(stem) if matrix else source.floats(name)


def scores(engine: Engine, texts: Sequence[loss.Document]) -> list[loss.F32]:
    """As `loss.scores`, token by token behind the prompt."""
    found = []
    for text in texts:
        steps = [text.first, *[1] * (text.n_scored - 1)]
        logits = engine.score(text.ids[:-1], steps)[text.first - 1 :]
        found.append(loss.log_probabilities(logits))
    return found


def measure(folder: Path, texts: Sequence[loss.Document]) -> Iterator[Row]:
    """Every cache size, without swaps and with each regret."""
    engine = Engine.open(folder, EngineOptions(experts="resident"))
    recorder = engine.experts.trace = Recorder(TraceFacts.of("cut", engine.config))
    base = loss.losses(scores(engine, texts), texts)
    recorder.finish()
    n_tokens = sum(text.n_scored for text in texts)
    n_records = len(engine.config.layers) * engine.config.n_routed_experts
    for slots in (round(share * n_records) for share in SIZES):
        exact = total(replay(recorder.trace, slots, "lru"))
        yield Row(slots, 0.0, (exact.misses + exact.prefetched) / n_tokens, 0.0, 1.0, "")
        for regret in REGRETS:
            streaming = StreamingOptions(slots=slots, swap=regret, readers=2)
            options = EngineOptions(experts="streamed", streaming=streaming)
            engine = Engine.open(folder, options)
            found, stats = scores(engine, texts), engine.experts.stats()
            over = loss.difference(loss.losses(found, texts), base, texts)
            misses = (stats["misses"] + stats["prefetched"]) / n_tokens
            yield Row(slots, regret, misses, stats["swapped"], stats["kept_mass"], str(over))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--documents", type=int, default=10, help="stories, and as many of 4 kinds")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        cut(Path(name) / "parent")
        config = ModelConfig.load(Path(name) / "parent")
        formats = {f"routed.{w}": "Q8_0" for w in ("gate", "up", "down")}
        plan = Recipe.from_dict({"formats": formats}, len(config.layers))
        Converter(Checkpoint(Path(name) / "parent", config), Path(name) / "cut", plan).run()
        tokenizer = Engine.open(Path(name) / "cut").tokenizer
        assert tokenizer is not None
        texts = loss.documents(tokenizer, given.documents, SEED)
        print(f"{sum(text.n_scored for text in texts)} tokens of {len(texts)} documents")
        print("| records in memory | regret | read a token | swapped | mass kept | loss added |")
        print("|---|---|---|---|---|---|")
        rows = []
        for row in measure(Path(name) / "cut", texts):
            rows.append(asdict(row))
            print(
                f"| {row.slots} | {row.regret:g} | {row.misses:.2f} | {100 * row.swapped:.1f} % | "
                f"{100 * row.kept_mass:.2f} % | {row.over} |",
                flush=True,
            )
    print(json.dumps({"bench": "swaps", "rows": rows}))


if __name__ == "__main__":
    main()
