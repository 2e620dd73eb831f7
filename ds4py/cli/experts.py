"""What the command line does for streamed experts: the routing trace, and figures for people."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ds4py import Engine


@contextmanager
def tracing(engine: "Engine", file: str | None) -> Iterator[None]:
    """Write the routing of everything computed meanwhile to a file, if one is named.

    Raises InputError when it cannot be written.
    """
    if file is None:
        yield
        return
    from ds4py.experts.trace import TraceFacts, Writer

    swap = engine.options.streaming.swap if engine.plan.streamed else 0.0
    writer = Writer(Path(file).expanduser(), TraceFacts.of(engine.name, engine.config, swap))
    engine.experts.trace = writer
    try:
        yield
    finally:
        engine.experts.trace = None
        writer.close()


def statistics(stats: Mapping[str, Any]) -> str:
    """Lines about streamed experts; empty where all are resident."""
    if not stats:
        return ""
    from ds4py.sizes import format_size

    steps = max(1, stats["steps"])
    lines = [
        f"ds4: experts {100 * stats['hit_rate']:.1f} % in time ({stats['hits']} present, "
        f"{stats['prefetched']} read ahead, {stats['misses']} missed); "
        f"{format_size(stats['bytes_read'] / steps)} read a step; tokens "
        f"waited {stats['stall_ms_p50']:.1f} ms, 95 % of them less than "
        f"{stats['stall_ms_p95']:.1f} ms"
    ]
    if stats["swap"]:
        lines.append(
            f"ds4: {100 * stats['swapped']:.1f} % of the experts swapped for present ones, "
            f"{100 * stats['kept_mass']:.2f} % of the score mass kept"
        )
    return "\n".join(lines)
