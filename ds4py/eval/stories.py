"""A seeded grammar of short English stories.

Owns the vocabulary (names, animals, places, things, feelings) and the sentence patterns. Knows
nothing of chat messages or of the model. A story is fixed by its cast: `(hero, thing, place)` is
the key that decides whether training may see it (see `tasks.held_out`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

Key = tuple[str, str, str]
"""Hero, thing and place of a story."""

GIRLS = (
    "Anna Mia Lily Emma Sara Clara Nina Ruth Ivy Rosa Tara Zoe Ella Maya Lena Vera Olga Dora "
    "Alice Julia Hanna Laura Paula Irene Grace Molly Susan Wendy Flora Cora Edith Freya Gina "
    "Helen Iris Joan Kate Mary Nora Petra"
).split()
BOYS = (
    "Tom Ben Sam Max Leo Jack Paul Carl Hugo Finn Otto Noah Adam Bob David Erik Felix George "
    "Henry Ivan James Karl Lucas Mark Nils Oscar Peter Ralf Simon Theo Victor Walter Dan Frank "
    "Gus Hans Joel Kurt Luis Mike"
).split()
NAMES = tuple(sorted(GIRLS + BOYS))

ANIMALS = "fox rabbit bear mouse owl cat dog duck frog horse hedgehog squirrel".split()
THINGS = (
    "lantern kite boat drum key map ball bell basket book ladder blanket clock flute hat cake "
    "stone shell feather box"
).split()
PLACES = (
    "forest garden village river hill beach market barn lake meadow school castle bridge cave "
    "mill harbor"
).split()
ADJECTIVES = "small old red blue golden shiny heavy quiet strange wooden broken bright".split()
WEATHER = (
    "The sun was warm and the sky was blue.",
    "It was raining, and the wind was cold.",
    "Snow lay on the ground and everything was white.",
    "A thick fog hung over the trees.",
    "It was a windy day and the clouds moved fast.",
    "The night was dark, but the stars were bright.",
)
LESSONS = (
    "From that day on, they were best friends.",
    "They all laughed and went home together.",
    "It was the best day of the whole year.",
    "And that night everybody slept very well.",
    "They knew that a friend is better than any treasure.",
    "After that, nobody was afraid any more.",
)
ROOTS = ("sad", "afraid", "tired", "angry", "lonely", "hungry", "worried", "bored")
"""Moods."""
REASONS = {
    "sad": ("had lost an old friend", "had no one to play with"),
    "afraid": ("heard a strange noise", "saw a big shadow behind the {place}"),
    "tired": ("had walked the whole day", "had carried the {thing} all the way"),
    "angry": ("could not open the door", "had broken a cup"),
    "lonely": ("had no friends near the {place}", "had been alone all winter"),
    "hungry": ("had not eaten since morning", "had given the bread away"),
    "worried": ("could not find the way home", "had promised to be back by noon"),
    "bored": ("had nothing to do", "had read every book twice"),
}
HELP = {
    "sad": "Do not cry. We will look for it together.",
    "afraid": "Do not be afraid. I will stay with you.",
    "tired": "Sit down and rest. I will carry it for you.",
    "angry": "Take a deep breath. We can fix this.",
    "lonely": "You can come and live with us.",
    "hungry": "Here, you can share my bread and cheese.",
    "worried": "I know the way. Follow me.",
    "bored": "Let us build something new.",
}
HAPPY = ("happy", "glad", "proud", "calm", "brave", "cheerful")


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about."""

    hero: str
    friend: str
    animal: bool
    """The friend is an animal ("a fox"), not a named child."""
    thing: str
    place: str
    adjective: str

    @property
    def key(self) -> Key:
        return self.hero, self.thing, self.place

    def topic(self, rng: Random) -> str:
        """What one would ask for to get this story."""
        choices = [
            f"{self.hero} and the {self.thing}", f"{self.hero} and a {self.thing}", self.hero,
            f"{a(self.adjective)} {self.thing}", f"a {self.thing}", f"a {self.place}",
        ]
        if self.animal:
            friend = a(self.friend)
            choices += [friend, friend, f"{friend} and a {self.thing}", f"{self.hero} and {friend}"]
        else:
            choices += [f"{self.hero} and {self.friend}", f"{self.friend} and {self.hero}"]
        return rng.choice(choices)

    @property
    def she(self) -> str:
        return "she" if self.hero in GIRLS else "he"

    @property
    def her(self) -> str:
        return "her" if self.hero in GIRLS else "his"


