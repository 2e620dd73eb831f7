"""Finding stop strings in streamed text, across the boundaries of its pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through except what may still become a stop string."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None
        """The stop string that ended the text."""

    def push(self, text: str) -> tuple[str, bool]:
        """New text -> (text that is safe to show, whether a stop string was found).

        Once found, the text before the earliest stop string is the last to be shown.
        """
        if not self._stops:
            return text, False
        text = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            first, self.found = min(hits)
            self._held = ""
            return text[:first], True
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False

    def flush(self) -> str:
        """What is still held back, when nothing more will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
