"""The worker with the real engine: shared steps, slices between them, prefixes that stay."""

import asyncio
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from ds4py import Engine, SamplingOptions
from ds4py.engine.scheduler import Scheduler
from ds4py.server.request import Failed, Finished, Reading, Request
from ds4py.server.respond import Bridge
from ds4py.server.worker import SLICE, Job, Worker
from ds4py.text import chat
from ds4py.text.events import Content


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("tiny")


@pytest.fixture
def worker(engine: Engine) -> Iterator[Worker]:
    made = Worker(lambda progress: (engine, Scheduler(engine, 10**9)), slots=8, queue_length=8)
    made.start()
    made.opened.wait()
    yield made
    made.stop(60)


class Asked(Job):
    """A job that collects its own events."""

    def __init__(
        self, engine: Engine, text: str, max_tokens: int, ends: bool = True, **more: Any
    ) -> None:
        assert engine.tokenizer is not None
        messages = [{"role": "user", "content": text}]
        prompt = engine.tokenizer.encode(chat.segments(messages, thinking=False))
        sampling = SamplingOptions(max_tokens=max_tokens, temperature=0, stop_at_eos=ends)
        super().__init__(Request(prompt, sampling), self.take, **more)
        self.events: list[Any] = []
        self.over = threading.Event()

    def take(self, events: list[Any]) -> None:
        self.events += events
        if any(isinstance(event, Finished | Failed) for event in events):
            self.over.set()

    @property
    def text(self) -> str:
        assert self.over.wait(120)
        return "".join(event.text for event in self.events if isinstance(event, Content))


QUESTIONS = ["Tell me a story about a fox.", "What is 17 + 25?", "Tell me a story about a boat."]


def test_answers_written_together_are_those_written_alone(worker: Worker, engine: Engine) -> None:
    """Also with a long prompt that is read in slices between their tokens."""
    alone = []
    for question in QUESTIONS:
        job = Asked(engine, question, 40)
        worker.submit([job])
        alone.append(job.text)
    together = [Asked(engine, question, 40) for question in QUESTIONS]
    late = Asked(engine, "A long prompt. " * 120, 3)
    worker.submit([*together, late])
    assert [job.text for job in together] == alone
    assert late.over.wait(120)
    assert len([event for event in late.events if isinstance(event, Reading)]) > 1


@pytest.mark.long
def test_between_two_slices_of_a_prompt_answers_go_on(worker: Worker, engine: Engine) -> None:
    order: list[str] = []

    class Noted(Asked):
        def take(self, events: list[Any]) -> None:
            order.append("read" if isinstance(events[0], Reading) else "write")
            super().take(events)

    first = Noted(engine, QUESTIONS[0], 400, ends=False)
    worker.submit([first])
    while "write" not in order:
        first.over.wait(0.001)
    late = Noted(engine, "A long prompt. " * 120, 1)
    worker.submit([late])
    assert late.over.wait(120)
    worker.cancel([first])
    slices = [i for i, what in enumerate(order) if what == "read"][1:]
    assert len(slices) >= 5
    gaps = [b - a for a, b in itertools.pairwise(slices)]
    assert min(gaps) >= 2  # something was written between any two


def test_slices_become_short_when_an_answer_begins(worker: Worker, engine: Engine) -> None:
    """Whichever came first: an answer that begins while a prompt is read waits for short ones."""
    answer = Asked(engine, QUESTIONS[1], 4000, ends=False)  # longer than the reading takes

    class First(Asked):
        def take(self, events: list[Any]) -> None:
            if not self.events:
                worker.submit([answer])
            super().take(events)

    reading = First(engine, "A longer prompt that is there first. " * 250, 1)
    worker.submit([reading])
    assert reading.over.wait(120)
    worker.cancel([answer])
    done = [event.done for event in reading.events if isinstance(event, Reading)]
    sizes = [b - a for a, b in itertools.pairwise([0, *done])]
    assert sizes[0] == engine.options.prefill_chunk
    assert sizes[-2] <= SLICE


def test_what_was_read_before_a_client_left_is_not_read_again(
    worker: Worker, engine: Engine
) -> None:
    text = "Something that takes a while to read. " * 150

    class Leaving(Asked):
        def take(self, events: list[Any]) -> None:
            super().take(events)
            worker.cancel([self])

    gone = Leaving(engine, text, 5)
    worker.submit([gone])
    again = Asked(engine, text, 1)
    worker.submit([again])
    assert again.over.wait(120) and not gone.over.is_set()
    (first,) = gone.events
    assert isinstance(first, Reading) and 0 < first.done < first.total
    finished = again.events[-1]
    assert isinstance(finished, Finished) and finished.usage.cached >= first.done


def test_who_does_not_read_is_not_written_to(worker: Worker, engine: Engine) -> None:
    behind = Asked(engine, QUESTIONS[0], 50, backlog=lambda: 10**6)
    other = Asked(engine, QUESTIONS[1], 12)
    worker.submit([behind, other])
    assert other.text == "17 + 25 = 42."
    assert not any(isinstance(event, Content) for event in behind.events)
    worker.cancel([behind])


def test_what_is_posted_fast_comes_whole_and_in_order() -> None:
    """Also the last one, after which nothing wakes the loop any more; and again after a silence."""

    async def run() -> list[int]:
        bridge, over, got = Bridge(), asyncio.Event(), list[Any]()

        def put(events: list[Any]) -> None:
            got.extend(events)
            if got[-1] % 1000 == 999:
                over.set()

        for start in (0, 1000, 2000):
            numbers: Any = range(start, start + 1000)
            await asyncio.to_thread(lambda n=numbers: [bridge.post(put, [i]) for i in n])
            await asyncio.wait_for(over.wait(), 60)
            over.clear()
        return got

    assert asyncio.run(run()) == list(range(3000))
