"""POST /v1/completions: texts or token ids go on as they are, without chat encoding."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ds4py.errors import InputError
from ds4py.server.errors import ApiError
from ds4py.server.openai_choices import ChoicesExchange, SampledBody
from ds4py.server.prompt import PromptWriter, check_stops, options
from ds4py.server.request import Chance, Event, Finished, Request, Scored
from ds4py.server.respond import Answer
from ds4py.text.events import Content

MAX_PROMPTS = 32


class CompletionBody(SampledBody):
    """What is honoured. Null stands for the default."""

    prompt: str | list[str] | list[int] | list[list[int]] = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool = False

    HARMLESS: ClassVar = SampledBody.HARMLESS | {"add_special_tokens"}
    REFUSED: ClassVar = SampledBody.REFUSED | {
        "suffix": "this model was not trained to fill in",
        "response_format": "use chat completions",
        "grammar": "use chat completions with a response_format",
    }


class CompletionExchange(ChoicesExchange):
    """One request and its answers: `n` for each prompt, in order.

    An echo is of what was sent: not of the token that is put before a text. Its tokens are the
    first of the logprobs, null for one that nothing stands before.
    """

    def __init__(self, body: CompletionBody, writer: PromptWriter) -> None:
        """Raises ApiError, Overflow."""
        if not body.max_tokens and not body.echo:
            raise ApiError("is 0; need 1 or more, or echo", param="max_tokens")
        super().__init__(body, writer, "cmpl", "text_completion", "text_completion")
        self._chances_wanted = body.logprobs is not None
        prompts = _prompts(body.prompt, writer)
        stop = check_stops(body.stop, "stop")
        self.requests: list[Request] = [
            Request(
                prompt,
                options(_sampling(body, choice, writer)),
                stop,
                scored=body.logprobs if body.echo else None,
                answered=body.max_tokens > 0,
                parsed=False,
            )
            for prompt, _ in prompts
            for choice in range(body.n)
        ]
        piece, decode = writer.tokenizer.piece, writer.tokenizer.decode
        self._echo = [
            decode(ids[n_added:]) if body.echo else ""
            for ids, n_added in prompts
            for _ in range(body.n)
        ]
        self._first = [
            None if n_added else Chance(piece(ids[0]), None, ())
            for ids, n_added in prompts
            for _ in range(body.n)
        ]
        self._chances: dict[int, list[Chance]] = {}
        scored = body.echo and self._chances_wanted
        self._offsets = [0 if scored else len(text) for text in self._echo]

    def event(self, index: int, event: Event) -> str:
        out = ""
        if isinstance(event, Scored):
            self._chances[index] = self._of_prompt(index, event)
        if isinstance(event, Scored | Content | Finished) and index not in self._begun:
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
            scored = answer.scored
            chances = [] if scored is None else self._of_prompt(index, scored)
            chances += answer.chances
            choices.append(
                {
                    "index": index,
                    "text": self._echo[index] + answer.content,
                    "logprobs": self._logprobs(index, chances),
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

    def _of_prompt(self, index: int, scored: Scored) -> list[Chance]:
        """The tokens of the echo."""
        first = self._first[index]
        return [*([] if first is None else [first]), *scored.chances]

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
            "token_logprobs": [_finite(chance.logprob) for chance in chances],
            "top_logprobs": [
                None
                if chance.logprob is None
                else {t.decode("utf-8", "replace"): _finite(p) for t, p in chance.top}
                for chance in chances
            ],
            "text_offset": offsets,
        }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, -9999.0)


def _prompts(prompt: Any, writer: PromptWriter) -> list[tuple[list[int], int]]:
    """Token ids of each prompt, and how many of them were added: a text gets the token that
    begins every text."""
    many = prompt if isinstance(prompt, list) and not _are_ids(prompt) else [prompt]
    if not 1 <= len(many) <= MAX_PROMPTS:
        raise ApiError(f"has {len(many)} prompts; need 1 to {MAX_PROMPTS}", param="prompt")
    out = []
    for one in many:
        n_added = 0
        if isinstance(one, str):
            try:
                ids, n_added = [writer.tokenizer.bos_id, *writer.tokenizer.encode(one)], 1
            except InputError as error:
                raise ApiError(str(error), param="prompt") from error
        else:
            ids = one
        if not ids or min(ids) < 0 or max(ids) >= writer.vocab_size:
            raise ApiError(f"need token ids below {writer.vocab_size}", param="prompt")
        writer.check_length(ids)
        out.append((ids, n_added))
    return out


def _are_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and all(isinstance(item, int) for item in prompt)


def _sampling(body: CompletionBody, choice: int, writer: PromptWriter) -> dict[str, Any]:
    return {
        **body.sampling(choice, writer.vocab_size),
        "max_tokens": body.max_tokens or 1,
        "top_logprobs": body.logprobs,
    }
