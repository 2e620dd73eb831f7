"""POST /v1/completions: texts or token ids go on as they are, without chat encoding."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ds4py.errors import InputError
from ds4py.server.errors import ApiError
from ds4py.server.openai_choices import ChoicesExchange, SampledBody
from ds4py.server.prompt import PromptWriter, check_stops, options
from ds4py.server.request import Chance, Event, Finished, Request
from ds4py.server.respond import Answer
from ds4py.text.events import Content

MAX_PROMPTS = 32


class CompletionBody(SampledBody):
    """What is honoured. Null stands for the default."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: Annotated[int, Field(ge=1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    HARMLESS: ClassVar = SampledBody.HARMLESS | {"add_special_tokens"}
    REFUSED: ClassVar = SampledBody.REFUSED | {
        "suffix": "this model was not trained to fill in",
        "response_format": "use chat completions",
        "grammar": "use chat completions with a response_format",
    }


class CompletionExchange(ChoicesExchange):
    """One request and its answers: `n` for each prompt, in order."""

    def __init__(self, body: CompletionBody, writer: PromptWriter) -> None:
        """Raises ApiError, Overflow."""
        if body.echo and body.logprobs is not None:
            raise ApiError("is not supported together with logprobs", param="echo")
        super().__init__(body, writer, "cmpl", "text_completion", "text_completion")
        prompts = _prompts(body.prompt, writer)
        stop = check_stops(body.stop, "stop")
        self.requests: list[Request] = [
            Request(prompt, options(_sampling(body, choice, writer)), stop, parsed=False)
            for prompt in prompts
            for choice in range(body.n)
        ]
        texts = [writer.tokenizer.decode(prompt[1:]) if body.echo else "" for prompt in prompts]
        self._echo = [text for text in texts for _ in range(body.n)]
        self._chances: dict[int, list[Chance]] = {}
        self._offsets = [len(text) for text in self._echo]
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
            out += self._chunk(index, "", self.FINISH_REASONS[event.reason])
        return out

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
                    "finish_reason": self.FINISH_REASONS[answer.finished.reason],
                }
            )
        return self._whole_of(choices)

    def _chunk(self, index: int, text: str, reason: str | None = None) -> str:
        choice = {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(index, self._chances.pop(index, [])),
            "finish_reason": reason,
        }
        return self._chunk_of([choice])

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
        **body.sampling(choice, writer.vocab_size),
        "max_tokens": body.max_tokens,
        "top_logprobs": body.logprobs,
    }
