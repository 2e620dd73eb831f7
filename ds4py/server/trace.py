"""`--trace FILE`: every prompt and answer as the model saw them, one JSON object a line.

The one place where texts of requests are written down, and only when the owner asks for it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from ds4py.server.worker import Job
from ds4py.text.tokenizer import Tokenizer

log = logging.getLogger("ds4.server")


class Trace:
    """An open trace file, readable by its owner alone. Used by several threads."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._file = os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")
        self._lock = threading.Lock()

    def write(self, job: Job, request_id: str, tokenizer: Tokenizer) -> None:
        """One request: what the model read and wrote, and what of it was cached."""
        generation = job.generation
        found: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "request_id": request_id,
            "prompt": tokenizer.decode(job.request.prompt),
            "prompt_tokens": len(job.request.prompt),
        }
        if generation is not None:
            finished = generation.finished
            found |= {
                "cached_tokens": generation.cached,
                "answer": tokenizer.decode(generation.tokens),
                "completion_tokens": len(generation.tokens),
                "finish_reason": finished.reason if finished is not None else None,
            }
        with self._lock:
            try:
                self._file.write(json.dumps(found, ensure_ascii=False) + "\n")
                self._file.flush()
            except OSError as error:
                log.warning("the trace cannot be written: %s", error)

    def close(self) -> None:
        """Nothing more is written."""
        with self._lock:
            self._file.close()
