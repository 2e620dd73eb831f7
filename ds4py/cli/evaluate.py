"""`ds4 verify`: asks a model questions whose answers are known and compares with its targets."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ds4py.bench import machine
from ds4py.cli.model import open_engine, tokenizer_of
from ds4py.cli.progress import ProgressBar
from ds4py.cli.settings import ModelChoice, Settings

if TYPE_CHECKING:
    from ds4py.eval.skills import SkillResult


def run(model: ModelChoice, samples: int, seed: int) -> int:
    """Measure every skill; a table, then one line of JSON. 0 when all targets are met."""
    engine, _ = open_engine(Settings(model))
    tokenizer_of(engine)
    from ds4py.eval import skills

    with ProgressBar(sys.stderr) as bar:
        results = skills.run(engine, samples, seed, bar)
    return show(engine.name, results, {"samples": samples, "seed": seed})


def show(model: str, results: "Sequence[SkillResult]", choice: Mapping[str, int]) -> int:
    """Print the table and the line of JSON; 0 when all targets are met, else 1."""
    print(f"{'skill':24} {'value':>8} {'target':>8} {'unit':8} {'n':>5}")
    for result in results:
        print(
            f"{result.name:24} {result.value:8.3f} {result.target:8.3f} {result.unit:8} "
            f"{result.n:5}{'' if result.met else '   missed'}"
        )
    met = all(result.met for result in results)
    skills = [asdict(result) | {"met": result.met} for result in results]
    report = {"verify": model, "met": met, **choice, "skills": skills}
    print(json.dumps(report | {"machine": machine.describe()}))
    return 0 if met else 1
