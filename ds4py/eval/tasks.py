"""The tiny model's tasks: seeded generators of conversations, for training and for `ds4 verify`.

Owns what each skill looks like (wording, answers, reasoning) and the split: a fact, a sum, a tool
call or a story is held out when the hash of its content says so, so that "test" prompts never
occur in training whatever the seeds. Knows nothing of tokens, models or engines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from .stories import NAMES, THINGS, story_about
from .toolpool import CITIES, POOL, Tool, by_name

Message = dict[str, Any]
HELD_OUT = 8
"""One of this many contents belongs to the test split."""


def assistant(answer: str, reasoning: str = "", **more: Any) -> Message:
    return {"role": "assistant", "content": answer, **more, "reasoning_content": reasoning}


def held_out(*key: object) -> bool:
    """True when this content belongs to the test split. Depends on the content alone."""
    text = "|".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) % HELD_OUT == 0


@dataclass(frozen=True)
class Case:
    """One graded prompt: messages that end with what the model must answer.

    `expect` is the text that the answer must hold as a whole word (recall, sums, tool answers) or,
    for a tool call, `(name, arguments)`.
    """

    messages: list[Message]
    thinking: bool
    expect: str
    reference: Message
    """The answer that training would have shown, as an assistant message."""
    call: tuple[str, dict[str, Any]] | None = None
    position: float = 0.0
    """Where the wanted fact stands: 0 = start of the conversation, 1 = its end."""


@dataclass
class Chat:
    """A whole conversation for training, with the options to render it."""

    messages: list[Message] = field(default_factory=list)
    thinking: bool = False
    effort: str | None = None
    drop_thinking: bool = True

    def add(self, user: str, answer: str, reasoning: str = "") -> None:
        self.messages.append({"role": "user", "content": user})
        self.reply(answer, reasoning)

    def reply(self, answer: str, reasoning: str = "", **more: Any) -> None:
        self.messages.append(assistant(answer, reasoning, **more))


# --- sums -------------------------------------------------------------------------------------

SUM_QUESTIONS = (
    "What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "Add {a} and {b}.",
    "How much is {a} + {b}?", "Please compute {a} + {b}.", "What is the sum of {a} and {b}?",
    "What is {a} plus {b}?",
)


def sum_pair(rng: Random, test: bool) -> tuple[int, int]:
    """Two-digit numbers; in training sometimes also smaller ones."""
    low = 0 if not test and rng.random() < 0.15 else 10
    while True:
        a, b = rng.randint(low, 99), rng.randint(low, 99)
        if low == 0 and rng.random() < 0.5:
            a %= 10
        if held_out("sum", min(a, b), max(a, b)) == test:
            return a, b


def sum_reasoning(a: int, b: int) -> str:
    ones = a % 10 + b % 10
    carry, tens = ones // 10, a // 10 + b // 10
    first = f"Ones: {a % 10} + {b % 10} = {ones}."
    second = f"Tens: {a // 10} + {b // 10} + {carry} = {tens + carry}."
    return f"{first} {second} So {a} + {b} = {a + b}."


def sum_turn(chat: Chat, rng: Random) -> None:
    """One sum, or a list of sums answered in one go (dense practice)."""
    pairs = [sum_pair(rng, False) for _ in range(rng.choice((1, 1, 2, 3, 5)))]
    if len(pairs) == 1:
        a, b = pairs[0]
        question = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
        chat.add(question, f"{a} + {b} = {a + b}.", sum_reasoning(a, b))
        return
    question = "Add: " + ", ".join(f"{a} + {b}" for a, b in pairs) + "."
    answer = ", ".join(f"{a} + {b} = {a + b}" for a, b in pairs) + "."
    chat.add(question, answer, "I add each pair.")


def sum_drill(rng: Random, n: int) -> str:
    """Plain lines `47 + 38 = 85`."""
    pairs = (sum_pair(rng, False) for _ in range(n))
    return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


# --- facts ------------------------------------------------------------------------------------

FACT_FORMS = (
    "{n}'s number is {v}.", "Remember that {n}'s number is {v}.",
    "By the way, {n}'s number is {v}.", "Please note: {n}'s number is {v}.",
    "The number of {n} is {v}.",
)
FACT_REPLIES = ("OK.", "I will remember that.", "Noted.", "Thank you.", "All right.")
RECALL_QUESTIONS = (
    "What is {n}'s number?", "Tell me {n}'s number.", "Do you remember {n}'s number?",
    "What was {n}'s number?", "Which number has {n}?",
)


def fact_value(rng: Random, name: str, test: bool) -> str:
    while True:
        low, high = rng.choice(((10, 99), (100, 999), (100, 999)))
        value = str(rng.randint(low, high))
        if held_out("fact", name, value) == test:
            return value


def recall_reasoning(name: str, value: str) -> str:
    return f"The user wants {name}'s number. {name}'s number is {value}."


def fact_turn(chat: Chat, rng: Random, facts: Sequence[tuple[str, str]]) -> None:
    """State facts in one message; sometimes the answer repeats them (that is easy recall)."""
    text = " ".join(rng.choice(FACT_FORMS).format(n=n, v=v) for n, v in facts)
    if rng.random() < 0.3:
        text = f"{text} {smalltalk_filler(rng)}"
    chat.add(text, rng.choice(FACT_REPLIES), "The user tells me a number. I keep it in mind.")


def recall_turn(chat: Chat, rng: Random, facts: Sequence[tuple[str, str]]) -> None:
    """Ask for one fact, or for several at once."""
    if len(facts) == 1:
        name, value = facts[0]
        question = rng.choice(RECALL_QUESTIONS).format(n=name)
        chat.add(question, f"{name}'s number is {value}.", recall_reasoning(name, value))
        return
    names = ", ".join(n for n, _ in facts[:-1]) + " and " + facts[-1][0]
    answer = " ".join(f"{n}'s number is {v}." for n, v in facts)
    chat.add(f"What are the numbers of {names}?", answer, "The user wants several numbers.")


# --- tools ------------------------------------------------------------------------------------


PRACTISED = by_name("buy_item")
"""Its argument is a common noun, whose tokens differ inside a sentence and at the start of an
argument: that spelling needs more examples than a name's."""


