"""Tokens per second of a model: decoding near and far into the context, and reading prompts.

Measures through `Engine` and `Session`, as any caller would. The prompt is made of random text
tokens with a fixed seed, so that hash routing and expert choice see all of the vocabulary.
"""

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ds4py.errors import OptionsError

if TYPE_CHECKING:
    from ds4py import Engine

POSITIONS = (100, 4000)
LENGTHS = (128, 512, 2048)
SEED = 1


@dataclass(frozen=True)
class Rate:
    """The median of several runs of the same work."""

    work: str
    """`decode` or `prefill`."""
    at: int
    """decode: tokens already in the context; prefill: length of the prompt."""
    tokens: int
    tps: float
    runs: tuple[float, ...]
    """Tokens per second of each run."""


def measure(
    engine: "Engine",
    tokens: int = 64,
    repeat: int = 3,
    positions: Sequence[int] = POSITIONS,
    lengths: Sequence[int] = LENGTHS,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Rate]:
    """Rates of prefill at each length and of decode at each position that fits the context.

    The first run of each is a warm-up and not counted. Raises OptionsError when nothing fits.
    """
    lengths = [n for n in lengths if n <= engine.context]
    positions = [n for n in positions if n + tokens <= engine.context]
    if not lengths or not positions:
        raise OptionsError(
            f"a context of {engine.context} tokens is too short to measure in; "
            f"{POSITIONS[0] + tokens} are needed"
        )
    prompt = make_prompt(engine, max([*lengths, *positions]))
    total = (len(lengths) + len(positions)) * (repeat + 1)
    done = 0
    rates = []
    jobs = [("prefill", n) for n in lengths] + [("decode", n) for n in positions]
    for work, at in jobs:
        run = (
            _decoder(engine, prompt[:at], tokens)
            if work == "decode"
            else _reader(engine, prompt[:at])
        )
        seconds = []
        for _ in range(repeat + 1):
            seconds.append(run())
            done += 1
            if progress:
                progress("measure", done, total)
        count = tokens - 1 if work == "decode" else at
        runs = tuple(round(count / s, 2) for s in seconds[1:])
        rates.append(Rate(work, at, count, round(statistics.median(runs), 2), runs))
    return rates


def _reader(engine: "Engine", prompt: list[int]) -> Callable[[], float]:
    """Seconds to read the whole prompt into a new session."""

    def run() -> float:
        session = engine.session()
        start = perf_counter()
        session.sync(prompt)
        return perf_counter() - start

    return run


def _decoder(engine: "Engine", prompt: list[int], tokens: int) -> Callable[[], float]:
    """Seconds from the first new token after the prompt to the last."""
    from ds4py import SamplingOptions

    session = engine.session()
    greedy = SamplingOptions(max_tokens=tokens, temperature=0.0, stop_at_eos=False)

    def run() -> float:
        session.sync(prompt)
        stream = session.generate(greedy)
        next(stream)
        start = perf_counter()
        for _ in stream:
            pass
        return perf_counter() - start

    return run


def make_prompt(engine: "Engine", length: int) -> list[int]:
    """Random tokens, none of them a control token where that is known."""
    vocabulary: Sequence[int] = range(engine.config.vocab_size)
    if engine.tokenizer is not None:
        tokenizer = engine.tokenizer
        vocabulary = [n for n in range(tokenizer.vocab_size) if not tokenizer.is_control(n)]
    return random.Random(SEED).choices(vocabulary, k=length)


def as_json(engine: "Engine", rates: Sequence[Rate], machine: dict[str, Any]) -> dict[str, Any]:
    """One flat object: the rates, the model and what it ran on."""
    return {
        "bench": "speed",
        "model": engine.name,
        "context": engine.context,
        "rates": [asdict(rate) for rate in rates],
        "machine": machine,
    }
