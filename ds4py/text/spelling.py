"""Token ids as the text they stand for, so that one text in two spellings is recognised as one.

A model does not always spell its text as the tokenizer would, and a merge across the end of a
prompt makes other ids of the same text. So what is cached is found by its text, and used where the
ids agree or can be exchanged at a token's edge. Control tokens are no text: what a user writes
never equals one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds4py.text.tokenizer import Tokenizer

ESCAPE = b"\xff"
"""Begins a control token; no UTF-8 text has this byte."""


class Spelling:
    """The text of ids. Without a tokenizer every id is a text of its own."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def of(self, token: int) -> bytes:
        """The bytes one token stands for."""
        if self._tokenizer is None or self._tokenizer.is_control(token):
            return ESCAPE + token.to_bytes(4, "little")
        piece = self._tokenizer.piece(token)
        return piece.replace(ESCAPE, ESCAPE * 6) if ESCAPE in piece else piece

    def text(self, tokens: Iterable[int]) -> bytes:
        """The bytes of a sequence."""
        return b"".join(map(self.of, tokens))

    def respell(self, tokens: Sequence[int], known: Sequence[int]) -> list[int] | None:
        """`tokens` with `known` in place of the ids that spell the same text.

        None when known is no other spelling of their beginning, or ends inside one of them.
        """
        same = common_prefix(tokens, known)
        if same == len(known) or same == len(tokens):
            return None
        rest, wanted, at = b"", self.text(known[same:]), same
        while len(rest) < len(wanted) and at < len(tokens):
            rest += self.of(tokens[at])
            at += 1
        return [*known, *tokens[at:]] if rest == wanted and at < len(tokens) else None


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences share from the beginning."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
