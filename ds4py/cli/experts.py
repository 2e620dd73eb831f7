"""What the command line does for streamed experts: the routing trace, figures; and counters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4py.cli import settings as given
from ds4py.cli.arguments import (
    NO_EXPERT_CHOICE,
    ExpertChoice,
    Kernels,
    Memory,
    Model,
    with_experts,
)

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


def counters(stats: Mapping[str, Any]) -> str:
    """Lines about an engine's drafts, streamed experts and Metal kernels, where there are any."""
    lines = _drafts(stats["draft"]), _streaming(stats["experts"]), _kernels(stats["kernels"])
    return "\n".join(filter(None, lines))


def _drafts(stats: Mapping[str, Any]) -> str:
    if not stats:
        return ""
    state = "; paused, as they do not pay for now" if stats["gate"] == "closed" else ""
    return f"ds4: {stats['drafted']} tokens drafted, {stats['accepted']} accepted{state}"


def _kernels(stats: Mapping[str, Any]) -> str:
    if not stats:
        return ""
    line = f"ds4: Metal kernels were launched {sum(stats['launches'].values())} times"
    for what, count in stats["plain"].items():
        line += f"; {what}: by MLX's own operations, {count} times"
    return line


def _streaming(stats: Mapping[str, Any]) -> str:
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
    if stats["prefetch"] != "off":
        useful, late, wasted = (
            format_size(stats[f"ahead_{name}_bytes"]) for name in ("useful", "late", "wasted")
        )
        lines.append(f"ds4: read ahead: {useful} in time, {late} late, {wasted} for nothing")
    if stats["swap"]:
        lines.append(
            f"ds4: {100 * stats['swapped']:.1f} % of the experts swapped for present ones, "
            f"{100 * stats['kept_mass']:.2f} % of the score mass kept"
        )
    return "\n".join(lines)


@with_experts
def bench(
    model: Model = None,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only replay this trace, made by ds4 generate --trace."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to decode.")] = 256,
    memory: Memory = None,
    experts: ExpertChoice = NO_EXPERT_CHOICE,
    kernels: Kernels = None,
    disk: Annotated[bool, typer.Option("--disk/--no-disk", help="Measure the disk, too.")] = True,
) -> int:
    """Measure streamed experts: reads against the disk's own limit, a run of the model, and what
    caches of several sizes and policies would miss on its routing, with the bound beside them.

    Prints tables and, as the last line, JSON with the machine and the version.
    """
    from ds4py.cli.bench_experts import run

    choice = given.choose_model(model)
    settings = given.Settings(choice, memory=memory, experts=experts, kernels=kernels)
    return run(choice, settings, trace, tokens, disk)
