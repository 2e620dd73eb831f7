"""The chat's loop and commands, without a process or a model."""

import io
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ds4py.cli.chat import Chat
from ds4py.cli.conversation import Conversation
from ds4py.cli.store import Store
from ds4py.cli.view import PlainView
from ds4py.errors import DS4Error, InputError, PromptError

Typed = list[str | type[BaseException]]


class Script:
    """A source of messages: texts are typed, exceptions happen."""

    def __init__(self, items: Typed) -> None:
        self._items = iter(items)

    def read(self) -> str:
        item = next(self._items, EOFError)
        if isinstance(item, str):
            return item
        raise item


class Engine:
    """Restores what its sessions saved; makes sessions that answer `again`."""

    name, context = "fake", 10_000

    def __init__(self, scripted: Any) -> None:
        self.scripted = scripted
        self.restored: list[Path] = []

    def session(self) -> Any:
        return self.scripted([["again"]])

    def stats(self) -> dict[str, Any]:
        return {"draft": {}, "experts": {}, "kernels": {}}

    def restore(self, path: Path) -> Any:
        if (text := path.read_text(encoding="utf-8")) != "snapshot":
            raise InputError(text)
        self.restored.append(path)
        return self.scripted([["restored"]])


@dataclass
class Streams:
    """What was written so far."""

    out: io.StringIO = field(default_factory=io.StringIO)
    err: io.StringIO = field(default_factory=io.StringIO)

    @property
    def text(self) -> tuple[str, str]:
        return self.out.getvalue(), self.err.getvalue()


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.fixture
def chat(scripted: Any, tokenizer: Any, sampling: Any, tmp_path: Path, streams: Streams) -> Chat:
    session = scripted([["one"], ["two"], ["three"]])
    talk = Conversation(session, tokenizer, sampling)
    engine: Any = Engine(scripted)
    view = PlainView(streams.out, streams.err)
    return Chat(engine, talk, Store(tmp_path), view, streams.err, interactive=True)


def say(chat: Chat, *items: str | type[BaseException]) -> int:
    return chat.loop(Script(list(items)))


def test_answers_go_to_stdout_and_notices_to_stderr(chat: Chat, streams: Streams) -> None:
    assert say(chat, "hi", "/stats", "", "there") == 0
    out, err = streams.text
    assert out == "one\ntwo\n"
    assert "answer 1 tokens" in err


def test_quit_ends_at_once(chat: Chat) -> None:
    assert say(chat, "/quit", "hi") == 0
    assert chat.conversation.messages == []


def test_help_names_every_command(chat: Chat, streams: Streams) -> None:
    say(chat, "/help")
    err = streams.err.getvalue()
    for word in "help think nothink system read save resume stats reset quit".split():
        assert f"/{word}" in err


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("/nonsense", "there is no command /nonsense"),
        ("/save", "/save needs NAME"),
        ("/reset now", "/reset takes nothing after it"),
        ("/think hard", "/think takes nothing or max"),
        ("/read /absent", "cannot read /absent"),
        ("/resume nobody", "no saved conversation nobody"),
        ("/save ../x", "cannot name a conversation"),
    ],
)
def test_a_mistake_is_one_sentence_and_the_talk_goes_on(
    chat: Chat, streams: Streams, typed: str, told: str
) -> None:
    assert say(chat, typed, "hi") == 0
    out, err = streams.text
    assert out == "one\n"
    assert told in err and len(err.splitlines()) == 1


def test_in_a_pipe_a_mistake_ends_the_command(chat: Chat) -> None:
    chat.interactive = False
    with pytest.raises(DS4Error):
        say(chat, "/nonsense", "hi")
    assert chat.conversation.messages == []


def test_modes_and_system_message(chat: Chat, streams: Streams) -> None:
    talk = chat.conversation
    say(chat, "/think max")
    assert (talk.thinking, talk.effort) == (True, "max")
    say(chat, "/think")
    assert (talk.thinking, talk.effort) == (True, None)
    say(chat, "/nothink", "/system Be brief.", "/system")
    assert (talk.thinking, talk.system) == (False, "Be brief.")
    assert streams.err.getvalue().count("System message: Be brief.") == 2
    say(chat, "hi", "/reset")
    assert talk.messages == [{"role": "system", "content": "Be brief."}]


