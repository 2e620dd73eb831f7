"""POST /v1/completions: texts or token ids go on as they are, without chat encoding."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ds4py.errors import InputError
from ds4py.server import openai_parts as parts
from ds4py.server.body import Body
from ds4py.server.errors import ApiError
from ds4py.server.prompt import PromptWriter, check_stops, options
from ds4py.server.request import Chance, Event, Finished, Request
from ds4py.server.respond import Answer, frame
from ds4py.text.events import Content

MAX_PROMPTS = 32
FINISH_REASONS = {"stop": "stop", "stop_string": "stop", "length": "length"}


class CompletionBody(Body):
    """What is honoured. Null stands for the default."""

    model: str = ""
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    stream: bool = False
    stream_options: parts.StreamOptions = parts.StreamOptions()
    max_tokens: Annotated[int, Field(ge=1)] = 16
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
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool = False
    echo: bool = False

    HARMLESS: ClassVar = frozenset(
        "user metadata store service_tier prompt_cache_key cache_prompt id_slot request_id "
        "skip_special_tokens add_special_tokens return_token_ids priority".split()
    )
    REFUSED: ClassVar = {
        "suffix": "this model was not trained to fill in",
        "best_of": "send n and choose",
        "use_beam_search": "tokens are sampled; send temperature 0 for the likeliest",
        "min_tokens": "send ignore_eos with max_tokens for answers of a fixed length",
        "stop_token_ids": "send stop",
        "response_format": "use chat completions",
        "grammar": "use chat completions with a response_format",
    }


class CompletionExchange:
    """One request and its answers: `n` for each prompt, in order."""

    def __init__(self, body: CompletionBody, writer: PromptWriter) -> None:
        """Raises ApiError, Overflow."""
        if body.echo and body.logprobs is not None:
            raise ApiError("is not supported together with logprobs", param="echo")
        self.streaming = body.stream
        self._usage_wanted = body.stream_options.include_usage
        self._n = body.n
        self._tokenizer = writer.tokenizer
        prompts = _prompts(body.prompt, writer)
        stop = check_stops(body.stop, "stop")
        self.requests: list[Request] = [
            Request(prompt, options(_sampling(body, choice, writer)), stop, parsed=False)
            for prompt in prompts
            for choice in range(body.n)
        ]
        texts = [writer.tokenizer.decode(prompt[1:]) if body.echo else "" for prompt in prompts]
        self._echo = [text for text in texts for _ in range(body.n)]
        self._finished: dict[int, Finished] = {}
        self._chances: dict[int, list[Chance]] = {}
        self._offsets = [len(text) for text in self._echo]
        self._begun: set[int] = set()
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or writer.model,
            "system_fingerprint": writer.fingerprint,
        }
        self._chances_wanted = body.logprobs is not None

    def event(self, index: int, event: Event) -> str:
        out = ""
        if isinstance(event, Content | Finished) and index not in self._begun:
            self._begun.add(index)
            if self._echo[index]:
                out = self._chunk(index, self._echo[index])
        if isinstance(event, Chance):
            self._chances.setdefault(index, []).append(event)
        elif isinstance(event, Content):
            out += self._chunk(index, event.text)
        elif isinstance(event, Finished):
            self._finished[index] = event
            out += self._chunk(index, "", FINISH_REASONS[event.reason])
        return out

    def beat(self) -> str:
        return ": still here\n\n"

    def end(self) -> str:
        out = ""
        if self._usage_wanted:
            out = frame({**self._head, "choices": [], "usage": self._usage(), **self._timings()})
        return f"{out}data: [DONE]\n\n"

    def fail(self, error: ApiError) -> str:
        return frame(self.error(error)) + "data: [DONE]\n\n"

    def error(self, error: ApiError) -> dict[str, Any]:
        return error.openai()

    def whole(self, answers: list[Answer]) -> dict[str, Any]:
        choices = []
        for index, answer in enumerate(answers):
            assert answer.finished is not None
            self._finished[index] = answer.finished
            choices.append(
                {
                    "index": index,
                    "text": self._echo[index] + answer.content,
                    "logprobs": self._logprobs(index, answer.chances),
                    "finish_reason": FINISH_REASONS[answer.finished.reason],
                }
            )
        return {**self._head, "choices": choices, "usage": self._usage(), **self._timings()}

    def _usage(self) -> dict[str, Any]:
        usages = [self._finished[index].usage for index in sorted(self._finished)]
        return parts.usage(usages, self._n)

    def _timings(self) -> dict[str, Any]:
        if len(self._finished) != 1:
            return {}
        return {"timings": parts.timings(self._finished[0])}

    def _chunk(self, index: int, text: str, reason: str | None = None) -> str:
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, self._chances.pop(index, [])),
            "finish_reason": reason,
        }
        used = {"usage": None} if self._usage_wanted else {}
        return frame({**self._head, "choices": [choice], **used})

    def _logprobs(self, index: int, chances: list[Chance]) -> dict[str, Any] | None:
        """The old shape: four lists."""
        if not self._chances_wanted:
            return None
        tokens = [chance.token.decode("utf-8", "replace") for chance in chances]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [max(chance.logprob, -9999.0) for chance in chances],
            "top_logprobs": [
                {t.decode("utf-8", "replace"): max(p, -9999.0) for t, p in chance.top}
                for chance in chances
            ],
            "text_offset": offsets,
        }


def _prompts(prompt: Any, writer: PromptWriter) -> list[list[int]]:
    """Token ids of each prompt; a text gets the token that begins every text."""
    many = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
    if not 1 <= len(many) <= MAX_PROMPTS:
        raise ApiError(f"has {len(many)} prompts; need 1 to {MAX_PROMPTS}", param="prompt")
    out = []
    for one in many:
        if isinstance(one, str):
            try:
                ids = [writer.tokenizer.bos_id, *writer.tokenizer.encode(one)]
            except InputError as error:
                raise ApiError(str(error), param="prompt") from error
        else:
            ids = one
        if not ids or min(ids) < 0 or max(ids) >= writer.vocab_size:
            raise ApiError(f"need token ids below {writer.vocab_size}", param="prompt")
        writer.check_length(ids)
        out.append(ids)
    return out


def _are_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and all(isinstance(item, int) for item in prompt)


def _sampling(body: CompletionBody, choice: int, writer: PromptWriter) -> dict[str, Any]:
    return {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "seed": parts.seed_of(body.seed, choice),
        "logit_bias": parts.bias_of(body.logit_bias, writer.vocab_size),
        "top_logprobs": body.logprobs,
        "stop_at_eos": not body.ignore_eos,
    }