def a(noun: str) -> str:
    """The noun (or adjective) with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def cast(rng: Random) -> Cast:
    hero = rng.choice(NAMES)
    animal = rng.random() < 0.5
    friend = rng.choice(ANIMALS) if animal else rng.choice([n for n in NAMES if n != hero])
    return Cast(
        hero, friend, animal, rng.choice(THINGS), rng.choice(PLACES), rng.choice(ADJECTIVES)
    )


def story(c: Cast, rng: Random, n_middle: int = 2) -> str:
    """A story of about `5 + 2 * n_middle` sentences with cause and effect."""
    the_friend = f"the {c.friend}" if c.animal else c.friend
    parts = [_opening(c, rng), rng.choice(WEATHER), _find(c, rng)]
    mood = rng.choice(ROOTS)
    reason = rng.choice(REASONS[mood]).format(thing=c.thing, place=c.place)
    parts.append(f"{c.hero} was {mood} because {c.she} {reason}.")
    meet = (
        f"Then {a(c.friend) if c.animal else c.friend} came along.",
        f"Near the {c.place}, {c.she} met {a(c.friend) if c.animal else c.friend}.",
    )
    parts.append(rng.choice(meet))
    parts.append(f'"Why are you so {mood}?" asked {the_friend}.')
    parts.append(f'"I {reason}," said {c.hero}.')
    parts.append(f'"{HELP[mood]}" said {the_friend}.')
    for pattern in rng.sample(MIDDLES, min(n_middle, len(MIDDLES))):
        parts.append(_fill(pattern, c, the_friend))
    parts.append(_fill(rng.choice(ENDS), c, the_friend).format(happy=rng.choice(HAPPY)))
    parts.append(rng.choice(LESSONS))
    return " ".join(parts)


MIDDLES = (
    "Together they walked to the PLACE and looked behind every tree.",
    "HERO showed FRIEND the THING, and FRIEND liked it very much.",
    "They sat down near the PLACE and ate some apples.",
    "Suddenly the THING fell into the water, but FRIEND pulled it out.",
    "HERO sang a song, and soon the birds sang too.",
    "FRIEND told a story about a king who lived near the PLACE.",
    "They crossed the bridge slowly, because it was very old.",
    "HERO held the THING high, so that everyone could see it.",
    "FRIEND ran ahead and called, \"Come and see!\"",
    "After an hour they found what they were looking for.",
)
ENDS = (
    "In the evening HERO was {happy} again and gave the THING to FRIEND.",
    "HERO thanked FRIEND and felt {happy}.",
    "At last HERO went home with the THING, and SHE was {happy}.",
    "HERO hugged FRIEND, because now SHE was {happy}.",
)


def _fill(pattern: str, c: Cast, the_friend: str) -> str:
    text = pattern.replace("HERO", c.hero).replace("THING", c.thing).replace("PLACE", c.place)
    text = text.replace("SHE", c.she).replace("FRIEND", the_friend)
    return text[0].upper() + text[1:]


def _opening(c: Cast, rng: Random) -> str:
    return rng.choice(
        (
            f"Once upon a time, {c.hero} lived near a {c.place}.",
            f"One day {c.hero} went to the {c.place} with {a(c.adjective)} {c.thing}.",
            f"{c.hero} loved the {c.place} more than any other place.",
            f"Early in the morning, {c.hero} walked to the {c.place}.",
            f"There was once a child called {c.hero} who had {a(c.adjective)} {c.thing}.",
        )
    )


def _find(c: Cast, rng: Random) -> str:
    return rng.choice(
        (
            f"In the grass {c.she} found {a(c.adjective)} {c.thing}.",
            f"{c.hero} carried the {c.thing} in {c.her} bag.",
            f"{c.her.capitalize()} grandmother had given {c.hero} the {c.thing}.",
            f"Under a stone there was {a(c.adjective)} {c.thing}.",
        )
    )


def story_about(rng: Random, accept: Callable[[Key], bool]) -> tuple[str, str]:
    """`(topic, story)`; `accept(key)` says whether this cast may be used."""
    while True:
        c = cast(rng)
        if accept(c.key):
            return c.topic(rng), story(c, rng, rng.randint(1, 4))