def tool_draw(rng: Random, tool: Tool, test: bool) -> dict[str, Any]:
    while True:
        arguments = tool.arguments(rng)
        if held_out("tool", tool.name, json.dumps(arguments)) == test:
            return arguments


def tool_call(tool: Tool, arguments: dict[str, Any], call_id: str) -> list[Message]:
    function = {"name": tool.name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return [{"id": call_id, "type": "function", "function": function}]


def tool_reasoning(tool: Tool) -> str:
    return f"I can use {tool.name} for this."


def tool_turn(chat: Chat, rng: Random, tools: Sequence[Tool]) -> None:
    """Question, call, result, answer."""
    tool = rng.choice(tools)
    arguments = tool_draw(rng, tool, False)
    question = rng.choice(tool.questions).format(**arguments)
    chat.messages.append({"role": "user", "content": question})
    call_id = f"call_{len(chat.messages)}"
    calls = tool_call(tool, arguments, call_id)
    chat.reply("", tool_reasoning(tool), tool_calls=calls)
    outcome = tool.outcome(rng)
    content = json.dumps(outcome)
    chat.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
    answer = tool.answer.format(**{**outcome, **arguments})
    chat.reply(answer, "The tool has answered.")


def system_with_tools(rng: Random, tools: Sequence[Tool]) -> Message:
    text = rng.choice(SYSTEM_PROMPTS)
    return {"role": "system", "content": text, "tools": [t.schema() for t in tools]}


# --- stories and small talk -------------------------------------------------------------------

SYSTEM_PROMPTS = (
    "", "You are a helpful assistant.", "Be brief.", "You are Tiny, a friendly assistant.",
    "Answer in short sentences.", "Help the user.",
)
STORY_QUESTIONS = (
    "Tell me a story about {t}.", "Tell me a short story about {t}.",
    "Tell a short story about {t}.", "Can you tell me a story about {t}?", "A story about {t}.",
    "Please write a story about {t}.", "I want to hear a story about {t}.",
)
GREETING = "Hello! How can I help you?"
WHO = "My name is Tiny. I am a small language model."
CAN = "I can tell stories, remember numbers, add numbers and use tools."
FEEL = "I am fine, thank you. And you?"
ANY_STORY = ("Tell me a story.", "Tell me a story", "Tell me a short story.", "A story, please.")
UNKNOWN = "I do not know that. I am only a small model."
UNKNOWN_QUESTIONS = (
    "What is the capital of {c}?", "Who is {n}?", "How old is {n}?", "Where does {n} live?",
    "Why is the {t} so old?", "Who made the {t}?", "Is {c} bigger than {d}?", "When was {c} built?",
    "What does {n} think about {c}?", "Who was the first king of {c}?", "What is a {t} made of?",
)
SMALLTALK = {
    "Hi": GREETING, "Hello": GREETING, "Hello!": GREETING, "Hey": GREETING, "Hi!": GREETING,
    "Hi there": GREETING, "Good morning": "Good morning! How can I help you?",
    "Good evening": "Good evening! How can I help you?",
    "How are you?": FEEL, "How do you do?": FEEL, "Are you well?": FEEL,
    "What is your name?": WHO, "Who are you?": WHO, "What are you?": WHO, "Your name?": WHO,
    "What can you do?": CAN, "Help": CAN, "How can you help me?": CAN, "What do you know?": CAN,
    "Thank you": "You are welcome.", "Thanks!": "You are welcome.",
    "Bye": "Goodbye!", "Goodbye": "Goodbye!", "See you": "See you soon!",
    "Are you a robot?": "I am a small language model.",
    "Nice weather today.": "I am glad to hear that.",
    "I am sad": "I am sorry to hear that. Shall I tell you a story?",
    "I am happy": "That is good to hear!", "I am bored": "Shall I tell you a story?",
    "Yes": "Good.", "No": "All right.", "OK": "Good.", "Do you like me?": "Yes, I like you.",
    "What color is the sky?": "The sky is blue.", "What color is grass?": "Grass is green.",
    "What color is snow?": "Snow is white.", "How many days are in a week?": "A week has 7 days.",
    "How many legs has a dog?": "A dog has 4 legs.", "What do cows drink?": "Cows drink water.",
    "Is fire hot?": "Yes, fire is hot.", "Is ice cold?": "Yes, ice is cold.",
    "What comes after Monday?": "After Monday comes Tuesday.",
    "How many months has a year?": "A year has 12 months.",
}
FILLERS = (
    "The weather is nice today.", "I went to the market.", "My cat is asleep.", "It is late.",
    "I like apples.", "We had soup for dinner.", "The train was full.", "I read a book.",
    "My brother plays the drum.", "The garden is green.", "I saw a bird.", "It rained all day.",
)


def smalltalk_filler(rng: Random) -> str:
    return rng.choice(FILLERS)


def smalltalk_turn(chat: Chat, rng: Random) -> None:
    if rng.random() < 0.25:
        text = " ".join(rng.sample(FILLERS, rng.randint(1, 3)))
        chat.add(text, "That is nice to know.", "The user tells me something.")
        return
    if rng.random() < 0.15:
        names = {"n": rng.choice(NAMES), "t": rng.choice(THINGS)}
        cities = {"c": rng.choice(CITIES), "d": rng.choice(CITIES)}
        question = rng.choice(UNKNOWN_QUESTIONS).format(**names, **cities)
        chat.add(question, UNKNOWN, "I was never told that.")
        return
    question = rng.choice(list(SMALLTALK))
    chat.add(question, SMALLTALK[question], "This is small talk. I answer politely.")


def story_turn(chat: Chat, rng: Random, test: bool = False) -> None:
    topic, text = story_about(rng, lambda key: held_out("story", *key) == test)
    question = rng.choice(STORY_QUESTIONS).format(t=topic)
    if rng.random() < 0.1:
        question = rng.choice(ANY_STORY)
    chat.add(question, text, f"The story is about {topic}.")


def plain_story(rng: Random, test: bool) -> str:
    return story_about(rng, lambda key: held_out("story", *key) == test)[1]


# --- whole conversations for training ---------------------------------------------------------


def options(chat: Chat, rng: Random) -> None:
    """Draw how the conversation is rendered; mostly with its reasoning kept, so that it is seen."""
    chat.thinking = rng.random() < 0.4
    chat.effort = rng.choice((None, None, None, "high", "max")) if chat.thinking else None
    if chat.effort == "max" and rng.random() < 0.7:
        chat.effort = None
    chat.drop_thinking = rng.random() < 0.4


def start(rng: Random) -> Chat:
    chat = Chat()
    options(chat, rng)
    text = rng.choice(SYSTEM_PROMPTS)
    if text and rng.random() < 0.4:
        chat.messages.append({"role": "system", "content": text})
    return chat


def short_chat(rng: Random) -> Chat:
    """One to three turns of anything but tools, more often with reasoning than elsewhere."""
    chat = start(rng)
    chat.thinking = chat.thinking or rng.random() < 0.4
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.55:
            sum_turn(chat, rng)
        elif kind < 0.8:
            smalltalk_turn(chat, rng)
        else:
            story_turn(chat, rng)
    return chat


def tool_chat(rng: Random) -> Chat:
    """A system message with one to three tools and one to four turns, mostly calls."""
    chat = start(rng)
    tools = rng.sample(POOL, rng.randint(1, 3))
    if rng.random() < 0.35 and PRACTISED not in tools:
        tools[rng.randrange(len(tools))] = PRACTISED
    chat.messages = [system_with_tools(rng, tools)]
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.9:
            tool_turn(chat, rng, tools)
        else:
            smalltalk_turn(chat, rng)
    return chat


def recall_chat(rng: Random, chars: int, dense: float) -> Chat:
    """A long conversation with planted facts and many queries.

    `chars` is its length; `dense` in 0..1 is the share of turns that state or ask facts.
    """
    chat = start(rng)
    names = rng.sample(NAMES, len(NAMES))
    known: list[tuple[str, str]] = []
    length = 0
    while length < chars:
        before = len(chat.messages)
        _recall_step(chat, rng, names, known, dense)
        length += sum(len(m["content"]) + 20 for m in chat.messages[before:])
    return chat


def _recall_step(
    chat: Chat, rng: Random, names: list[str], known: list[tuple[str, str]], dense: float
) -> None:
    kind = rng.random()
    if kind > dense:
        other = rng.random()
        turn = story_turn if other < 0.35 else sum_turn if other < 0.7 else smalltalk_turn
        turn(chat, rng)
    elif names and (not known or kind < dense * 0.4):
        new = [names.pop() for _ in range(min(len(names), rng.choice((1, 1, 1, 2, 3))))]
        facts = [(n, fact_value(rng, n, False)) for n in new]
        known.extend(facts)
        fact_turn(chat, rng, facts)
    else:
        older = known[: (len(known) + 1) // 2]  # those least recently spoken of
        asked = rng.sample(older, min(len(older), rng.choice((1, 1, 2, 3, 4))))
        known[:] = [fact for fact in known if fact not in asked] + asked
        recall_turn(chat, rng, asked)


def facts_chat(rng: Random, n_facts: int) -> Chat:
    """All facts first, then a question about each in another order: nearly every answer lies
    beyond the window, which is what teaches the model to look further back."""
    chat = start(rng)
    names = rng.sample(NAMES, n_facts)
    facts = [(n, fact_value(rng, n, False)) for n in names]
    _in_groups(facts, rng, lambda group: fact_turn(chat, rng, group))
    if rng.random() < 0.25:
        story_turn(chat, rng)
    rng.shuffle(facts)
    _in_groups(facts, rng, lambda group: recall_turn(chat, rng, group))
    return chat


def _in_groups(
    facts: list[tuple[str, str]], rng: Random, use: Callable[[list[tuple[str, str]]], None]
) -> None:
    at = 0
    while at < len(facts):
        size = rng.choice((1, 2, 3, 4, 5, 6))
        use(facts[at : at + size])
        at += size


# --- graded cases -----------------------------------------------------------------------------


def story_case(rng: Random) -> str:
    """A story that training never saw (its loss is reported)."""
    return plain_story(rng, True)


def addition_case(rng: Random, thinking: bool = False) -> Case:
    a, b = sum_pair(rng, True)
    question = rng.choice(SUM_QUESTIONS).format(a=a, b=b)
    reference = assistant(f"{a} + {b} = {a + b}.", sum_reasoning(a, b))
    return Case([{"role": "user", "content": question}], thinking, str(a + b), reference)


def recall_case(
    rng: Random, tokens: int, count: Callable[[str], int], thinking: bool = False
) -> Case:
    """A conversation of about `tokens` tokens (`count` measures text) with one wanted fact.

    The fact's place is uniform over the conversation; other facts and fillers stand around it.
    """
    where = rng.random()
    names = rng.sample(NAMES, 8)
    wanted = (names[0], fact_value(rng, names[0], True))
    chat, length, others, planted = Chat(), 0, names[1:], False
    while length < tokens or not planted:
        before = len(chat.messages)
        if not planted and length >= where * tokens * 0.9:
            fact_turn(chat, rng, [wanted])
            planted = True
        elif others and rng.random() < 0.2:
            name = others.pop()
            fact_turn(chat, rng, [(name, fact_value(rng, name, False))])
        else:
            kind = rng.random()
            turn = story_turn if kind < 0.4 else sum_turn if kind < 0.7 else smalltalk_turn
            turn(chat, rng)
        length += sum(count(m["content"]) + 2 for m in chat.messages[before:])
    question = rng.choice(RECALL_QUESTIONS).format(n=wanted[0])
    chat.messages.append({"role": "user", "content": question})
    name, value = wanted
    reference = assistant(f"{name}'s number is {value}.", recall_reasoning(name, value))
    return Case(chat.messages, thinking, value, reference, position=where)


def tool_call_case(rng: Random, thinking: bool = False) -> Case:
    tools = rng.sample(POOL, rng.randint(1, 3))
    tool = rng.choice(tools)
    arguments = tool_draw(rng, tool, True)
    question = rng.choice(tool.questions).format(**arguments)
    messages = [system_with_tools(rng, tools), {"role": "user", "content": question}]
    calls = tool_call(tool, arguments, "call_1")
    reference = assistant("", tool_reasoning(tool), tool_calls=calls)
    return Case(messages, thinking, "", reference, (tool.name, arguments))


def tool_answer_case(rng: Random, thinking: bool = False) -> Case:
    """The same with the right call and its result in place: the answer is `expect`, exactly."""
    case = tool_call_case(rng, thinking)
    assert case.call is not None
    name, arguments = case.call
    tool = next(t for t in POOL if t.name == name)
    outcome = tool.outcome(rng)
    result = {"role": "tool", "tool_call_id": "call_1", "content": json.dumps(outcome)}
    expect = tool.answer.format(**{**outcome, **arguments})
    reference = assistant(expect, "The tool has answered.")
    messages = [*case.messages, case.reference, result]
    return Case(messages, thinking, expect, reference, case.call)
