"""Where a model's memory goes, in lines for people and in one object for scripts."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ds4py.errors import OptionsError

if TYPE_CHECKING:
    from ds4py.config import ModelConfig
    from ds4py.engine.footprint import Numerics
    from ds4py.engine.memory import MemoryPlan


def memory_lines(
    config: "ModelConfig", numerics: "Numerics", plan: "MemoryPlan | OptionsError"
) -> Iterator[tuple[str, str]]:
    """Title and text of each line; an error says what does not fit."""
    from ds4py.engine.footprint import bytes_per_token
    from ds4py.sizes import format_size

    yield "session", f"{bytes_per_token(config, numerics.rows):.0f} B for each token"
    if isinstance(plan, OptionsError):
        yield "memory", f"does not fit: {plan}"
        return
    held = "all in memory"
    if plan.streamed:
        n_slots = sum(part.n_cached for part in plan.slots)
        held = f"{n_slots} records in memory, of {format_size(plan.all_experts)} on disk"
    parts = (
        (plan.runtime, "the program"),
        (plan.dense, "weights every token reads"),
        (plan.kv, f"a session of {plan.context} tokens"),
        (plan.scratch, "working memory, at most"),
        (plan.experts, f"routed experts, {held}"),
        (plan.decoded, "routed experts that stay decoded, at most"),
        (plan.total, f"of {format_size(plan.budget)}"),
    )
    for n, (size, purpose) in enumerate(part for part in parts if part[0]):
        yield "" if n else "memory", f"{format_size(size):>9}  {purpose}"


def memory_report(
    config: "ModelConfig", numerics: "Numerics", plan: "MemoryPlan | OptionsError"
) -> dict[str, Any]:
    """The same in bytes; `error` where it does not fit."""
    from ds4py.engine.footprint import bytes_per_token

    per_token = bytes_per_token(config, numerics.rows)
    if isinstance(plan, OptionsError):
        return {"kv_bytes_per_token": per_token, "error": str(plan)}
    return {
        "kv_bytes_per_token": per_token,
        "budget": plan.budget,
        "context": plan.context,
        "program": plan.runtime,
        "dense": plan.dense,
        "kv": plan.kv,
        "scratch": plan.scratch,
        "experts": plan.experts,
        "decoded": plan.decoded,
        "experts_on_disk": plan.all_experts if plan.streamed else 0,
        "resident_records": sum(part.n_cached for part in plan.slots) if plan.streamed else None,
        "streamed": plan.streamed,
        "total": plan.total,
    }
