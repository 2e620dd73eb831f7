"""Training text: the tokenizer, and packed rows of token ids with loss weights."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from random import Random

import numpy as np
import sentencepiece

from ds4py.eval import stories, tasks, toolpool
from ds4py.text import chat, dsml
from ds4py.text.messages import (
    ASSISTANT,
    BOS,
    DSML,
    END_THINK,
    EOS,
    REMINDER,
    TASKS,
    THINK,
    USER,
    Segment,
)

CONTROL = (USER, ASSISTANT, THINK, END_THINK, DSML, REMINDER, *TASKS.values())
_MARKUP = (
    "\n\n<", "tool_calls>\n<", "tool_calls>", "invoke>\n</", 'invoke name="', '">\n<',
    'parameter name="', '" string="true">', '" string="false">', "parameter>\n</", "parameter>\n<",
    "</", "\n\n", "<tool_result>", "</tool_result>", '{"name": "', '", "description": "',
    '", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string", "description": "',
    '": {"type": "integer", "description": "', '"}}, "required": ["', '"]}}', '"}, "',
    '", "', '": "',
    '": ', '"}', '{"', '"]', ', "', "'s",
)


def symbols() -> list[str]:
    """Pieces that are always one token: the protocol's fixed sentences, and names that are copied.

    A name is then the same token at the start of an argument and inside a sentence.
    """
    fixed = dsml.TOOLS_BLOCK + DSML + dsml.TOOLS_END + DSML + chat.MAX_EFFORT + DSML
    fixed += chat.RESPONSE_FORMAT
    parts = re.split(f"{DSML}|{THINK}|{END_THINK}|(?<=\\.)(?=\\s)|(?<=\\n)(?=#)", fixed)
    long = [p for p in parts if len(p) > 12]
    words = [*stories.NAMES, *toolpool.CITIES, *toolpool.LANGUAGES, *toolpool.DAYS]
    words += [t.name for t in toolpool.POOL]
    lists = (toolpool.ROOMS, toolpool.DISHES, stories.THINGS)
    words += [w for words in lists for w in words if len(w) > 5]
    return [s.replace(" ", "▁") for s in dict.fromkeys([*long, *_MARKUP, *words])]


def corpus(seed: int, n: int) -> Iterator[str]:
    """Lines of plain text to learn pieces from."""
    rng = Random(seed)
    for i in range(n):
        yield from tasks.plain_story(rng, False).split(". ")
        made = tasks.tool_chat(rng) if i % 2 else tasks.recall_chat(rng, 600, 0.6)
        made.thinking, made.drop_thinking = True, False
        for s in render(made):
            if not s.control:
                yield from s.text.split("\n")


def train_tokenizer(vocab_size: int, seed: int) -> bytes:
    """A SentencePiece BPE model; encode/decode keeps every byte."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(seed, 1500), model_writer=model, model_type="bpe",
        vocab_size=vocab_size, byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=False, bos_id=0, eos_id=1, unk_id=2, pad_id=-1, bos_piece=BOS,
        eos_piece=EOS, control_symbols=list(CONTROL), user_defined_symbols=symbols(),
        character_coverage=1.0, num_threads=2, minloglevel=2, max_sentence_length=20000,
    )
    return model.getvalue()


def render(c: tasks.Chat) -> list[Segment]:
    return chat.segments(c.messages, c.thinking, c.effort, c.drop_thinking)


class Coder:
    """Text and conversations to ids and loss weights."""

    def __init__(self, model: bytes) -> None:
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.control = {t: self.sp.piece_to_id(t) for t in (BOS, EOS, *CONTROL)}
        self.digits = {self.sp.piece_to_id(str(d)) for d in range(10)}
        self.names = {self.sp.piece_to_id(n) for n in stories.NAMES}
        marks = ('"▁string="true">', '"▁string="false">')
        self.values, self.close = {self.sp.piece_to_id(m) for m in marks}, self.sp.piece_to_id("</")
        self.assistant = self.control[ASSISTANT]

    def encode(self, segments: list[Segment]) -> list[int]:
        ids: list[int] = []
        for s in segments:
            ids.extend([self.control[s.text]] if s.control else self.sp.encode(s.text))
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self.sp.decode(ids))

    def chat(self, c: tasks.Chat, prompt_weight: float) -> tuple[list[int], list[float]]:
        """Answers weigh 1 (see `_answer_weights`), everything else `prompt_weight`."""
        ids: list[int] = []
        weights: list[float] = []
        answering, opening = False, False
        for s in render(c):
            new = [self.control[s.text]] if s.control else self.sp.encode(s.text)
            ids.extend(new)
            if not answering or opening:
                weights.extend([prompt_weight] * len(new))
            else:
                weights.extend(self._answer_weights(new))
            answering, opening = self._state(s, answering, opening)
        return ids, weights

    def _answer_weights(self, ids: list[int]) -> list[float]:
        """Digits weigh 2; values of tool arguments 3."""
        weights, value = [], False
        for i in ids:
            weights.append(3.0 if value else 2.0 if i in self.digits else 1.0)
            value = i in self.values or (value and i != self.close)
        return weights

    @staticmethod
    def _state(s: Segment, answering: bool, opening: bool) -> tuple[bool, bool]:
        """After <Assistant> comes one prompt token (<think> or </think>), then the answer."""
        if s.control and s.text == ASSISTANT:
            return True, True
        if s.control and s.text == EOS:
            return False, False
        return answering, False

    def plain(self, text: str, digits_only: bool = False) -> tuple[list[int], list[float]]:
        ids = self.sp.encode(text)
        weights = [1.0] * len(ids)
        if digits_only:
            weights = self._drill_weights(ids)
        bos, eos = self.control[BOS], self.control[EOS]
        return [bos, *ids, eos], [0.0, *weights, 1.0]

    def _drill_weights(self, ids: list[int]) -> list[float]:
        """In lines `a + b = c` the digits after "=" count."""
        weights, after = [], False
        for i in ids:
            piece = self.sp.id_to_piece(i)
            after = "=" in piece or (after and piece not in ("\n", "<0x0A>"))
            weights.append(2.0 if after and i in self.digits else 0.1)
        return weights


