"""What bench, verify and inspect print: a table for people, and figures that scripts can read."""

import json
import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ds4py.bench import machine, speed
from ds4py.cli import evaluate, inspect
from ds4py.errors import OptionsError
from ds4py.eval.skills import SkillResult


@dataclass
class FakeEngine:
    scripted: Any
    context: int = 1000
    name: str = "fake"
    tokenizer: Any = None
    config: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=50))
    sessions: list[Any] = field(default_factory=list)

    def session(self) -> Any:
        self.sessions.append(self.scripted([["x"] * 8 for _ in range(9)]))
        return self.sessions[-1]


def test_speed_measures_what_fits_the_context(scripted: Any) -> None:
    engine: Any = FakeEngine(scripted)
    seen: list[tuple[str, int, int]] = []
    rates = speed.measure(engine, tokens=8, repeat=2, progress=lambda *s: seen.append(s))
    assert [(r.work, r.at, len(r.runs)) for r in rates] == [
        ("prefill", 128, 2), ("prefill", 512, 2), ("decode", 100, 2),
    ]  # fmt: skip
    assert all(rate.tps > 0 for rate in rates)
    assert [done for _, done, _ in seen] == list(range(1, 10)) and seen[-1][2] == 9
    # Every prefill had a session of its own; all decoding at a position shares one.
    assert [len(s.tokens) for s in engine.sessions] == [128] * 3 + [512] * 3 + [108]


def test_speed_refuses_a_context_in_which_nothing_fits(scripted: Any) -> None:
    engine: Any = FakeEngine(scripted, context=100)
    with pytest.raises(OptionsError, match="context of 100 tokens is too short"):
        speed.measure(engine)


def test_the_prompt_of_a_measurement_is_always_the_same(scripted: Any, tokenizer: Any) -> None:
    engine: Any = FakeEngine(scripted)
    prompt = speed.make_prompt(engine, 500)
    assert prompt == speed.make_prompt(engine, 500) and set(prompt) <= set(range(50))
    engine.tokenizer = tokenizer
    tokenizer.is_control = lambda token: token >= 256
    assert max(speed.make_prompt(engine, 500)) < 256


def test_the_machine_is_described() -> None:
    host = machine.describe()
    assert host["backend"] in ("cpu", "metal") and host["cores"] and host["processor"]
    assert host["commit"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", str(host["commit"]))
    assert json.loads(json.dumps(host)) == host


def test_verify_fails_when_one_target_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    met = SkillResult("recall", 0.97, 0.95, "share", 100)
    low = SkillResult("loss", 0.9, 1.0, "nats", 50, lower_is_better=True)
    missed = SkillResult("addition", 0.5, 0.9, "share", 100)
    assert evaluate.show("fake", [met, low], {"seed": 1}) == 0
    assert "missed" not in capsys.readouterr().out
    assert evaluate.show("fake", [met, missed], {"seed": 1}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("missed") for line in lines[1:3]] == [False, True]
    report = json.loads(lines[-1])
    assert report["met"] is False and report["seed"] == 1
    assert [skill["met"] for skill in report["skills"]] == [True, False]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([4], "4"),
        ([0, 1], "0-1"),
        ([2, 3, 4, 5], "2-5"),
        ([3, 5, 7, 9], "3,5,..,9"),
        ([1, 3], "1,3"),
        ([0, 1, 5], "0,1,5"),
    ],
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert inspect.ranges(numbers) == text


def test_inspect_adds_up(ds4: Any) -> None:
    done = ds4("inspect", "--context", "1000")
    assert done.returncode == 0 and done.stderr == "ds4: model tiny (embedded)\n"
    head, _, table = done.stdout.partition("\n\n")
    facts = dict(re.findall(r"(?m)^(\w+) +(.+)$", head))
    assert facts["family"] == "DeepSeek V4" and facts["model"].startswith("tiny (")
    assert "a session of 1000 tokens" in head and "sliding window" in head
    rows = [re.split(r"  +", line.strip()) for line in table.splitlines()[1:]]
    counts = {row[0]: int(row[1]) for row in rows}
    assert counts.pop("all") == sum(counts.values()) and "other" not in counts
    assert {"routed experts", "indexers", "compressors", "draft layers"} <= set(counts)


def test_inspect_for_scripts(ds4: Any) -> None:
    done = ds4("inspect", "--context", "1000", "--json")
    said = json.loads(done.stdout)
    assert said["model"] == "tiny" and said["memory"]["context"] == 1000
    assert sum(c["parameters"] for c in said["classes"]) == (
        said["parameters"] + said["draft_parameters"]
    )
    small = json.loads(ds4("inspect", "--json", "--memory", "1MB").stdout)
    assert "too little" in small["memory"]["error"]
