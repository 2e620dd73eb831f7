"""A session: one timeline of tokens with the model state that belongs to it.

The caller always passes the whole prefix; `sync` decides what can be kept. The token list and the
state agree whenever a method returns or raises, also after an interrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, cast

import mlx.core as mx
import numpy as np

from ds4py.cache import snapshot
from ds4py.cache.snapshot import Image, capture, capture_frontier, frontier_of
from ds4py.cache.state import Frontier
from ds4py.engine.checkpoints import GRID, MOST_BYTES, Checkpoints
from ds4py.engine.options import SamplingOptions
from ds4py.engine.sampling import Constraint, Logprobs, Sampler, logprobs
from ds4py.engine.stopping import StopStrings
from ds4py.errors import InputError, OptionsError, PromptError
from ds4py.text.detokenizer import Detokenizer
from ds4py.text.spelling import common_prefix

if TYPE_CHECKING:
    from ds4py.engine.engine import Engine

HOT = "hot"
"""In a snapshot's extra arrays: [n, 2] layers and experts worked with, the most valuable first."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total)."""
Chunk = int | Callable[[], int]
"""Most tokens of a slice, or what says it before each."""


@dataclass(frozen=True)
class Token:
    """One generated token. The last one of a generation says why it ended."""

    id: int
    text: str
    """Text that became certain with this token; may be empty or span tokens."""
    finish_reason: str | None = None
    """"stop" (end token or stop string), "length" (max_tokens or context), or None."""
    logprobs: Logprobs | None = None
    """Where SamplingOptions.top_logprobs asks for them: before penalties and temperature."""


