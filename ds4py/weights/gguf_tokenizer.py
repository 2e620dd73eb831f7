"""The tokenizer in a GGUF file's metadata: what it is made of, checked, and how it is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from ds4py.errors import TokenizerError
from ds4py.formats.gguf import GGUF, Field
from ds4py.text.byte_level import NORMAL, RULES, ByteLevelTokenizer, Vocabulary
from ds4py.text.tokenizer import Tokenizer
from ds4py.weights.gguf_config import BOS_KEY, EOS_KEY, TOKENS_KEY

PREFIX = "tokenizer.ggml."
MODEL = "gpt2"
"""ggml's name of byte-level BPE."""


def tokenizer_of(file: GGUF, vocab_size: int, bos_id: int, eos_id: int) -> Tokenizer:
    """The file's tokenizer. Raises TokenizerError naming the key at fault."""
    model = _get(file, "model", "string", f"{MODEL!r}", MODEL)
    if model != MODEL:
        raise TokenizerError(f"{file.path}: {PREFIX}model is {model!r}; need {MODEL!r}")
    rules = _get(file, "pre", "string", " or ".join(map(repr, RULES)))
    if rules not in RULES:
        raise TokenizerError(
            f"{file.path}: {PREFIX}pre is {rules!r}; need {' or '.join(map(repr, RULES))}, "
            "DeepSeek's rules"
        )
    tokens = _get(file, "tokens", "string[]", "the array of all tokens")
    if len(tokens) != vocab_size:
        raise TokenizerError(
            f"{file.path}: {TOKENS_KEY} has {len(tokens)} tokens; deepseek4.vocab_size is "
            f"{vocab_size}, need as many"
        )
    merges = _get(file, "merges", "string[]", "the array of all merges")
    kinds = _get(file, "token_type", "i32[] u32[]", "an array of whole numbers", [])
    vocabulary = Vocabulary(tokens, merges, [int(k) for k in kinds] or None)
    return ByteLevelTokenizer(vocabulary, bos_id, eos_id, f"{file.path} ({TOKENS_KEY})")


def tokenizer_fields(vocabulary: Vocabulary, bos_id: int, eos_id: int) -> dict[str, Field]:
    """The metadata of a tokenizer."""
    kinds = vocabulary.kinds or [NORMAL] * len(vocabulary.tokens)
    return {
        f"{PREFIX}model": Field("string", MODEL),
        f"{PREFIX}pre": Field("string", RULES[0]),
        TOKENS_KEY: Field("string[]", list(vocabulary.tokens)),
        f"{PREFIX}token_type": Field("i32[]", np.array(kinds, np.int32)),
        f"{PREFIX}merges": Field("string[]", list(vocabulary.merges)),
        BOS_KEY: Field("u32", bos_id),
        EOS_KEY: Field("u32", eos_id),
    }


def _get(file: GGUF, key: str, kinds: str, need: str, default: Any = None) -> Any:
    """A key's value; `default` where it may be missing."""
    field = file.metadata.get(PREFIX + key)
    if field is None and default is not None:
        return default
    if field is None or field.kind not in kinds.split():
        seen = "missing" if field is None else f"a {field.kind}"
        raise TokenizerError(f"{file.path}: {PREFIX}{key} is {seen}; need {need}")
    return field.value
