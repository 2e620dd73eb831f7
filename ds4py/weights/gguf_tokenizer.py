"""The tokenizer in a GGUF file's metadata: what it is made of, checked, and how it is written.

The released files have DeepSeek's byte-level BPE. A relative with a sentencepiece model, such as
the embedded one, is kept as ggml keeps those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ds4py.errors import TokenizerError
from ds4py.formats.gguf import GGUF, Field
from ds4py.text.byte_level import (
    NORMAL,
    RULES,
    UNUSED,
    ByteLevelTokenizer,
    Vocabulary,
    json_of,
    read_vocabulary,
)
from ds4py.text.pieces import Pieces, model_bytes, read_pieces
from ds4py.text.tokenizer import SentencePieceTokenizer, Tokenizer
from ds4py.weights.gguf_config import BOS_KEY, EOS_KEY, TOKENS_KEY

PREFIX = "tokenizer.ggml."
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
"""ggml's names of the two kinds."""


def tokenizer_of(file: GGUF, vocab_size: int, bos_id: int, eos_id: int) -> Tokenizer:
    """The file's tokenizer. Raises TokenizerError naming the key at fault."""
    model = _get(file, "model", "string", f"{BYTE_LEVEL!r}", BYTE_LEVEL)
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise TokenizerError(
            f"{file.path}: {PREFIX}model is {model!r}; need {BYTE_LEVEL!r} or {SENTENCEPIECE!r}"
        )
    tokens = _get(file, "tokens", "string[]", "the array of all tokens")
    if len(tokens) != vocab_size:
        raise TokenizerError(
            f"{file.path}: {TOKENS_KEY} has {len(tokens)} tokens; deepseek4.vocab_size is "
            f"{vocab_size}, need as many"
        )
    make = _byte_level if model == BYTE_LEVEL else _sentencepiece
    return make(file, tokens, bos_id, eos_id)


def _byte_level(file: GGUF, tokens: list[str], bos_id: int, eos_id: int) -> Tokenizer:
    rules = _get(file, "pre", "string", " or ".join(map(repr, RULES)))
    if rules not in RULES:
        raise TokenizerError(
            f"{file.path}: {PREFIX}pre is {rules!r}; need {' or '.join(map(repr, RULES))}, "
            "DeepSeek's rules"
        )
    vocabulary = _vocabulary(file, tokens)
    return ByteLevelTokenizer(vocabulary, bos_id, eos_id, f"{file.path} ({TOKENS_KEY})")


def _vocabulary(file: GGUF, tokens: list[str]) -> Vocabulary:
    merges = _get(file, "merges", "string[]", "the array of all merges")
    kinds = _get(file, "token_type", "i32[] u32[]", "an array of whole numbers", [])
    return Vocabulary(tokens, merges, [int(k) for k in kinds] or None)


def _sentencepiece(file: GGUF, tokens: list[str], bos_id: int, eos_id: int) -> Tokenizer:
    return SentencePieceTokenizer(file.path, _model(file, tokens), (bos_id, eos_id))


def _model(file: GGUF, tokens: list[str]) -> bytes:
    scores = _get(file, "scores", "f32[]", "an array of numbers")
    kinds = _get(file, "token_type", "i32[] u32[]", "an array of whole numbers")
    prefix = _get(file, "add_space_prefix", "bool", "true or false", True)
    pieces = Pieces(tokens, [float(s) for s in scores], [int(k) for k in kinds], prefix)
    return model_bytes(pieces, f"{file.path} ({TOKENS_KEY})")


def write_beside(file: GGUF, directory: Path) -> None:
    """The file's tokenizer as tokenizer.json or tokenizer.model in a model directory.

    The metadata was checked by `tokenizer_of` before.
    """
    tokens = file.metadata[TOKENS_KEY].value
    if _get(file, "model", "string", "", BYTE_LEVEL) == SENTENCEPIECE:
        (directory / "tokenizer.model").write_bytes(_model(file, tokens))
        return
    text = json.dumps(json_of(_vocabulary(file, tokens)), ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")


def fields_beside(directory: Path, vocab_size: int, bos_id: int, eos_id: int) -> dict[str, Field]:
    """The metadata of the tokenizer in a model directory, filled up to the model's vocabulary.

    Raises TokenizerError.
    """
    if (directory / "tokenizer.json").exists():
        words = read_vocabulary(directory / "tokenizer.json")
        kinds = list(words.kinds or ())
        more = _fill(directory, len(words.tokens), vocab_size)
        words = Vocabulary([*words.tokens, *more], words.merges, kinds + [UNUSED] * len(more))
        return tokenizer_fields(words, bos_id, eos_id)
    if (directory / "tokenizer.model").exists():
        pieces = read_pieces(directory / "tokenizer.model")
        more = _fill(directory, len(pieces.texts), vocab_size)
        pieces = Pieces(
            [*pieces.texts, *more],
            [*pieces.scores, *[0.0] * len(more)],
            [*pieces.kinds, *[UNUSED] * len(more)],
            pieces.adds_prefix,
        )
        return piece_fields(pieces, bos_id, eos_id)
    raise TokenizerError(
        f"{directory} has no tokenizer.json and no tokenizer.model, one of which a GGUF file needs"
    )


def _fill(directory: Path, n_tokens: int, vocab_size: int) -> list[str]:
    """Names for the ids that the model has and the tokenizer does not."""
    if n_tokens > vocab_size:
        raise TokenizerError(
            f"the tokenizer in {directory} has {n_tokens} tokens; the model's vocabulary is "
            f"{vocab_size}, need at most as many"
        )
    return [f"[PAD{i}]" for i in range(n_tokens, vocab_size)]


def tokenizer_fields(vocabulary: Vocabulary, bos_id: int, eos_id: int) -> dict[str, Field]:
    """The metadata of DeepSeek's kind of tokenizer."""
    kinds = vocabulary.kinds or [NORMAL] * len(vocabulary.tokens)
    return {
        f"{PREFIX}model": Field("string", BYTE_LEVEL),
        f"{PREFIX}pre": Field("string", RULES[0]),
        TOKENS_KEY: Field("string[]", list(vocabulary.tokens)),
        f"{PREFIX}token_type": Field("i32[]", np.array(kinds, np.int32)),
        f"{PREFIX}merges": Field("string[]", list(vocabulary.merges)),
        BOS_KEY: Field("u32", bos_id),
        EOS_KEY: Field("u32", eos_id),
    }


def piece_fields(pieces: Pieces, bos_id: int, eos_id: int) -> dict[str, Field]:
    """The metadata of a sentencepiece model."""
    return {
        f"{PREFIX}model": Field("string", SENTENCEPIECE),
        f"{PREFIX}pre": Field("string", "default"),
        TOKENS_KEY: Field("string[]", list(pieces.texts)),
        f"{PREFIX}scores": Field("f32[]", np.array(pieces.scores, np.float32)),
        f"{PREFIX}token_type": Field("i32[]", np.array(pieces.kinds, np.int32)),
        f"{PREFIX}add_space_prefix": Field("bool", pieces.adds_prefix),
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
