"""POST /tokenize and /detokenize: what a text is to the model."""

from __future__ import annotations

from typing import Any, ClassVar

from ds4py.errors import InputError
from ds4py.server.body import Body
from ds4py.server.errors import ApiError
from ds4py.server.prompt import PromptWriter


class TokenizeBody(Body):
    """A text. add_special: with the token that begins every text."""

    content: str
    add_special: bool = False
    with_pieces: bool = False

    HARMLESS: ClassVar = frozenset({"model", "parse_special"})


class DetokenizeBody(Body):
    """Token ids."""

    tokens: list[int]

    HARMLESS: ClassVar = frozenset({"model"})


def tokenized(body: TokenizeBody, writer: PromptWriter) -> dict[str, Any]:
    """The ids of a text; control tokens it spells are text. Raises ApiError."""
    tokenizer = writer.tokenizer
    try:
        ids = tokenizer.encode(body.content)
    except InputError as error:
        raise ApiError(str(error), param="content") from error
    if body.add_special:
        ids = [tokenizer.bos_id, *ids]
    if not body.with_pieces:
        return {"tokens": ids, "count": len(ids)}
    pieces = [{"id": i, "piece": tokenizer.piece(i).decode("utf-8", "replace")} for i in ids]
    return {"tokens": pieces, "count": len(ids)}


def detokenized(body: DetokenizeBody, writer: PromptWriter) -> dict[str, Any]:
    """The text of ids. Raises ApiError."""
    bad = next((i for i in body.tokens if not 0 <= i < writer.vocab_size), None)
    if bad is not None:
        raise ApiError(f"{bad} is no token; need ids below {writer.vocab_size}", param="tokens")
    return {"content": writer.tokenizer.decode(body.tokens)}
