"""What the machine's owner chooses (EngineOptions) and what a request chooses (SamplingOptions)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ds4py.errors import OptionsError
from ds4py.experts.options import StreamingOptions

DTYPES = ("auto", "bfloat16", "float32")
EXPERTS = ("auto", "resident", "streamed")


@dataclass(frozen=True)
class EngineOptions:
    """How a model is opened. Raises OptionsError for values that make no sense."""

    context: int | None = None
    """Most tokens a session may hold, at most what RoPE spans; None = what the model was made for,
    or as much of it as a quarter of the memory holds."""
    memory: str | None = None
    """Budget such as "24GB": experts it has no room for stay on disk, and what does not fit even
    so is refused. None = seven eighths of what the machine reports as usable."""
    kernels: str = "auto"
    """"auto", "metal" or "reference" (plain MLX operations)."""
    dtype: str = "auto"
    """Activations: "bfloat16", "float32", or "auto" (bfloat16 on a GPU, float32 on a CPU). On a CPU
    "float32" by name takes its sums in float64: for comparisons, at half the speed of "auto"."""
    trained_rounding: bool = True
    """The FP8/FP4 round trips of KV and index rows the model was trained with."""
    experts: str = "auto"
    """Where routed experts live: "resident" in memory, "streamed" from disk, or "auto", which
    streams what the memory plan has no room for."""
    streaming: StreamingOptions = field(default_factory=StreamingOptions)
    """How experts are streamed, where they are."""
    draft: bool = False
    """Whether the model's draft layer (MTP) guesses tokens. The answers are the same."""
    prefill_chunk: int = 512
    """Prompt tokens per step: bounds the memory and the time of one evaluation."""

    def __post_init__(self) -> None:
        _need(self.context is None or self.context >= 1, "context", self.context, "at least 1")
        _need(self.prefill_chunk >= 1, "prefill_chunk", self.prefill_chunk, "at least 1")
        _need(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _need(self.experts in EXPERTS, "experts", self.experts, f"one of {', '.join(EXPERTS)}")
        if self.draft and self.streaming.swap:
            raise OptionsError(
                f"draft and swap {self.streaming.swap}: which experts are swapped would depend on "
                "what is guessed; leave one of the two out"
            )


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen. The defaults are the family's. Raises OptionsError."""

    max_tokens: int | None = None
    """None = until the model stops or the context is full."""
    temperature: float = 1.0
    """0 = always the most likely token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 = off."""
    min_p: float = 0.05
    """Drops tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Divides positive logits (multiplies negative ones) of tokens in prompt and answer."""
    presence_penalty: float = 0.0
    """Subtracted from logits of tokens that the answer already holds."""
    frequency_penalty: float = 0.0
    """Subtracted once per occurrence in the answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); -inf forbids the token."""
    top_logprobs: int | None = None
    """None = no log-probabilities; n = those of the token and of the n likeliest."""
    seed: int | None = None
    """Same seed, same prompt: same tokens. None = a fresh one."""
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these strings, wherever token boundaries fall."""
    stop_at_eos: bool = True

    def __post_init__(self) -> None:
        n, t, k = self.max_tokens, self.temperature, self.top_k
        _need(n is None or n >= 1, "max_tokens", n, "at least 1")
        _need(0 <= t < float("inf"), "temperature", t, "a number >= 0")
        _need(0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _need(k >= 0, "top_k", k, "0 (off) or more")
        _need(0 <= self.min_p <= 1, "min_p", self.min_p, "a number in [0, 1]")
        repetition = self.repetition_penalty
        _need(0 < repetition < float("inf"), "repetition_penalty", repetition, "a number > 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _need(abs(getattr(self, name)) <= 100, name, getattr(self, name), "within +-100")
        _need(all(self.stop), "stop", list(self.stop), "non-empty strings")
        for token, bias in self.logit_bias:
            _need(token >= 0 and bias < float("inf"), "logit_bias", (token, bias), "id and number")
        top = self.top_logprobs
        _need(top is None or 0 <= top <= 100, "top_logprobs", top, "0 to 100")
        seed = self.seed
        _need(seed is None or 0 <= seed < 2**63, "seed", seed, "an integer from 0 to 2^63-1")


def _need(ok: bool, name: str, value: object, rule: str) -> None:
    if not ok:
        raise OptionsError(f"{name} is {value!r}; need {rule}")
