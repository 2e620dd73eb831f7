"""Answers of the Responses API that a later request may refer to, in memory, a bounded number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

MAX_RESPONSES = 512
MAX_ITEMS = 200_000
"""Most items in all of them together."""


class Kept:
    """Response id -> the items up to and including its answer. Used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._histories: OrderedDict[str, list[Any]] = OrderedDict()
        self._items: dict[str, Any] = {}
        self._n_items = 0

    def put(self, response_id: str, history: list[Any], answer: list[dict[str, Any]]) -> None:
        """Keep an answer and what led to it; the oldest make way."""
        with self._lock:
            self._histories[response_id] = [*history, *answer]
            self._n_items += len(history) + len(answer)
            self._items.update({item["id"]: item for item in answer})
            while len(self._histories) > MAX_RESPONSES or self._n_items > MAX_ITEMS:
                _, gone = self._histories.popitem(last=False)
                self._n_items -= len(gone)
                for item in gone:
                    if isinstance(item, dict):
                        self._items.pop(item.get("id", ""), None)

    def history(self, response_id: str) -> list[Any] | None:
        """All items of a conversation up to this answer."""
        with self._lock:
            found = self._histories.get(response_id)
            return None if found is None else list(found)

    def item(self, item_id: str) -> Any:
        """One item of an answer; None when it is not known."""
        with self._lock:
            return self._items.get(item_id)
