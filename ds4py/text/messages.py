"""Messages as the chat encoding sees them: control tokens, checks, merging, ordering, dropping.

Messages are OpenAI-style dicts. This module turns a conversation into the list of turns that is
written out; `chat` writes it. It knows nothing of token ids. The protocol is that of DeepSeek's
encoding_dsv4.py (MIT licence, copyright DeepSeek), whose special cases are kept on purpose: the
model was trained on what that file writes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ds4py.errors import PromptError

Message = Mapping[str, Any]

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"

TASKS = {
    task: f"<｜{task}｜>"
    for task in ("action", "query", "authority", "domain", "title", "read_url")
}
"""Internal classification tasks: the value of a message's `task`, and the token it writes."""

CONTROL_TOKENS = (BOS, EOS, USER, ASSISTANT, REMINDER, THINK, END_THINK, DSML, *TASKS.values())
"""Every control token the encoder can write."""

_SPELLED = re.compile(f"({'|'.join(map(re.escape, CONTROL_TOKENS))})")

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


class Segment(NamedTuple):
    """A stretch of prompt: plain text, exactly one control token, or what a model once wrote."""

    text: str
    control: bool = False
    tokens: tuple[int, ...] = ()
    """The ids of what a model wrote; its text is then empty."""


def spelled(text: str) -> list[Segment]:
    """Rendered text taken apart: what spells a control token is one. For text that is trusted."""
    return [Segment(part, part in CONTROL_TOKENS) for part in _SPELLED.split(text) if part]


def check(messages: Sequence[Message]) -> None:
    """Check the shape of a conversation; what only one role may carry is checked when written.

    Raises PromptError naming the message (counted from 0) that has no known role or task.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError(
            f"messages is a {type(messages).__name__}; need a list of message objects."
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"messages[{index}] is a {type(message).__name__}; need an object with a role."
            )
        role, task = message.get("role"), message.get("task")
        if role not in ROLES:
            raise PromptError(
                f"messages[{index}] has the role {role!r}; need one of {', '.join(ROLES)}."
            )
        if task is not None and (not isinstance(task, str) or task not in TASKS):
            raise PromptError(
                f"messages[{index}] has the task {task!r}; need one of {', '.join(TASKS)}."
            )


def flatten(content: Any) -> Any:
    """OpenAI content parts as one text, the parts joined as the encoder joins blocks.

    The encoder takes text; a front end calls this on the lists its clients send. Anything that is
    not a list is returned unchanged. Raises PromptError for a part that is not text.
    """
    if not isinstance(content, (list, tuple)):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind not in ("text", "input_text", "output_text", "str") or not isinstance(text, str):
            raise PromptError(
                f"the content has a part of type {kind!r}; this model reads text parts only."
            )
        texts.append(text)
    return "\n\n".join(texts)


def merge(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Join tool results and consecutive users into user turns made of `blocks`.

    A result joins any user turn before it; a user joins one that has no task. Of a user only
    content, task and wo_eos survive, of a merged one only content: so do tools on a user message
    get lost, as in DeepSeek's encoder. Results are then put into the order of their calls.
    """
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message["role"]
        before = turns[-1] if turns and turns[-1]["role"] == "user" else None
        content = message.get("content", "")
        if role == "tool":
            block = {"result": content, "id": message.get("tool_call_id", "")}
            if before is None:
                turns.append({"role": "user", "blocks": [block]})
            else:
                before["blocks"].append(block)
        elif role == "user":
            if before is None or before.get("task") is not None:
                kept = {key: message[key] for key in ("task", "wo_eos") if key in message}
                turns.append({"role": "user", "blocks": [{"text": content}], **kept})
            else:
                before["blocks"].append({"text": content})
        else:
            turns.append(dict(message))
    _order_results(turns)
    return turns


def _order_results(turns: list[dict[str, Any]]) -> None:
    """Permute the results of each user turn into the order of the last calls before it.

    Results keep their places among the texts. One with an unknown id counts as the first call's.
    """
    order: dict[Any, int] = {}
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls"):
            order = _call_order(turn["tool_calls"])
        elif turn["role"] == "user" and order:
            blocks = turn["blocks"]
            places = [place for place, block in enumerate(blocks) if "result" in block]
            if len(places) < 2:
                continue
            try:
                results = sorted(
                    (blocks[place] for place in places), key=lambda b: order.get(b["id"], 0)
                )
            except TypeError as exc:
                raise PromptError("a tool_call_id is not text; need the id of a call.") from exc
            for place, block in zip(places, results, strict=True):
                blocks[place] = block


def _call_order(calls: Any) -> dict[Any, int]:
    """Ids of an assistant's calls -> their position; calls without an id are left out."""
    order = {}
    for index, call in enumerate(_calls(calls)):
        function = call.get("function")
        inner = function.get("id", "") if isinstance(function, Mapping) else ""
        call_id = call.get("id") or inner
        if call_id:
            try:
                order[call_id] = index
            except TypeError as exc:
                raise PromptError(f"tool_calls[{index}] has an id that is not text.") from exc
    return order


def _calls(calls: Any) -> Sequence[Message]:
    if not isinstance(calls, (list, tuple)) or not all(isinstance(c, Mapping) for c in calls):
        raise PromptError("tool_calls must be a list of objects, each with a function.")
    return calls


def last_user(turns: Sequence[Message]) -> int:
    """Index of the last user or developer turn, -1 without one."""
    for index in range(len(turns) - 1, -1, -1):
        if turns[index]["role"] in ("user", "developer"):
            return index
    return -1


def drop_old(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns without the developer turns before the last user (their reasoning goes in chat)."""
    last = last_user(turns)
    return [t for i, t in enumerate(turns) if i >= last or t["role"] != "developer"]