Mix = Mapping[str, float]
"""Shares of tokens: facts, recall, short, tools, story, drill."""


def document(
    coder: Coder, rng: Random, kind: str, length: int, dense: float
) -> tuple[list[int], list[float]]:
    """One document of about at most `length` tokens."""
    if kind == "story":
        return coder.plain(tasks.plain_story(rng, False))
    if kind == "drill":
        return coder.plain(tasks.sum_drill(rng, rng.randint(5, 12)), digits_only=True)
    if kind == "short":
        return coder.chat(tasks.short_chat(rng), 0.1)
    if kind == "tools":
        return coder.chat(tasks.tool_chat(rng), 0.03)
    if kind == "facts":
        most = max(6, min(36, length // 24))
        return coder.chat(tasks.facts_chat(rng, rng.randint(most // 3, most)), 0.0)
    chars = int(length * 3.2 * rng.uniform(0.3, 1.1))
    return coder.chat(tasks.recall_chat(rng, chars, rng.uniform(dense, 1.0)), 0.1)


def sources(
    coder: Coder, ids: list[int], weights: list[float], nearest: int
) -> tuple[list[int], list[int]]:
    """Where to look for a number, and for its owner.

    First list: for every token before a digit of "NAME's number is 472" in an answer, where the
    first digit of the same fact stood before, at least `nearest` tokens back; else -1. Second
    list: for those tokens in every statement of a fact, where its name stands; else -1.
    """
    out, owners, facts = [-1] * len(ids), [-1] * len(ids), dict[tuple[int, ...], int]()
    owner, at = -1, 0
    while at < len(ids):
        if ids[at] in coder.names:
            owner, since = ids[at], at
        if ids[at] not in coder.digits or owner < 0 or at - since > 8:
            at += 1
            continue
        end = at
        while end < len(ids) and ids[end] in coder.digits:
            end += 1
        fact = (owner, *ids[at:end])
        if fact in facts and weights[at] >= 1 and at - facts[fact] >= nearest:
            out[at - 1 : end - 1] = [facts[fact]] * (end - at)
        owners[at - 1 : end] = [since] * (end - at + 1)
        facts[fact], owner, at = at, -1, end
    return out, owners


class Packer:
    """Rows of exactly `length` + 1 tokens; token shares follow the mix."""

    def __init__(self, coder: Coder, seed: int) -> None:
        self.coder, self.rng = coder, Random(seed)
        self.used: dict[str, float] = {}

    def row(self, length: int, mix: Mix, dense: float) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            kind = self._next(mix) if ids or self.rng.random() < 0.8 else "recall"
            new, w = document(self.coder, self.rng, kind, length, dense)
            kept = min(len(new), length + 1 - len(ids))
            self.used[kind] = self.used.get(kind, 0.0) + kept
            ids.extend(new[:kept])
            weights.extend(w[:kept])
        return ids, weights

    def _next(self, mix: Mix) -> str:
        """The kind that lags most behind its share."""
        kinds = [k for k, share in mix.items() if share > 0]
        return min(kinds, key=lambda k: self.used.get(k, 0.0) / mix[k] + self.rng.random() * 300)

    def batch(
        self, rows: int, length: int, mix: Mix, dense: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """ids [rows, length + 1] and the weight of predicting each of them."""
        made = [self.row(length, mix, dense) for _ in range(rows)]
        return np.array([m[0] for m in made]), np.array([m[1] for m in made], dtype=np.float32)

    def sources(self, ids: np.ndarray, weights: np.ndarray, nearest: int) -> np.ndarray:
        """`sources` of every row of a batch, [rows, 2, length + 1]."""
        pairs = zip(ids.tolist(), weights.tolist(), strict=True)
        return np.array([sources(self.coder, i, w, nearest) for i, w in pairs])
