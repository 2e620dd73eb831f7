"""DeepSeek's byte-level BPE from bare lists of tokens and merges, as GGUF files carry it.

A file names the rules by which text is cut into words (`joyai-llm`); the rules themselves stand
here, as DeepSeek's tokenizer.json has them. Knows nothing of files' layouts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds4py.errors import TokenizerError
from ds4py.text.messages import CONTROL_TOKENS
from ds4py.text.tokenizer import Tokenizer, byte_alphabet, byte_level_piece

CUTS = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
"""DeepSeek's cuts, one after the other: each match of each pattern is a piece of its own."""
RULES = ("joyai-llm", "deepseek-v3")
"""Names that GGUF files give them; the first is DeepSeek V4's."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens, ggml's numbers. Those of tokenizer.json's added tokens are 3 and 4."""


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as lists."""

    tokens: Sequence[str]
    """By id; bytes are written in GPT-2's alphabet, control tokens as their own text."""
    merges: Sequence[str]
    """Two tokens with a space between, the first merged first."""
    kinds: Sequence[int] | None = None
    """By id; None where the file does not say."""


class ByteLevelTokenizer(Tokenizer):
    """A vocabulary with DeepSeek's cuts. Control and user-defined tokens are control tokens."""

    def __init__(self, vocabulary: Vocabulary, bos_id: int, eos_id: int, origin: str) -> None:
        """origin: what to name in errors. Raises TokenizerError."""
        tokens = vocabulary.tokens
        kinds = vocabulary.kinds or [_kind(token) for token in tokens]
        if len(kinds) != len(tokens):
            raise TokenizerError(
                f"{origin} has {len(tokens)} tokens but {len(kinds)} token types; need one each"
            )
        added = [
            (token, i) for i, token in enumerate(tokens) if kinds[i] in (CONTROL, USER_DEFINED)
        ]
        words = [(token, i) for i, token in enumerate(tokens) if kinds[i] == NORMAL]
        self._words = {token_id: word for word, token_id in words}
        self._text = _library(_distinct(words, origin), _pairs(vocabulary.merges, origin), origin)
        self.vocab_size = len(tokens)
        super().__init__(_distinct(added, origin), None)
        for name, token_id in (("bos", bos_id), ("eos", eos_id)):
            if not self.is_control(token_id):
                raise TokenizerError(
                    f"{origin}: {name} is token {token_id}, which is not a control token; need "
                    "the id of one"
                )
        self.bos_id, self.eos_id = bos_id, eos_id

    def _encode(self, text: str, first: bool) -> list[int]:
        text.encode()  # the library reports half a surrogate pair as a TypeError
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids

    def _piece(self, token_id: int) -> bytes:
        return byte_level_piece(self._words.get(token_id, ""))


def read_vocabulary(path: Path) -> Vocabulary:
    """The lists of a tokenizer.json. Raises TokenizerError when it is not DeepSeek's kind."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        model, added = description["model"], description["added_tokens"]
        words, merges = dict(model["vocab"]), [_merge(pair) for pair in model["merges"]]
        extra = {str(a["content"]): (int(a["id"]), bool(a["special"])) for a in added}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise TokenizerError(f"{path} is not a tokenizer.json of a BPE ({exc!r})") from exc
    changed = description.get("normalizer") or {}
    plain = changed == {} or changed == {"type": "Sequence", "normalizers": []}
    cuts = _patterns(description.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not plain or cuts != [*CUTS]:
        raise TokenizerError(
            f"{path} does not cut text as DeepSeek V4 does, which is the only way a GGUF file of "
            "this architecture can name"
        )
    ids = {token_id for token_id, _ in extra.values()} | set(words.values())
    tokens = [f"[PAD{i}]" for i in range(max(ids) + 1)]
    kinds = [UNUSED] * len(tokens)
    for word, token_id in words.items():
        tokens[token_id], kinds[token_id] = word, NORMAL
    for text, (token_id, special) in extra.items():
        tokens[token_id], kinds[token_id] = text, CONTROL if special else USER_DEFINED
    return Vocabulary(tokens, merges, kinds)


def json_of(vocabulary: Vocabulary) -> dict[str, Any]:
    """A vocabulary as tokenizer.json, the inverse of `read_vocabulary`."""
    kinds = vocabulary.kinds or [_kind(token) for token in vocabulary.tokens]
    added = _of_kind(vocabulary.tokens, kinds, CONTROL, USER_DEFINED)
    used = sorted([*_of_kind(vocabulary.tokens, kinds, NORMAL), *added], key=lambda item: item[1])
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    splits = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in CUTS
    ]
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": token_id, "content": text, **plain, "special": kinds[token_id] == CONTROL}
            for text, token_id in added
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, {**last, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**last, "use_regex": True},
        "model": {"type": "BPE", "vocab": dict(used), "merges": list(vocabulary.merges)},
    }


def _merge(pair: Any) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _patterns(pre_tokenizer: Any) -> list[str]:
    """The patterns of DeepSeek's kind of pre_tokenizer; nothing of any other kind."""
    steps = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    if not isinstance(steps, list) or not steps or not _only_bytes(steps[-1]):
        return []
    splits = [s for s in steps[:-1] if s.get("type") == "Split" and s.get("behavior") == "Isolated"]
    found = [s["pattern"].get("Regex", "") for s in splits if not s.get("invert")]
    return found if len(found) == len(steps) - 1 else []


def _only_bytes(step: Any) -> bool:
    """Whether a step does nothing but write bytes in the alphabet."""
    return (
        isinstance(step, dict)
        and step.get("type") == "ByteLevel"
        and not (step.get("add_prefix_space") or step.get("use_regex", True))
    )


def _of_kind(tokens: Sequence[str], kinds: Sequence[int], *wanted: int) -> list[tuple[str, int]]:
    return [(token, i) for i, token in enumerate(tokens) if kinds[i] in wanted]


def _kind(token: str) -> int:
    """A guess for files that do not say: what no bytes can spell is a control token."""
    alphabet = byte_alphabet()
    control = token in CONTROL_TOKENS or any(c not in alphabet for c in token)
    return CONTROL if control else NORMAL


def _distinct(tokens: Sequence[tuple[str, int]], origin: str) -> dict[str, int]:
    ids = dict(tokens)
    if len(ids) != len(tokens):
        twice = next(text for text, token_id in tokens if ids[text] != token_id)
        raise TokenizerError(f"{origin} has the token {twice!r} twice; need every token once")
    return ids


def _pairs(merges: Sequence[str], origin: str) -> list[tuple[str, str]]:
    pairs = []
    for i, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            raise TokenizerError(
                f"{origin}: merge {i} is {merge!r}; need two tokens with a space between"
            )
        pairs.append((left, right))
    return pairs


def _library(words: Mapping[str, int], merges: list[tuple[str, str]], origin: str) -> Any:
    """The BPE with DeepSeek's cuts, without control tokens."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    absent = [byte for char, byte in byte_alphabet().items() if char not in words]
    if absent:
        raise TokenizerError(
            f"{origin} has no token for {len(absent)} of the 256 bytes ({absent[0]:#04x} first); "
            "need one for each"
        )
    for i, (left, right) in enumerate(merges):
        if not {left, right, left + right} <= words.keys():
            raise TokenizerError(
                f"{origin}: merge {i} is {left!r} with {right!r}; need both, and what they make, "
                "among the tokens"
            )
    library = tokenizers.Tokenizer(models.BPE(vocab=dict(words), merges=merges))
    cuts = [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in CUTS]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    return library
