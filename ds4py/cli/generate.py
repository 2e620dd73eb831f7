"""`ds4 generate`: one prompt, one answer on stdout."""

import json
import sys
from typing import TYPE_CHECKING, Any

from ds4py.cli import experts
from ds4py.cli.conversation import Message, Parser, RawParser, Turn, answer
from ds4py.cli.experts import tracing
from ds4py.cli.kv import kv_space, open_disk
from ds4py.cli.model import open_engine, tokenizer_of
from ds4py.cli.progress import ProgressBar
from ds4py.cli.settings import Settings, read_prompt
from ds4py.cli.view import PlainView, SilentView, View

if TYPE_CHECKING:
    from ds4py.text.tokenizer import Tokenizer


# A script wants the answer, and the reasoning would eat its --max-tokens: off unless asked for.
THINKING = False


def run(
    argument: str | None,
    settings: Settings,
    raw: bool,
    as_json: bool,
    stats: bool,
    trace: str | None = None,
) -> int:
    """Answer the prompt (the argument, or stdin); the exit code."""
    sampling = settings.sampling_options()
    settings.engine_options()  # a bad value is told before stdin is waited for
    prompt = read_prompt(argument, sys.stdin)
    kv_space(settings.kv_space)
    engine, load_s = open_engine(settings)
    disk = open_disk(engine, settings.kv_dir, settings.kv_space)
    tokenizer = tokenizer_of(engine)
    tokens = encode(prompt, settings, raw, tokenizer)
    turn = Turn(prompt_tokens=len(tokens))
    view: View = SilentView() if as_json else PlainView(sys.stdout, sys.stderr)
    session = engine.session()
    if disk is not None:
        disk.restore(session, tokens)
    with tracing(engine, trace), ProgressBar(sys.stderr) as bar:
        parser = make_parser(settings, raw)
        for event in answer(session, tokens, sampling, parser, turn, bar):
            view.event(event)
    view.end()
    if as_json:
        print(json.dumps(report(turn, load_s, engine.name), ensure_ascii=False), flush=True)
    if stats:
        lines = (statistics(turn, load_s), experts.counters(engine.stats()))
        print(*filter(None, lines), sep="\n", file=sys.stderr, flush=True)
    if disk is not None:
        sys.stdout.flush()  # the answer does not wait for the disk
        disk.keep(session, reply=False)
    return 0


def encode(prompt: str, settings: Settings, raw: bool, tokenizer: "Tokenizer") -> list[int]:
    """The prompt's token ids: in the chat encoding, or raw as BOS and text."""
    if raw:
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    from ds4py.text import chat

    messages: list[Message] = [{"role": "user", "content": prompt}]
    if settings.system:
        messages.insert(0, {"role": "system", "content": settings.system})
    return tokenizer.encode(
        chat.segments(messages, thinking=thinking(settings), effort=settings.effort)
    )


def make_parser(settings: Settings, raw: bool) -> Parser:
    """What splits the model's text into reasoning, content and tool calls."""
    if raw:
        return RawParser()
    from ds4py.text.stream import StreamParser

    return StreamParser(thinking=thinking(settings))


def thinking(settings: Settings) -> bool:
    """Whether the model reasons before it answers."""
    return THINKING if settings.thinking is None else settings.thinking


def report(turn: Turn, load_s: float, model: str) -> dict[str, Any]:
    """The one object of `--json`. Every key is always there."""
    return {
        "text": turn.message.get("content") or "",
        "reasoning": turn.message.get("reasoning_content") or "",
        "tool_calls": turn.message.get("tool_calls") or [],
        "finish_reason": turn.finish_reason,
        "tokens": turn.tokens,
        "usage": {
            "prompt_tokens": turn.prompt_tokens,
            "completion_tokens": len(turn.tokens),
            "cached_tokens": turn.cached_tokens,
        },
        "timing": {
            "load_s": round(load_s, 4),
            "prefill_s": round(turn.prefill_s, 4),
            "decode_s": round(turn.decode_s, 4),
            "prefill_tps": round(turn.prefill_tps, 2),
            "decode_tps": round(turn.decode_tps, 2),
        },
        "model": model,
    }


def statistics(turn: Turn, load_s: float | None = None) -> str:
    """One line for people about what an answer cost."""
    parts = [] if load_s is None else [f"load {load_s:.2f} s"]
    parts.append(
        f"prompt {turn.prompt_tokens} tokens ({turn.cached_tokens} cached) in "
        f"{turn.prefill_s:.2f} s, {turn.prefill_tps:.0f} tok/s"
    )
    parts.append(
        f"answer {len(turn.tokens)} tokens in {turn.decode_s:.2f} s, "
        f"{turn.decode_tps:.1f} tok/s, {turn.finish_reason or 'stopped'}"
    )
    return "ds4: " + "; ".join(parts)
