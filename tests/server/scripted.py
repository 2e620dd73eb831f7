"""A model that says what a test wants: at the engine's seam, so that all of the server is real.

Tokens are those of the embedded model's tokenizer. Also runs as a program, for clients in other
languages: `python -m tests.server.scripted ANSWERS.json` serves each text of the list in turn and
prints its port.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ds4py import assets
from ds4py.engine.session import Token, check_tokens
from ds4py.server import listen
from ds4py.server.app import Rules
from ds4py.server.connection import Connection
from ds4py.server.worker import Worker
from ds4py.text import tokenizer as tokenizers
from ds4py.text.detokenizer import Detokenizer
from ds4py.text.messages import BOS, CONTROL_TOKENS, EOS, Segment
from ds4py.text.spelling import common_prefix
from tests.server.clients import Clients

BOS_SEGMENT = Segment(BOS, control=True)
_CONTROL = re.compile("(" + "|".join(map(re.escape, CONTROL_TOKENS)) + ")")


def segments(text: str) -> list[Segment]:
    """Text whose control tokens are meant."""
    pieces = _CONTROL.split(text)
    return [Segment(piece, control=bool(i % 2)) for i, piece in enumerate(pieces) if piece]


@dataclass
class Script:
    """What the model answers, one text for each request; the last one stays."""

    answers: list[str]
    ends: bool = True
    """Whether an end token follows; otherwise the text comes again and again."""
    by_character: bool = False
    """Whether every character is a token of its own, as no tokenizer would have it."""
    before_token: Callable[[int], None] = lambda position: None
    before_slice: Callable[[int], None] = lambda position: None
    prompts: list[list[int]] = field(default_factory=list)
    """What was asked."""
    closed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released whenever an answer ends, however it does."""
    n_open: int = 0
    """Answers being written now."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def spell(self, tokenizer: Any, text: str) -> list[int]:
        """The ids of an answer."""
        if not self.by_character:
            return list(tokenizer.encode(segments(text)))
        pieces = [[s] if s.control else [Segment(c) for c in s.text] for s in segments(text)]
        parts = [part for several in pieces for part in several]
        return [token for part in parts for token in tokenizer.encode([BOS_SEGMENT, part])[1:]]

    def next(self) -> str:
        with self.lock:
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class ScriptedSession:
    """Answers with the script's texts, token by token."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.tokens: list[int] = []
        self.reused = 0
        self.seed: int | None = None
        self.rest: list[int] = []  # of an answer that was broken off

    @property
    def position(self) -> int:
        return len(self.tokens)

    def sync_slices(
        self, tokens: Sequence[int], chunk: Callable[[], int], top_logprobs: int | None = None
    ) -> Iterator[tuple[int, int]]:
        check_tokens(list(tokens), self.engine.context, self.engine.config.vocab_size)
        self.reused = common_prefix(self.tokens, tokens)
        self.tokens, self.rest = self.tokens[: self.reused], []
        return self._read(list(tokens), chunk)

    def _read(self, tokens: list[int], chunk: Callable[[], int]) -> Iterator[tuple[int, int]]:
        total = len(tokens) - self.reused
        while self.position < len(tokens):
            self.engine.script.before_slice(self.position)
            self.tokens = tokens[: self.position + chunk()]
            yield self.position - self.reused, total

    def generate(self, options: Any, constraint: Any = None) -> Iterator[Token]:
        script, tokenizer = self.engine.script, self.engine.tokenizer
        script.n_open += 1
        ids = self.rest
        try:
            if not ids:
                script.prompts.append(list(self.tokens))
                ids = script.spell(tokenizer, script.next() + (EOS if script.ends else ""))
            detokenizer = Detokenizer(tokenizer)
            limit = self.engine.context - self.position
            n_tokens = min(options.max_tokens or limit, limit)
            for n in range(n_tokens):
                script.before_token(n)
                token = ids[n % len(ids)]
                self.rest = ids[(n + 1) % len(ids) :] + ids[: (n + 1) % len(ids)]
                self.tokens.append(token)
                ended = token == tokenizer.eos_id
                last = ended or n + 1 == n_tokens
                text = "" if ended else detokenizer.push(token)
                reason = ("stop" if ended else "length") if last else None
                yield Token(token, text + (detokenizer.flush() if last else ""), reason)
                if last:
                    return
        finally:
            script.n_open -= 1
            script.closed.release()


class ScriptedEngine:
    """What the server uses of an Engine."""

    name = "scripted"

    def __init__(self, script: Script, context: int = 16384) -> None:
        self.script = script
        self.context = context
        self.tokenizer = tokenizers.load(assets.path("models", "tiny"))
        self.config = SimpleNamespace(
            vocab_size=self.tokenizer.vocab_size,
            eos_token_id=self.tokenizer.eos_id,
            max_position_embeddings=1 << 20,
        )
        self.options = SimpleNamespace(prefill_chunk=512)

    def stats(self) -> dict[str, Any]:
        return {"model": self.name}


class ScriptedScheduler:
    """Lends the session that was used last, or a new one."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.engine = engine
        self.free: list[ScriptedSession] = []
        self.n_lent = 0

    def respell(self, tokens: list[int]) -> list[int]:
        return tokens

    def acquire(self, tokens: list[int], answer: int) -> ScriptedSession:
        self.n_lent += 1
        return self.free.pop() if self.free else ScriptedSession(self.engine)

    def release(self, session: ScriptedSession, awaiting_tool: bool) -> None:
        self.n_lent -= 1
        self.free.append(session)

    def stats(self) -> dict[str, int]:
        return {"live": len(self.free) + self.n_lent, "busy": self.n_lent, "kv_bytes": 0}

    def close(self) -> None:
        self.free.clear()


class Running(Clients):
    """A server in a thread of this process, on TCP and, if wanted, a Unix socket."""

    def __init__(
        self,
        engine: Any,
        rules: Rules | None = None,
        slots: int = 4,
        queue: int = 64,
        connection: type[Connection] = Connection,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.scheduler: Any = ScriptedScheduler(engine)
        self.worker = Worker(lambda progress: (engine, self.scheduler), slots, queue)
        listener = listen.open_tcp("127.0.0.1", 0)
        self.address: tuple[str, int] = listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._ready = threading.Event()
        self._stop: Callable[[], object] = lambda: None
        self._thread = threading.Thread(
            target=listen.run,
            args=(self.worker, rules or Rules(), [listener], 0.2, self._announced, connection),
            daemon=True,
        )

    def _announced(self, stop: Callable[[], object]) -> None:
        self._stop = stop
        self._ready.set()

    def __enter__(self) -> Running:
        self._thread.start()
        assert self._ready.wait(60)
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stop()
        self._thread.join(30)
        assert not self._thread.is_alive()

    def post(self, path: str, body: Any) -> socket.socket:
        """A connection on which a request was sent."""
        connection, text = self.connect(), json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(text)}\r\n\r\n"
        connection.sendall(head.encode() + text)
        return connection

    def connect(self) -> socket.socket:
        """A bare connection."""
        connection = socket.create_connection(self.address)
        connection.settimeout(30)
        return connection


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        script = Script(json.load(file))
    listener = listen.open_tcp("127.0.0.1", 0)

    def announce(stop: object) -> None:
        print(listener.getsockname()[1], flush=True)

    engine: Any = ScriptedEngine(script, context=1_000_000)
    scheduler: Any = ScriptedScheduler(engine)
    worker = Worker(lambda progress: (engine, scheduler), 4, 64)
    listen.run(worker, Rules(), [listener], 1.0, announce)


if __name__ == "__main__":
    main()