class Session:
    """Made by `Engine.session()`. Used by one thread."""

    def __init__(self, engine: Engine, checkpoint_bytes: int = MOST_BYTES):
        self._engine = engine
        self._model = engine.model
        self._state = engine.model.new_state()
        self._tokens: list[int] = []
        self._logits: mx.array | None = None  # [1, V] after the last token, unless restored
        self._checkpoints = Checkpoints(checkpoint_bytes)
        self.reused = 0
        """How many tokens the last `sync` found in the state."""
        self.seed: int | None = None
        """Of the last generation: with it and the same options a restored session goes on alike."""
        self.chances: list[Logprobs] = []
        """Of every token of the prompt but the first, where `sync_slices` was asked for them."""

    @property
    def tokens(self) -> list[int]:
        """The ids in the state, a copy."""
        return list(self._tokens)

    @property
    def position(self) -> int:
        """How many tokens the state holds."""
        return len(self._tokens)

    def sync(self, tokens: Sequence[int], progress: Progress | None = None) -> int:
        """Make the state exactly the prefix `tokens`; returns how many were reused.

        Raises PromptError when the prefix is empty, too long or has ids the model lacks; the
        session is then as before.
        """
        for done, total in self.sync_slices(tokens):
            if progress is not None:
                progress("prefill", done, total)
        return self.reused

    def sync_slices(
        self, tokens: Sequence[int], chunk: Chunk | None = None, top_logprobs: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """`sync` in slices of at most `chunk` tokens: yields (done, total) after each.

        Between two slices other sessions may run, and the iterator may be dropped: the session
        then holds what was read. What can be reused is found at the call (`reused`), which raises
        as `sync` does. top_logprobs: nothing is reused, and `chances` tells how likely each token
        was, and that many of the likeliest ones.
        """
        wanted = [int(token) for token in tokens]
        check_tokens(wanted, self._engine.context, self._engine.config.vocab_size)
        self.chances = []
        common = 0 if top_logprobs is not None else common_prefix(self._tokens, wanted)
        self._return_to(common)
        self.reused = self.position
        return self._prefill(wanted, chunk or self._engine.options.prefill_chunk, top_logprobs)

    def reusable(self, tokens: Sequence[int]) -> int:
        """How many tokens `sync(tokens)` would reuse. Changes nothing."""
        common = common_prefix(self._tokens, tokens)
        if common == self.position:
            return common
        found = self._checkpoints.best(common)
        return found.position if found else 0

    def fork(self, position: int) -> Session:
        """A second session with the tokens up to `position`, or up to the best checkpoint before.

        Rows are shared until one of the two writes where the other reads.
        """
        other = Session(self._engine)
        other._checkpoints = self._checkpoints.up_to(position)
        if position >= self.position == self._state.position:
            other._state, other._logits = self._state.fork(self._state.frontier), self._logits
        elif (found := other._checkpoints.best(position)) is not None:
            other._state = self._state.fork(found)
        other._tokens = self._tokens[: other._state.position]
        return other

    def rewind(self, position: int) -> None:
        """Go back to the first `position` tokens, exactly as if the rest had never been."""
        if not 0 <= position <= self.position:
            raise OptionsError(f"position is {position}; need one from 0 to {self.position}")
        if position == 0:
            self._return_to(0)
        else:
            self.sync(self._tokens[:position])

    def logits(self) -> list[float]:
        """Next-token logits, [V]. Raises PromptError on an empty session."""
        return cast(list[float], self._next_logits()[0].tolist())

    def generate(
        self, options: SamplingOptions | None = None, constraint: Constraint | None = None
    ) -> Iterator[Token]:
        """Sample until the model stops, a stop string appears, or a limit is reached.

        Every token handed out is in the state; closing the iterator early keeps what was handed
        out. Raises PromptError on an empty session or a full context.
        """
        options = options or SamplingOptions()
        logits, room = self._next_logits(), self._engine.context - self.position
        if room <= 0:
            raise PromptError(
                f"the context of {self._engine.context} tokens is full; raise --context or shorten "
                "the prompt"
            )
        n_tokens = room if options.max_tokens is None else min(options.max_tokens, room)
        vocab_size, launcher = self._engine.config.vocab_size, self._engine.launcher
        sampler = Sampler(options, self._tokens, vocab_size, constraint, launcher)
        self.seed = sampler.seed
        steps = self._engine.decoder.stream(self._state, logits, sampler, n_tokens)
        try:
            yield from self._tokens_of(steps, options, n_tokens)
        finally:
            steps.close()  # type: ignore[attr-defined]
            self._settle()

    def save(self, path: Path | str) -> None:
        """Write a snapshot that `Engine.restore` continues bit for bit. Raises InputError."""
        image = self.image()
        for turn in self.turns()[-1:]:  # where the next prompt may leave this one
            image.extra[f"turn{turn.position}"] = capture_frontier(self._state, turn)
        snapshot.save(Path(path), image, self._engine.identity)

    def load(self, path: Path | str) -> None:
        """Take over a snapshot's state. Raises InputError; the session is then as before."""
        try:
            self.adopt(snapshot.load(Path(path), self._engine.identity))
        except ValueError as exc:
            raise InputError(f"{path} is damaged ({exc}); save the session again") from exc

    def image(self, frontier: Frontier | None = None, start: int = 0) -> Image:
        """The session, or what it was at a checkpoint, with the rows after `start` tokens."""
        if self._state.position != self.position:  # interrupted inside a step
            self._return_to(self.position - 1)
        if frontier is None or frontier.position == self.position:
            here = self._state.frontier
            hot = np.array(self._engine.experts.hot_set(), np.int32).reshape(-1, 2)
            extra = {HOT: {"experts": hot}} if len(hot) else {}
            return capture(self._state, here, self._tokens, start, seed=self.seed, extra=extra)
        return capture(self._state, frontier, self._tokens, start, seed=self.seed)

    def adopt(self, image: Image) -> None:
        """Become an image whose rows begin at 0. Raises ValueError, PromptError; then as before."""
        tokens, state = [int(t) for t in image.tokens], self._model.new_state()
        check_tokens(tokens, self._engine.context, self._engine.config.vocab_size)
        snapshot.fill(state, image)
        turns = [
            frontier_of(state, int(name.removeprefix("turn")), arrays)
            for name, arrays in image.extra.items()
            if name.startswith("turn")
        ]
        self._state, self._tokens, self.seed, self._logits = state, tokens, image.seed, None
        self._checkpoints.forget_after(0)
        for turn in turns:
            self._checkpoints.add(turn, turn=True)
        self._keep(state.frontier)
        hot = image.extra.get(HOT, {}).get("experts", np.zeros((0, 2)))
        self._engine.experts.warm([(int(layer), int(expert)) for layer, expert in hot])

    def turns(self) -> list[Frontier]:
        """Checkpoints where a turn begins or a reply opens, ascending."""
        return self._checkpoints.turns()

    @property
    def n_bytes(self) -> int:
        """What the state takes in memory."""
        return self._state.n_bytes

    def arrays(self) -> dict[int, int]:
        """Bytes of each array of state and checkpoints by its identity: forks share some."""
        rows = [store.data for store in self._state.rows.values()]
        kept = [self._state.frontier, *self._checkpoints.frontiers()]
        arrays = rows + [array for frontier in kept for array in frontier.arrays]
        return {id(array): int(array.nbytes) for array in arrays}

    def _tokens_of(
        self, steps: Iterator[tuple[int, mx.array]], options: SamplingOptions, n_tokens: int
    ) -> Iterator[Token]:
        """Step results -> tokens with text, recording each in this session."""
        tokenizer, eos = self._engine.tokenizer, self._engine.config.eos_token_id
        detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        stops = StopStrings(options.stop)
        top = options.top_logprobs
        for n, (token, logits) in enumerate(steps, 1):
            chance = None if top is None else logprobs(self._next_logits()[-1], token, top)
            self._record(token, logits)
            ended = token == eos and options.stop_at_eos
            text = "" if ended or detokenizer is None else detokenizer.push(token)
            last = ended or n == n_tokens
            if last and detokenizer is not None:
                text += detokenizer.flush()
            text, stopped = stops.push(text)
            if last and not stopped:
                text += stops.flush()
            if last or stopped:
                yield Token(token, text, "stop" if ended or stopped else "length", chance)
                return
            yield Token(token, text, None, chance)

    def _record(self, token: int, logits: mx.array) -> None:
        self._tokens.append(token)
        self._logits = logits
        self._engine.counters["decode_tokens"] += 1
        if self.position % GRID == 0 and self._state.position == self.position:
            self._keep(self._state.frontier)

    def _keep(self, frontier: Frontier, turn: bool = False) -> None:
        """Take a checkpoint, in memory of its own."""
        kept = self._state.checkpoint(frontier)
        if self._state.ops.lazy:
            mx.async_eval(kept.arrays)  # else its graph keeps the whole frontier
        self._checkpoints.add(kept, turn)

    def _next_logits(self) -> mx.array:
        if not self._tokens:
            raise PromptError("the session is empty; sync a prompt first")
        if self._logits is None:  # restored
            self._logits = self._model.logits(self._state.frontier.streams)
        return self._logits

    def _return_to(self, position: int) -> None:
        """Restore the best checkpoint at or before `position`."""
        if position == self.position == self._state.position:
            return
        found = self._checkpoints.best(position)
        self._logits = None
        self._checkpoints.forget_after(position)
        if found is None:
            self._state.reset()
        else:
            self._state.restore(found)
        del self._tokens[self._state.position :]

    def _settle(self) -> None:
        """After an interrupt between a commit and its record: back to the recorded tokens."""
        if self._state.position != self.position:
            tokens = self.tokens
            self._return_to(len(tokens) - 1)
            for _ in self._prefill(tokens, self._engine.options.prefill_chunk):
                pass

    def _prefill(
        self, tokens: list[int], chunk: Chunk, top_logprobs: int | None = None
    ) -> Iterator[tuple[int, int]]:
        """Step over tokens[position:], in chunks that end on the checkpoint grid.

        Where a turn begins inside a chunk, the checkpoint there costs no step of its own.
        """
        start, state = self.position, self._state
        turns = self._engine.turns(tokens, start)
        if start in turns:
            self._keep(state.frontier, turn=True)
        while self.position < len(tokens):
            here, began = self.position, perf_counter()
            most = chunk if isinstance(chunk, int) else chunk()
            size = self._engine.pacer.chunk(most) if self._engine.pacer else most
            end = min(here - here % size + size, len(tokens))
            n_logits = int(end == len(tokens)) if top_logprobs is None else end - here
            cuts = [*(at - here for at in turns if here < at < end), end - here]
            logits, delta = self._model.step(mx.array(tokens[here:end]), state, n_logits, cuts)
            inside = [state.after(delta, cut) for cut in cuts[:-1]]
            state.commit(delta, end - here)
            mx.eval(logits, *state.pending())  # bounds the graph to one chunk
            if self._engine.pacer:
                self._engine.pacer.took(end - here, perf_counter() - began)
            self._tokens += tokens[here:end]
            self._logits = logits[-1:] if end == len(tokens) else None
            if top_logprobs is not None:
                following = enumerate(tokens[here + 1 : end + 1])
                self.chances += [logprobs(logits[i], t, top_logprobs) for i, t in following]
            for frontier in inside:
                self._keep(frontier, turn=True)
            self._keep(state.frontier, turn=end in turns)
            self._engine.counters["prefill_tokens"] += end - here
            yield end - start, len(tokens) - start


def check_tokens(tokens: list[int], context: int, vocab_size: int) -> None:
    """Raise PromptError unless `tokens` is a prefix a session can hold."""
    if not tokens:
        raise PromptError("the prompt has no tokens; give at least one")
    if len(tokens) > context:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens but the context is {context}; shorten the "
            "prompt or raise --context"
        )
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        bad = next(t for t in tokens if not 0 <= t < vocab_size)
        raise PromptError(f"token id {bad} is outside the model's vocabulary of {vocab_size}")
