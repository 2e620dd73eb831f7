"""The pool of tools that the tool-call task draws from: schemas, questions, results, answers.

Each tool is a `Tool`: an OpenAI-style schema, question patterns over its arguments, and a
result/answer pair. Argument values come from closed lists or number ranges, so that combinations
can be held out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from .stories import NAMES, THINGS

CITIES = (
    "Paris Rome Oslo Berlin Madrid Vienna Prague Athens London Dublin Lisbon Warsaw Helsinki "
    "Tokyo Delhi Cairo Lima Quito Boston Chicago Denver Toronto Sydney Nairobi Seoul Hanoi "
    "Geneva Zurich Milan Naples Porto Bergen Malmo Krakow Lyon Nice Bonn Bremen Dresden Graz"
).split()
LANGUAGES = "French German Spanish Italian Greek Polish Dutch Danish".split()
CURRENCIES = "euros dollars pounds francs yen crowns".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
ROOMS = "kitchen bedroom bathroom office hall garage cellar attic".split()
DISHES = "soup pizza salad pancakes stew pie bread curry noodles omelette".split()
WORDS = "house tree water friend bread river school window flower mountain".split()
SKIES = "sunny cloudy rainy windy foggy snowy stormy clear".split()

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Tool:
    """One tool. `params` maps a parameter's name to (JSON type, description, sampler)."""

    name: str
    description: str
    params: Mapping[str, tuple[str, str, Callable[[Random], Any]]]
    questions: tuple[str, ...]
    result: Mapping[str, Callable[[Random], Any]]
    answer: str

    def schema(self) -> dict[str, Any]:
        props = {k: {"type": t, "description": d} for k, (t, d, _) in self.params.items()}
        parameters = {"type": "object", "properties": props, "required": list(self.params)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}

    def arguments(self, rng: Random) -> dict[str, Any]:
        return {k: sample(rng) for k, (_, _, sample) in self.params.items()}

    def outcome(self, rng: Random) -> dict[str, Any]:
        return {k: sample(rng) for k, sample in self.result.items()}


def _of(values: tuple[str, ...] | list[str]) -> Callable[[Random], str]:
    return lambda rng: rng.choice(values)


def _int(low: int, high: int) -> Callable[[Random], int]:
    return lambda rng: rng.randint(low, high)


def _clock(rng: Random) -> str:
    return f"{rng.randint(6, 22)}:{rng.choice(('00', '15', '30', '45'))}"


_CITY = ("string", "The city.", _of(CITIES))
_NAME = ("string", "The person.", _of(NAMES))

