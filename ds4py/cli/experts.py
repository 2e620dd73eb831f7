"""What the command line does for streamed experts: options, the routing trace, figures."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds4py.cli import settings as given

if TYPE_CHECKING:
    from ds4py import Engine

Where = Annotated[
    str | None,
    typer.Option(
        metavar="WHERE",
        help="Routed experts: resident, streamed from disk, or auto: as memory allows.",
    ),
]
Verify = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN",
        help="Check streamed experts, by checksum or, as GGUF files have none, by their scales: "
        "first (default: when first read), always, never.",
    ),
]
Swap = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        help="Let experts in memory step in for absent ones within F of the score range, as 0.05; "
        "changes the answers. Default: 0, exact.",
    ),
]
Prefetch = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="Read experts ahead: hash (default), those the token ids tell; router, also those "
        "the next layer's router guesses; off.",
    ),
]
Trace = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Write which experts every token used, for ds4 bench."),
]


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


def bench(
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="NAME|DIR", help="Model to measure.")
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Only replay this trace, made by ds4 generate --trace."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to decode.")] = 256,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory the engine may use, e.g. 48GB.")
    ] = None,
    experts: Where = None,
    prefetch: Prefetch = None,
    disk: Annotated[bool, typer.Option("--disk/--no-disk", help="Measure the disk, too.")] = True,
) -> int:
    """Measure streamed experts: reads against the disk's own limit, a run of the model, and what
    caches of several sizes and policies would miss on its routing, with the bound beside them.

    Prints tables and, as the last line, JSON with the machine and the version.
    """
    from ds4py.cli.bench_experts import run

    choice = given.choose_model(model)
    where = given.ExpertChoice(experts, prefetch=prefetch)
    return run(choice, given.Settings(choice, memory=memory, experts=where), trace, tokens, disk)
