"""What chat completions and completions share: how tokens are chosen, and answers as choices."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ds4py.server import openai_parts as parts
from ds4py.server.body import ModelBody
from ds4py.server.errors import ApiError
from ds4py.server.prompt import PromptWriter
from ds4py.server.request import Finished, Request
from ds4py.server.respond import frame


class SampledBody(ModelBody):
    """Fields of both. Null stands for the default."""

    stream: bool = False
    stream_options: parts.StreamOptions = parts.StreamOptions()
    n: Annotated[int, Field(ge=1, le=parts.MAX_CHOICES)] = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool = False

    HARMLESS: ClassVar = frozenset(
        "user metadata store service_tier prompt_cache_key cache_prompt id_slot request_id "
        "skip_special_tokens return_token_ids priority".split()
    )
    REFUSED: ClassVar = {
        "best_of": "send n and choose",
        "use_beam_search": "tokens are sampled; send temperature 0 for the likeliest",
        "min_tokens": "send ignore_eos with max_tokens for answers of a fixed length",
        "stop_token_ids": "send stop",
    }

    def sampling(self, choice: int, vocab_size: int) -> dict[str, Any]:
        """How tokens of one of the `n` answers are chosen, but for limit and logprobs.

        Raises ApiError.
        """
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "seed": parts.seed_of(self.seed, choice),
            "logit_bias": parts.bias_of(self.logit_bias, vocab_size),
            "stop_at_eos": not self.ignore_eos,
        }


class ChoicesExchange:
    """One request and its answers, each a choice. Half of an Exchange: the protocols add theirs."""

    FINISH_REASONS: ClassVar = {
        "stop": "stop",
        "stop_string": "stop",
        "length": "length",
        "tool_calls": "tool_calls",
    }
    requests: list[Request]

    def __init__(
        self, body: SampledBody, writer: PromptWriter, prefix: str, kind: str, chunk_kind: str
    ) -> None:
        """prefix: of the answer's id; kind, chunk_kind: the names of whole answers and chunks."""
        self.streaming = body.stream
        self._usage_wanted = body.stream_options.include_usage
        self._n = body.n
        self._finished: dict[int, Finished] = {}
        self._begun: set[int] = set()
        self._kinds = kind, chunk_kind
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": body.model or writer.model,
            "system_fingerprint": writer.fingerprint,
        }

    def beat(self) -> str:
        """A comment, which clients skip."""
        return ": still here\n\n"

    def end(self) -> str:
        """Usage, where it was asked for, and the word that ends a stream."""
        return f"{self._chunk_of([]) if self._usage_wanted else ''}data: [DONE]\n\n"

    def fail(self, error: ApiError) -> str:
        """The error, and the end."""
        return frame(self.error(error)) + "data: [DONE]\n\n"

    def error(self, error: ApiError) -> dict[str, Any]:
        """The body that holds an error."""
        return error.openai()

    def _chunk_of(self, choices: list[dict[str, Any]]) -> str:
        """A frame; the one without choices carries the usage."""
        used = {"usage": None} if choices and self._usage_wanted else {}
        used = used if choices else self._used()
        return frame({**self._head, "object": self._kinds[1], "choices": choices, **used})

    def _whole_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self._kinds[0], "choices": choices, **self._used()}

    def _used(self) -> dict[str, Any]:
        """Usage of all answers, and the timings where there is one."""
        finished = [self._finished[index] for index in sorted(self._finished)]
        used: dict[str, Any] = {"usage": parts.usage([one.usage for one in finished], self._n)}
        return {**used, "timings": parts.timings(finished[0])} if len(finished) == 1 else used
