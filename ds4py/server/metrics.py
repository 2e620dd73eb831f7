"""What the server says about itself: /metrics for Prometheus, /status for the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ds4py.server.worker import Worker


def status(worker: Worker) -> dict[str, Any]:
    """The server's state as JSON: what runs, what waits, and counters since the start."""
    counters = worker.counters
    return {
        "model": worker.engine.name if worker.engine is not None else None,
        "context": worker.engine.context if worker.engine is not None else None,
        "active": worker.n_active,
        "reading": worker.n_reading,
        "waiting": worker.n_waiting,
        "requests": counters.requests,
        "cancelled": counters.cancelled,
        "failed": counters.failed,
        "refused": counters.refused,
        "prompt_tokens": counters.prompt_tokens,
        "cached_tokens": counters.cached_tokens,
        "read_tokens": counters.read_tokens,
        "written_tokens": counters.written_tokens,
        "prefill_s": round(counters.prefill_s, 3),
        "decode_s": round(counters.decode_s, 3),
        "finished": dict(counters.finished),
        "sessions": worker.sessions,
        "engine": worker.engine_stats,
    }


def prometheus(worker: Worker) -> bytes:
    """The same in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Collector(worker))
    return generate_latest(registry)


class _Collector:
    """Families made from the worker's counters when asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        worker, counters = self._worker, self._worker.counters
        gauges: tuple[tuple[str, str, float], ...] = (
            ("active", "Requests being answered.", worker.n_active),
            ("reading", "Requests whose prompt is being read.", worker.n_reading),
            ("waiting", "Requests in the queue.", worker.n_waiting),
            ("kv_bytes", "Memory of all sessions.", worker.sessions.get("kv_bytes", 0)),
            ("sessions", "Sessions in memory.", worker.sessions.get("live", 0)),
        )
        totals: tuple[tuple[str, str, float], ...] = (
            ("requests", "Answers asked for.", counters.requests),
            ("requests_cancelled", "Answers whose client left.", counters.cancelled),
            ("requests_failed", "Answers that ended with an error.", counters.failed),
            ("requests_refused", "Answers refused because of a full queue.", counters.refused),
            ("prompt_tokens", "Tokens of prompts.", counters.prompt_tokens),
            ("prompt_tokens_cached", "Those that need not be read.", counters.cached_tokens),
            ("prompt_tokens_read", "Those that were read.", counters.read_tokens),
            ("completion_tokens", "Tokens written.", counters.written_tokens),
            ("prefill_seconds", "Time spent reading.", counters.prefill_s),
            ("decode_seconds", "Time answers took after their prompt.", counters.decode_s),
        )
        for name, text, n in gauges:
            yield GaugeMetricFamily(f"ds4_{name}", text, value=float(n))
        for name, text, n in totals:
            yield CounterMetricFamily(f"ds4_{name}", text, value=float(n))
        answers = CounterMetricFamily("ds4_answers", "Answers by their end.", labels=["reason"])
        for reason, n in dict(counters.finished).items():
            answers.add_metric([reason], float(n))
        yield answers
        engine = CounterMetricFamily("ds4_engine", "The engine's own counters.", labels=["name"])
        named = {
            f"{part}_{name}": value
            for part in ("experts", "draft")
            for name, value in (worker.engine_stats.get(part) or {}).items()
        }
        for name, value in {**worker.engine_stats, **named}.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                engine.add_metric([name], float(value))
        yield engine
