"""Scores of a model on the held-out cases of `tasks`, measured with the real engine.

Decoding is greedy, and an answer counts only when it is right to the last character that matters:
the number, the arguments, the sentence. Knows tasks and the engine; knows nothing of training.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt

from ds4py.engine.engine import Engine
from ds4py.engine.options import SamplingOptions
from ds4py.errors import InputError
from ds4py.eval import loss, tasks
from ds4py.text import chat
from ds4py.text.stream import StreamParser
from ds4py.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
RECALL_TOKENS = 940
"""Length of the conversation before the question; with the question about 1,000."""
ANSWER_TOKENS = 120
EVERY_ROW = 4096
"""More compressed rows than any case has, in whole tiles."""


@dataclass(frozen=True)
class SkillResult:
    """One line of the table."""

    name: str
    value: float
    target: float
    unit: str
    n: int
    """Cases (or tokens, for a loss) behind the value."""
    lower_is_better: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


def run(
    engine: Engine, n: int = 100, seed: int = 77, progress: Progress | None = None
) -> list[SkillResult]:
    """Every skill on `n` cases each. Raises InputError for a model without a tokenizer."""
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise InputError(f"model {engine.name} has no tokenizer; verify needs one")
    exam = Exam(engine, tokenizer, n, seed, progress)
    results = [exam.stories(), *exam.recall()]
    results += [exam.addition(), exam.tool_calls(), exam.tool_answers(), *exam.thinking()]
    return results + exam.drafts()


class Exam:
    """The cases of one seed, asked of one engine."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, n: int, seed: int, progress: Progress | None
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.n, self.seed, self.progress = n, seed, progress
        self.done, self.total = 0, 8 * n
        self.texts: list[list[int]] = []
        """Token ids of prompts with greedy answers, for the draft measurement."""

    def stories(self) -> SkillResult:
        """Mean loss per token of stories that training never saw, in nats."""
        rng, losses = Random(self.seed), []
        for _ in range(self.n):
            text = self.tokenizer.encode(tasks.story_case(rng))
            ids = [self.tokenizer.bos_id, *text, self.tokenizer.eos_id]
            found = loss.log_probabilities(self.engine.score(ids)[:-1])
            losses.append(loss.of_tokens(found, ids[1:]))
            self.tick()
        every = np.concatenate(losses)
        return SkillResult("story loss", float(every.mean()), 0.5, "nats", len(every), True)

    def recall(self) -> list[SkillResult]:
        """The number of a name, planted anywhere; and the same with all rows attended."""
        rng = Random(self.seed + 1)
        cases = [tasks.recall_case(rng, RECALL_TOKENS, self.count) for _ in range(self.n)]
        chosen = self.share(cases, _has_number)
        every = self.share(cases, _has_number, all_rows(self.engine))
        lost = 100 * (every - chosen)
        return [
            SkillResult("recall", chosen, 0.95, "share", self.n),
            SkillResult("recall, all rows", every, 0.95, "share", self.n),
            SkillResult("recall lost by top-k", lost, 2.0, "points", self.n, True),
        ]

    def addition(self) -> SkillResult:
        rng = Random(self.seed + 2)
        cases = [tasks.addition_case(rng) for _ in range(self.n)]
        return SkillResult("addition", self.share(cases, _has_number), 0.9, "share", self.n)

    def tool_calls(self) -> SkillResult:
        rng = Random(self.seed + 3)
        cases = [tasks.tool_call_case(rng, i % 3 == 2) for i in range(self.n)]
        return SkillResult("tool call", self.share(cases, _is_call), 0.95, "share", self.n)

    def tool_answers(self) -> SkillResult:
        rng = Random(self.seed + 4)
        cases = [tasks.tool_answer_case(rng, i % 3 == 2) for i in range(self.n)]
        return SkillResult("tool answer", self.share(cases, _is_text), 0.95, "share", self.n)

    def thinking(self) -> list[SkillResult]:
        """Reasons, closes the reasoning, answers; and whether the sum is right."""
        rng = Random(self.seed + 5)
        cases = [tasks.addition_case(rng, True) for _ in range(self.n)]
        answers = [self.answer(case, self.engine) for case in cases]
        formed = sum(map(_well_formed, answers)) / self.n
        right = sum(map(_has_number, cases, answers)) / self.n
        return [
            SkillResult("thinking, well formed", formed, 0.95, "share", self.n),
            SkillResult("thinking, addition", right, 0.9, "share", self.n),
        ]

    def drafts(self) -> list[SkillResult]:
        """How often the MTP layer's first choice is the model's own; no target. Empty without."""
        if not self.engine.config.mtp_layers:
            return []
        hits: list[npt.NDArray[np.bool_]] = []
        for ids in self.texts[: self.n]:
            draft = self.engine.score_mtp(ids)[:-1].argmax(-1)
            hits.append(draft[-20:] == self.engine.score(ids)[1:-1].argmax(-1)[-20:])
            self.tick()
        every = np.concatenate(hits)
        return [SkillResult("draft acceptance", float(every.mean()), 0.0, "share", len(every))]

    def share(
        self, cases: Sequence[tasks.Case], right: Callable[[tasks.Case, Answer], bool],
        engine: Engine | None = None,
    ) -> float:
        """How many of the cases are answered right."""
        marks = [right(case, self.answer(case, engine or self.engine)) for case in cases]
        return sum(marks) / len(marks)

    def answer(self, case: tasks.Case, engine: Engine) -> Answer:
        """Greedy answer to a case."""
        prompt = self.tokenizer.encode(chat.segments(case.messages, case.thinking))
        session, parser = engine.session(), StreamParser(case.thinking)
        session.sync(prompt)
        finish = None
        options = SamplingOptions(max_tokens=ANSWER_TOKENS, temperature=0.0)
        for token in session.generate(options):
            parser.push(token.text)
            finish = token.finish_reason
        parser.finish()
        if len(prompt) < RECALL_TOKENS // 2:
            self.texts.append(session.tokens)
        self.tick()
        return Answer(parser.message(), finish == "stop")

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress("measure", min(self.done, self.total), self.total)


@dataclass(frozen=True)
class Answer:
    """What the model wrote, as an assistant message, and whether it ended by itself."""

    message: dict[str, Any]
    ended: bool


def all_rows(engine: Engine) -> Engine:
    """The same weights, attending to every compressed row instead of the indexer's choice."""
    blocks = []
    for block in engine.model.blocks:
        attn = replace(block.attn, n_chosen=EVERY_ROW)
        blocks.append(replace(block, attn=attn))
    other = copy.copy(engine)
    other.model = replace(engine.model, blocks=tuple(blocks))
    return other


def _has_number(case: tasks.Case, answer: Answer) -> bool:
    """The last number of the answer is the wanted one."""
    numbers = re.findall(r"\d+", answer.message["content"])
    return answer.ended and bool(numbers) and numbers[-1] == case.expect


def _is_text(case: tasks.Case, answer: Answer) -> bool:
    return answer.ended and str(answer.message["content"]).strip() == case.expect


def _is_call(case: tasks.Case, answer: Answer) -> bool:
    """One call, with the right name and equal arguments of equal types."""
    calls = answer.message.get("tool_calls") or []
    if len(calls) != 1 or case.call is None:
        return False
    function = calls[0]["function"]
    return (function["name"], json.loads(function["arguments"])) == case.call


def _well_formed(answer: Answer) -> bool:
    """Reasoning, its end, and an answer without further tags."""
    reasoning, content = answer.message.get("reasoning_content"), answer.message["content"]
    return answer.ended and bool(reasoning) and bool(content) and "think>" not in content
