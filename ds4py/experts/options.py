"""How routed experts are streamed: choices of the machine's owner."""

from __future__ import annotations

from dataclasses import dataclass

from ds4py.errors import OptionsError

POLICIES = ("lru", "decayed")
VERIFY = ("first", "always", "never")
PREFETCH = ("hash", "router", "off")


@dataclass(frozen=True)
class StreamingOptions:
    """Raises OptionsError for values that make no sense. Only `swap` changes what is computed."""

    slots: int | None = None
    """Expert records kept in memory; None = as many as the memory plan allows."""
    policy: str = "lru"
    """Which record gives way: "lru", or "decayed" (use counts that halve every 128 tokens)."""
    readers: int | None = None
    """Reads in flight; None = what a short probe of the disk finds best."""
    verify: str = "first"
    """Records are checked (`LayerRecords.fault`) at their "first" load, "always", or "never"."""
    prefetch: str = "hash"
    """"hash": hash-routed layers, exactly, from the token ids; "router": also the next layer's
    router on the current streams; "off"."""
    swap: float = 0.0
    """Cache-aware routing: an absent expert may give way to a present one whose score is lower by
    at most this share of the layer's range. 0 = exact."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("policy", self.policy, POLICIES),
            ("verify", self.verify, VERIFY),
            ("prefetch", self.prefetch, PREFETCH),
        ):
            if value not in known:
                raise OptionsError(f"{name} is {value!r}; need one of {', '.join(known)}")
        for name, count in (("slots", self.slots), ("readers", self.readers)):
            if count is not None and not 1 <= count <= 1 << 20:
                raise OptionsError(f"{name} is {count}; need an integer from 1 to {1 << 20}")
        if not 0 <= self.swap <= 1:
            raise OptionsError(f"swap is {self.swap}; need a share from 0 (exact) to 1")
