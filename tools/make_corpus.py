"""Text for `ds4 imatrix` of the embedded model: conversations and stories as training had them.

    python tools/make_corpus.py > corpus.txt

Each document begins with the control token that begins a sequence. Seeded, and not the seed of
training: other contents, none of the held-out split.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from random import Random

from ds4py.eval import tasks
from ds4py.text import chat
from ds4py.text.messages import BOS

SEED = 20
DOCUMENTS = 400


def documents(n: int = DOCUMENTS, seed: int = SEED) -> Iterator[str]:
    """`n` documents, a fifth of each kind."""
    rng = Random(seed)
    for i in range(n):
        if i % 5 == 4:
            yield BOS + tasks.plain_story(rng, False)
            continue
        made = (
            tasks.short_chat(rng) if i % 5 == 0
            else tasks.tool_chat(rng) if i % 5 == 1
            else tasks.facts_chat(rng, 12) if i % 5 == 2
            else tasks.recall_chat(rng, 1200, 0.7)
        )
        yield chat.render(made.messages, made.thinking, made.effort, made.drop_thinking)


if __name__ == "__main__":
    sys.stdout.writelines(documents())
