"""How long one evaluation of a prompt may keep the GPU.

macOS kills a process whose command buffer runs for seconds, and a screen that shares the GPU stops
meanwhile. So a chunk is made as long as fits a limit, by what the chunks before it took.
"""

from __future__ import annotations

LIMIT_S = 0.5
"""Of one chunk."""
FIRST = 128
"""Tokens of a chunk before anything was measured."""
SHORTEST = 32
"""Enough for the kernels that read prompts: results do not depend on the length from here on."""


class Pacer:
    """One engine's measure of its own speed."""

    def __init__(self, limit_s: float = LIMIT_S):
        self._limit = limit_s
        self._token_s: float | None = None

    def chunk(self, most: int) -> int:
        """Tokens of the next chunk: `most` halved until it fits, so that it divides `most`."""
        n = most
        while n % 2 == 0 and n // 2 >= SHORTEST and self._too_long(n):
            n //= 2
        return n

    def _too_long(self, n: int) -> bool:
        return n > FIRST if self._token_s is None else n * self._token_s > self._limit

    def took(self, n_tokens: int, seconds: float) -> None:
        """What a chunk took. Short ones say little about long ones."""
        if n_tokens >= SHORTEST:
            self._token_s = seconds / n_tokens