POOL: tuple[Tool, ...] = (
    Tool(
        "get_weather", "Get the weather in a city.", {"city": _CITY},
        ("What is the weather in {city}?", "How is the weather in {city} today?",
         "Tell me the weather in {city}."),
        {"temperature": _int(-9, 35), "sky": _of(SKIES)},
        "It is {temperature} degrees and {sky} in {city}.",
    ),
    Tool(
        "get_time", "Get the local time in a city.", {"city": _CITY},
        ("What time is it in {city}?", "Tell me the time in {city}."),
        {"time": _clock}, "It is {time} in {city}.",
    ),
    Tool(
        "get_population", "Get the population of a city.", {"city": _CITY},
        ("How many people live in {city}?", "What is the population of {city}?"),
        {"population": _int(100, 999)}, "{population} thousand people live in {city}.",
    ),
    Tool(
        "get_distance", "Get the distance between two cities.",
        {"start": ("string", "Where the way begins.", _of(CITIES)),
         "end": ("string", "Where the way ends.", _of(CITIES))},
        ("How far is it from {start} to {end}?",
         "What is the distance between {start} and {end}?"),
        {"km": _int(20, 999)}, "It is {km} kilometers from {start} to {end}.",
    ),
    Tool(
        "find_phone", "Find the phone number of a person.", {"name": _NAME},
        ("What is the phone number of {name}?", "How can I call {name}?"),
        {"phone": _int(100, 999)}, "The phone number of {name} is {phone}.",
    ),
    Tool(
        "send_message", "Send a message to a person.",
        {"to": _NAME, "text": ("string", "What to say.", lambda rng: _note(rng))},
        ('Send {to} the message "{text}".', 'Write to {to}: "{text}".'),
        {"status": _of(("sent", "queued"))}, "The message to {to} was {status}.",
    ),
    Tool(
        "set_alarm", "Set an alarm.", {"time": ("string", "When it rings.", _clock)},
        ("Wake me up at {time}.", "Set an alarm for {time}."),
        {"alarm": _int(10, 99)}, "Alarm {alarm} is set for {time}.",
    ),
    Tool(
        "convert_money", "Convert an amount of money.",
        {"amount": ("integer", "How much.", _int(10, 999)),
         "to": ("string", "The currency.", _of(CURRENCIES))},
        ("How much are {amount} coins in {to}?", "Convert {amount} coins to {to}."),
        {"value": _int(10, 999)}, "{amount} coins are {value} {to}.",
    ),
    Tool(
        "set_temperature", "Set the temperature of a room.",
        {"room": ("string", "The room.", _of(ROOMS)),
         "degrees": ("integer", "How warm.", _int(10, 29))},
        ("Make the {room} {degrees} degrees warm.", "Set the {room} to {degrees} degrees."),
        {"minutes": _int(10, 59)},
        "The {room} will have {degrees} degrees in {minutes} minutes.",
    ),
    Tool(
        "translate", "Translate a word.",
        {"word": ("string", "The word.", _of(WORDS)),
         "language": ("string", "The language.", _of(LANGUAGES))},
        ('What is "{word}" in {language}?', 'Translate "{word}" to {language}.'),
        {"confidence": _int(50, 99)},
        'I translated "{word}" to {language} with {confidence} percent confidence.',
    ),
    Tool(
        "find_recipe", "Find a recipe.",
        {"dish": ("string", "The dish.", _of(DISHES)),
         "people": ("integer", "For how many.", _int(2, 12))},
        ("How do I cook {dish} for {people} people?",
         "Find a recipe for {dish} for {people} people."),
        {"page": _int(10, 999)}, "The recipe for {dish} is on page {page}.",
    ),
    Tool(
        "book_table", "Book a table in a restaurant.",
        {"people": ("integer", "How many guests.", _int(2, 12)),
         "day": ("string", "The day.", _of(DAYS)), "time": ("string", "The time.", _clock)},
        ("Book a table for {people} on {day} at {time}.",
         "I need a table for {people} people, {day}, {time}."),
        {"table": _int(10, 99)}, "Table {table} is booked for {day} at {time}.",
    ),
    Tool(
        "get_price", "Get the price of a thing.",
        {"item": ("string", "The thing.", _of(THINGS))},
        ("How much does a {item} cost?", "What is the price of a {item}?"),
        {"price": _int(10, 999)}, "A {item} costs {price} coins.",
    ),
    Tool(
        "buy_item", "Buy things.",
        {"item": ("string", "The thing.", _of(THINGS)),
         "count": ("integer", "How many.", _int(2, 99))},
        ("Buy {count} pieces of {item}.", "Order the {item} {count} times."),
        {"order": _int(100, 999)}, "Order {order} holds {count} pieces of {item}.",
    ),
    Tool(
        "add_event", "Add an event to the calendar.",
        {"title": ("string", "What happens.", lambda rng: f"dinner with {rng.choice(NAMES)}"),
         "day": ("string", "The day.", _of(DAYS))},
        ("Plan {title} on {day}.", "Add {title} to my calendar on {day}."),
        {"event": _int(100, 999)}, "I added {title} on {day} as event {event}.",
    ),
    Tool(
        "roll_dice", "Roll dice.",
        {"count": ("integer", "How many dice.", _int(2, 9)),
         "sides": ("integer", "How many sides.", _int(4, 30))},
        ("Roll {count} dice with {sides} sides.", "Throw {count} dice, {sides} sides each."),
        {"total": _int(10, 99)}, "The dice show {total} in all.",
    ),
    Tool(
        "multiply", "Multiply two numbers.",
        {"a": ("integer", "The first number.", _int(10, 999)),
         "b": ("integer", "The second number.", _int(10, 999))},
        ("What is {a} times {b}?", "Multiply {a} by {b}."),
        {"product": _int(100, 99999)}, "{a} times {b} is {product}.",
    ),
)


def _note(rng: Random) -> str:
    what = rng.choice(("I will be late", "dinner is ready", "see you on {d}", "bring the {t}",
                       "call {n}", "the {t} is here", "happy birthday", "the code is {k}"))
    return what.format(d=rng.choice(DAYS), t=rng.choice(THINGS), n=rng.choice(NAMES),
                       k=rng.randint(100, 999))


def by_name(name: str) -> Tool:
    return next(t for t in POOL if t.name == name)
