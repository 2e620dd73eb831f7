"""Load on a real `ds4 serve`: what the server adds to a token, what batching gives, what leaks.

    python tools/serve_load.py speed                     tokens/s: engine alone, one stream, four
    python tools/serve_load.py gap                       a stream while 10,000 tokens are read
    python tools/serve_load.py soak --seconds 600        16 clients, 30 % of which leave at random

Prints a table and, as the last line, JSON. The soak's exit code is 1 when an answer differs from
the one given alone, a stream does not end as it should, or memory or files grow.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

QUESTIONS = [
    "What is 17 + 25?",
    "Tell me a short story about a fox.",
    "Tell me a story about a boat.",
    "What is 61 + 12?",
    "Tell me a short story about an owl.",
]


class Server:
    """`ds4 serve` in a process of its own, on a free port."""

    def __init__(self, directory: Path, *options: str) -> None:
        command = [sys.executable, "-m", "ds4py", "serve", "--port", "0", "--kv-dir", "none"]
        self.process = subprocess.Popen(
            [*command, *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HOME": str(directory)},
        )
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if "serving" in line)
        self.port = int(line.split("http://127.0.0.1:")[1].split()[0])
        self.url = f"http://127.0.0.1:{self.port}"
        self.said: list[str] = []
        """What it writes on stderr once it serves."""
        threading.Thread(target=self.said.extend, args=(self.process.stderr,), daemon=True).start()

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)

    def status(self) -> dict[str, Any]:
        connection = self.connection()
        connection.request("GET", "/status")
        found = json.loads(connection.getresponse().read())
        connection.close()
        return dict(found)

    def used(self) -> tuple[int, int]:
        """Resident memory in bytes, and open files. Linux only."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(list((proc / "fd").iterdir()))

    def finish(self) -> tuple[dict[str, Any], tuple[int, int], int]:
        """Status and use once nothing runs or waits any more, and the exit code; what still does
        after two minutes hangs."""
        deadline = time.monotonic() + 120
        while (state := self.status())["active"] + state["waiting"] and time.monotonic() < deadline:
            time.sleep(0.1)
        return state, self.used(), self.stop()

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(120)


def body(question: str, **more: Any) -> bytes:
    messages = [{"role": "user", "content": question}]
    asked = {"messages": messages, "stream": True, "temperature": 0, **more}
    return json.dumps({"thinking": {"type": "disabled"}, **asked}).encode()


def read_stream(
    response: http.client.HTTPResponse, leave_after: int | None = None
) -> tuple[str, bool]:
    """The content, and whether the stream ended as it should; stops after that many events."""
    text, finished, n = "", False, 0
    for line in response:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            text += "".join(c["delta"].get("content") or "" for c in choices)
            finished |= any(c["finish_reason"] for c in choices)
            n += 1
            if leave_after is not None and n >= leave_after:
                return text, False
        elif line.startswith(b"data: [DONE]"):
            return text, finished
    return text, False


@dataclass
class Tally:
    """What the clients saw."""

    answered: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def client(server: Server, expected: dict[str, str], until: float, leave: float, n: int) -> Any:
    """One client of the soak; its results go into the tally it returns."""
    tally, rng = Tally(), random.Random(n)

    def run() -> None:
        while time.monotonic() < until:
            question = rng.choice(QUESTIONS)
            connection = server.connection()
            connection.request("POST", "/v1/chat/completions", body(question))
            leaves = rng.random() < leave
            if leaves and rng.random() < 0.3:
                connection.close()  # before anything was answered
                tally.left += 1
                continue
            response = connection.getresponse()
            text, ended = read_stream(response, rng.randint(1, 20) if leaves else None)
            connection.close()
            if not ended:
                tally.left += leaves
                if leaves and expected[question].startswith(text):
                    continue
            if not ended or text != expected[question]:
                tally.wrong.append(f"{question}: {text!r}, status {response.status}")
            else:
                tally.answered += 1

    thread = threading.Thread(target=run)
    thread.start()
    return thread, tally


