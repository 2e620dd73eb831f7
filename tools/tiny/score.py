"""Scores of the training model on held-out cases, one forward pass per case.

A case counts when greedy decoding would write the reference answer, token by token: then every
argmax over the reference equals the next reference token.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch

from ds4py.eval import tasks
from ds4py.text import chat

from .data import Coder
from .layers import Mode
from .model import Model


def rows(coder: Coder, cases: Sequence[tasks.Case]) -> list[tuple[list[int], int]]:
    """(ids with the reference answer, where the answer begins)."""
    out = []
    for case in cases:
        prompt = coder.encode(chat.segments(case.messages, case.thinking))
        whole = coder.encode(chat.segments([*case.messages, case.reference], case.thinking))
        assert whole[: len(prompt)] == prompt
        out.append((whole, len(prompt)))
    return out


@torch.no_grad()
def exact(
    model: Model, mode: Mode, made: list[tuple[list[int], int]], batch: int = 8
) -> list[bool]:
    """Whether each reference answer is what greedy decoding writes."""
    order = sorted(range(len(made)), key=lambda i: len(made[i][0]))
    result = [False] * len(made)
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        length = -(-max(len(made[i][0]) for i in part) // 128) * 128
        ids = torch.zeros(len(part), length, dtype=torch.long)
        for r, i in enumerate(part):
            ids[r, : len(made[i][0])] = torch.tensor(made[i][0])
        hidden = model(ids, mode, draft=False).hidden
        for r, i in enumerate(part):
            whole, begin = made[i]
            best = model.logits(hidden[r, begin - 1 : len(whole) - 1], mode).argmax(-1)
            result[i] = best.tolist() == whole[begin:]
    return result


@torch.no_grad()
def story_loss(model: Model, mode: Mode, coder: Coder, n: int, seed: int) -> tuple[float, float]:
    """Mean loss per token of held-out stories, and the share of drafts equal to the argmax."""
    rng, total, tokens, hits, drafts = Random(seed), 0.0, 0, 0, 0
    for _ in range(n):
        ids = coder.plain(tasks.story_case(rng))[0]
        pad = torch.zeros(-len(ids) % 128, dtype=torch.long)
        out = model(torch.cat((torch.tensor(ids), pad))[None], mode)
        logits = model.logits(out.hidden[0, : len(ids) - 1], mode)
        target = torch.tensor(ids[1:])
        total += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
        tokens += len(ids) - 1
        if out.draft is not None:
            guess = model.logits(out.draft[0, : len(ids) - 2], mode).argmax(-1)
            hits += int((guess == logits[1:].argmax(-1)).sum())
            drafts += len(ids) - 2
    return total / tokens, hits / max(drafts, 1)


def report(model: Model, mode: Mode, coder: Coder, n: int, seed: int = 77) -> dict[str, float]:
    """Every skill; `recall_all` attends to all rows."""
    model.eval()
    rng = Random(seed)

    def count(text: str) -> int:
        return len(coder.sp.encode(text))

    made = {
        "recall": [tasks.recall_case(rng, 920, count, i % 4 == 3) for i in range(n)],
        "addition": [tasks.addition_case(rng) for _ in range(n)],
        "addition_thinking": [tasks.addition_case(rng, True) for _ in range(n)],
        "tool_call": [tasks.tool_call_case(rng, i % 3 == 2) for i in range(n)],
        "tool_answer": [tasks.tool_answer_case(rng, i % 3 == 2) for i in range(n)],
    }
    out: dict[str, float] = {}
    for name, cases in made.items():
        ready = rows(coder, cases)
        marks = exact(model, mode, ready)
        out[name] = sum(marks) / n
        if name == "recall" and mode.select:
            every = Mode(mode.mm, mode.weight_rounding, mode.row_rounding)
            out["recall_all"] = sum(exact(model, every, ready)) / n
    out["story_loss"], out["mtp_stories"] = story_loss(model, mode, coder, max(n // 4, 4), seed)
    model.train()
    return {k: round(v, 4) for k, v in out.items()}
