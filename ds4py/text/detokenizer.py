"""Tokens -> text, one token at a time. A character's bytes may be spread over several tokens."""

import codecs

from ds4py.text.tokenizer import Tokenizer


class Detokenizer:
    """Text as it becomes certain: incomplete UTF-8 is held back, invalid UTF-8 becomes U+FFFD."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, often its own, sometimes none."""
        return self._decoder.decode(self._tokenizer.piece(token_id))

    def flush(self) -> str:
        """What was held back at the end of the tokens; afterwards a new text may begin."""
        return self._decoder.decode(b"", final=True)