def soak(seconds: float, clients: int, leave: float) -> int:
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory), "--queue", "256")
        expected = {}
        for question in QUESTIONS:
            connection = server.connection()
            connection.request("POST", "/v1/chat/completions", body(question))
            expected[question], _ = read_stream(connection.getresponse())
            connection.close()
        started = time.monotonic()
        running = [client(server, expected, started + seconds, leave, n) for n in range(clients)]
        samples = []
        while any(thread.is_alive() for thread, _ in running):
            time.sleep(min(5.0, seconds / 10))
            samples.append(server.used())
        for thread, _ in running:
            thread.join()
        state, (memory, files), code = server.finish()
    tallies = [tally for _, tally in running]
    wrong = [text for tally in tallies for text in tally.wrong]
    settled = samples[len(samples) // 4][0] if samples else memory
    report = {
        "seconds": round(time.monotonic() - started),
        "clients": clients,
        "answered": sum(tally.answered for tally in tallies),
        "left": sum(tally.left for tally in tallies),
        "wrong": len(wrong),
        "cancelled": state["cancelled"],
        "failed": state["failed"],
        "active_at_end": state["active"],
        "tokens_per_s": round(state["written_tokens"] / seconds, 1),
        "memory_mb": [round(settled / 1e6), round(memory / 1e6)],
        "files": [min(n for _, n in samples), files],
        "exit_code": code,
    }
    for text in wrong[:10]:
        print("wrong:", text)
    for name, value in report.items():
        print(f"{name:15} {value}")
    print(json.dumps(report))
    grown = memory > settled * 1.1 + 20e6 or files > 40
    return int(bool(wrong or grown or state["active"] or state["failed"] or code))


def engine_rate(tokens: int) -> float:
    """Tokens per second of the engine alone, on the same prompt."""
    from ds4py import Engine, SamplingOptions
    from ds4py.text import chat

    engine = Engine.open("tiny")
    assert engine.tokenizer is not None
    asked = [{"role": "user", "content": QUESTIONS[1]}]
    prompt = engine.tokenizer.encode(chat.segments(asked, thinking=False))
    session = engine.session()
    session.sync(prompt)
    options = SamplingOptions(max_tokens=tokens, temperature=0, stop_at_eos=False)
    stream = session.generate(options)
    next(stream)
    start = time.perf_counter()
    n = sum(1 for _ in stream)
    return n / (time.perf_counter() - start)


def server_rate(server: Server, streams: int, tokens: int) -> float:
    """Tokens per second of all streams together, from their first tokens to their last."""
    begun = threading.Barrier(streams + 1)
    ended = threading.Barrier(streams + 1)

    def run() -> None:
        connection = server.connection()
        asked = body(QUESTIONS[1], ignore_eos=True, max_tokens=tokens)
        connection.request("POST", "/v1/chat/completions", asked)
        response = connection.getresponse()
        read_stream(response, 2)
        begun.wait()
        response.read()
        ended.wait()
        connection.close()

    threads = [threading.Thread(target=run) for _ in range(streams)]
    for thread in threads:
        thread.start()
    begun.wait()
    before, start = server.status()["written_tokens"], time.perf_counter()
    ended.wait()
    seconds = time.perf_counter() - start
    return (server.status()["written_tokens"] - before) / seconds


def speed(tokens: int, repeat: int) -> int:
    """Medians; ratios are taken within a round, so that a slow minute hits both sides."""
    with tempfile.TemporaryDirectory() as directory:
        server = Server(Path(directory))
        rounds = [
            (engine_rate(tokens), server_rate(server, 1, tokens), server_rate(server, 4, tokens))
            for _ in range(repeat)
        ]
        server.stop()
    engine, one_stream, four_streams = map(statistics.median, zip(*rounds, strict=True))
    report = {
        "engine": round(engine, 1),
        "one_stream": round(one_stream, 1),
        "four_streams": round(four_streams, 1),
        "added_share": round(statistics.median(alone / one - 1 for alone, one, _ in rounds), 3),
        "batching": round(statistics.median(four / one for _, one, four in rounds), 2),
    }
    for name, value in report.items():
        print(f"{name:15} {value}")
    print(json.dumps(report))
    return 0


def gap(tokens: int) -> int:
    """Longest and median processor time between two tokens of a running stream, in ms, while a
    prompt of 10,000 tokens is read: with the stream there first, and the prompt."""
    from ds4py import Engine, SamplingOptions
    from ds4py.bench.speed import make_prompt
    from ds4py.engine.scheduler import Scheduler
    from ds4py.server.request import Reading, Request
    from ds4py.server.worker import Job, Worker

    engine = Engine.open("tiny")
    worker = Worker(lambda progress: (engine, Scheduler(engine, 1 << 30)), 4, 4)
    worker.start()
    worker.opened.wait()
    made = make_prompt(engine, 10_100)

    def ask(prompt: list[int], n_tokens: int) -> tuple[list[tuple[float, Any]], threading.Event]:
        """What comes, and when in the worker's processor time; set once the first has come."""
        seen: list[tuple[float, Any]] = []
        begun = threading.Event()

        def deliver(events: list[Any]) -> None:
            seen.extend((time.thread_time(), event) for event in events)
            begun.set()

        sampling = SamplingOptions(max_tokens=n_tokens, temperature=0, stop_at_eos=False)
        worker.submit([Job(Request(prompt, sampling, parsed=False), deliver)])
        return seen, begun

    report: dict[str, Any] = {}
    for first in ("stream", "prompt"):
        stream, prompt = (made[:40], tokens), (made[100:], 1)
        made.reverse()  # so that nothing is cached the next time
        one, begun = ask(*(stream if first == "stream" else prompt))
        begun.wait()
        other, _ = ask(*(prompt if first == "stream" else stream))
        while worker.n_active or worker.n_waiting:
            time.sleep(0.1)
        seen = one if first == "stream" else other
        at = [when for when, event in seen if not isinstance(event, Reading)]
        gaps = sorted(1000 * (b - a) for a, b in itertools.pairwise(at))
        report[f"{first}_first_longest_ms"] = round(gaps[-1], 1)
        report[f"{first}_first_median_ms"] = round(gaps[len(gaps) // 2], 1)
    worker.stop()
    for name, value in report.items():
        print(f"{name:25} {value}")
    print(json.dumps(report))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "gap", "soak"))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--leave", type=float, default=0.3)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeat", type=int, default=7)
    given = parser.parse_args()
    if given.what == "speed":
        return speed(given.tokens, given.repeat)
    if given.what == "gap":
        return gap(given.tokens)
    return soak(given.seconds, given.clients, given.leave)


if __name__ == "__main__":
    sys.exit(main())