def test_a_file_is_sent_as_a_message(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("from a file\n", encoding="utf-8")
    say(chat, f"/read {tmp_path / 'note.txt'}")
    assert chat.conversation.messages[0]["content"] == "from a file\n"


def test_save_and_resume(chat: Chat, streams: Streams) -> None:
    say(chat, "/think", "/system s", "hi", "/save one", "/reset", "/nothink", "/resume one")
    talk = chat.conversation
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant"]
    assert talk.thinking
    assert chat.engine.restored == [chat.store.snapshot("one")]  # type: ignore[attr-defined]
    say(chat, "/nothink", "more")
    assert [m["content"] for m in talk.messages[-2:]] == ["more", "restored"]


def test_a_snapshot_that_cannot_be_used_is_only_a_notice(chat: Chat, streams: Streams) -> None:
    say(chat, "hi", "/save one")
    chat.store.snapshot("one").write_text("broken", encoding="utf-8")
    say(chat, "/resume one", "more")
    assert "will be read again: broken" in streams.err.getvalue()
    assert chat.conversation.messages[-1]["content"] == "again"


def test_without_a_snapshot_the_conversation_is_read_again(chat: Chat) -> None:
    say(chat, "hi", "/save one")
    chat.store.snapshot("one").unlink()
    say(chat, "/resume one", "more")
    assert chat.conversation.messages[-1]["content"] == "again"


def test_ctrl_c_at_the_prompt_warns_once_then_quits(chat: Chat, streams: Streams) -> None:
    assert say(chat, KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "x") == 130
    out, err = streams.text
    assert out == "one\n" and err.count("Ctrl-D or /quit") == 2


def test_ctrl_c_in_a_pipe_quits(chat: Chat) -> None:
    chat.interactive = False
    assert say(chat, KeyboardInterrupt, "hi") == 130


class Interrupting(str):
    """A piece of text whose arrival is the moment of Ctrl-C."""

    def __new__(cls, text: str, times: int = 1) -> "Interrupting":
        piece = super().__new__(cls, text)
        piece.times = times
        return piece

    times: int


def with_ctrl_c(session: Any) -> Any:
    """The session, sending SIGINT to this process where the script says so."""
    generate = session.generate

    def generate_and_interrupt(options: Any) -> Iterator[Any]:
        for piece in generate(options):
            for _ in range(getattr(piece.text, "times", 0)):
                os.kill(os.getpid(), signal.SIGINT)
            yield piece

    session.generate = generate_and_interrupt
    return session


@pytest.fixture
def python_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_handler")
def test_ctrl_c_in_an_answer_keeps_it_and_the_talk(
    chat: Chat, scripted: Any, streams: Streams
) -> None:
    script = [["a", Interrupting("b"), "c"], ["d"]]
    chat.conversation.session = with_ctrl_c(scripted(script))
    assert say(chat, "go", "on") == 0
    out, err = streams.text
    assert out == "ab\nd\n" and err == "(stopped)\n"
    assert [m["content"] for m in chat.conversation.messages] == ["go", "ab", "on", "d"]


@pytest.mark.usefixtures("python_handler")
def test_a_second_ctrl_c_takes_a_new_session(chat: Chat, scripted: Any, streams: Streams) -> None:
    first = with_ctrl_c(scripted([["a", Interrupting("b", 2)]]))
    chat.conversation.session = first
    assert say(chat, "go", "on") == 0
    assert chat.conversation.session is not first
    assert streams.out.getvalue() == "a\nagain\n"


@pytest.mark.usefixtures("python_handler")
def test_ctrl_c_in_an_answer_ends_a_pipe(chat: Chat, scripted: Any) -> None:
    chat.interactive = False
    chat.conversation.session = with_ctrl_c(scripted([["a", Interrupting("b"), "c"]]))
    with pytest.raises(KeyboardInterrupt):
        say(chat, "go", "on")


def test_a_prompt_that_does_not_fit_is_told(chat: Chat, scripted: Any, streams: Streams) -> None:
    chat.conversation.session = scripted([["a"]], context=10)
    assert say(chat, "x" * 50) == 0
    assert streams.err.getvalue().startswith("error: the prompt has ")
    chat.interactive = False
    with pytest.raises(PromptError):
        say(chat, "x" * 50)
