"""`ds4 chat`: read a message or a command, draw the answer, again.

One `Chat` holds the conversation, the store and what is drawn on; `_COMMANDS` is everything that
starts with a slash. Notices go to stderr, so that a piped stdout is the answers alone.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import NamedTuple, TextIO

from ds4py.cli import experts, interrupts
from ds4py.cli.conversation import Conversation, Stopped, Timeline
from ds4py.cli.generate import statistics
from ds4py.cli.kv import Timelines, kv_space, make_scheduler, open_disk
from ds4py.cli.model import open_engine, tokenizer_of
from ds4py.cli.progress import ProgressBar
from ds4py.cli.settings import Settings, checked_text, read_file
from ds4py.cli.store import Store, state_directory
from ds4py.cli.typed import Pipe, Source, Terminal, silent_keyboard
from ds4py.cli.view import PlainView, View, can_draw
from ds4py.errors import DS4Error, OptionsError

# As DeepSeek's own chat does.
THINKING = True


def run(settings: Settings, resume: str | None) -> int:
    """Talk until the input ends; the exit code."""
    sampling = settings.sampling_options()
    store = Store(state_directory())
    if resume is not None:
        store.load(resume)  # a wrong name is told before the model is loaded
    kv_space(settings.kv_space)
    engine, _ = open_engine(settings)
    disk = open_disk(engine, settings.kv_dir, settings.kv_space)
    timelines = Timelines(engine, make_scheduler(engine, disk))
    conversation = Conversation(timelines.session(), tokenizer_of(engine), sampling)
    conversation.thinking = THINKING
    source: Source = Terminal(store) if sys.stdin.isatty() else Pipe(sys.stdin)
    chat = Chat(timelines, conversation, store, make_view(), sys.stderr, source.interactive)
    if resume is not None:
        chat.resume(resume)
    if settings.thinking is not None:
        conversation.thinking, conversation.effort = settings.thinking, settings.effort
    if settings.system:
        conversation.system = settings.system
    if source.interactive:
        chat.tell(f"{engine.name}, {engine.context} tokens of context. /help lists the commands.")
    interrupts.raise_keyboard_interrupt()  # from here on there is a conversation to lose
    return chat.loop(source)


def make_view() -> View:
    """Markdown on a terminal, plain text elsewhere."""
    if sys.stdout.isatty() and can_draw():
        from ds4py.cli.markdown import MarkdownView

        return MarkdownView(sys.stdout, sys.stderr)
    return PlainView(sys.stdout, sys.stderr)


class Chat:
    """The state of one `ds4 chat`."""

    def __init__(
        self,
        engine: Timelines,
        conversation: Conversation,
        store: Store,
        view: View,
        err: TextIO,
        interactive: bool,
    ) -> None:
        self.engine = engine
        self.conversation = conversation
        self.store = store
        self.view = view
        self.err = err
        self.interactive = interactive
        self.over = False

    def tell(self, text: str) -> None:
        """A notice, which is no part of an answer."""
        print(text, file=self.err, flush=True)

    def loop(self, source: Source) -> int:
        """Handle messages until there are no more; the exit code.

        On a terminal an error is told and the talk goes on; in a pipe it ends the command.
        """
        warned = False
        while not self.over:
            try:
                text = source.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if warned or not self.interactive:
                    return interrupts.EXIT_CODE
                self.tell("(Ctrl-D or /quit ends the chat, and so does a second Ctrl-C)")
                warned = True
                continue
            warned = False
            try:
                self.handle(text)
            except DS4Error as error:
                if not self.interactive:
                    raise
                self.tell(f"error: {error}")
            except KeyboardInterrupt:  # a second Ctrl-C, or one during a command
                if not self.interactive:
                    raise
                # It can have come in the middle of a step: start from a state that is known.
                self.conversation.session = self.engine.session()
                self.tell("(stopped)")
        return 0

    def handle(self, text: str) -> None:
        """One message or command. Raises DS4Error with the conversation as it was before."""
        if not text:
            return
        if not text.startswith("/"):
            self.ask(checked_text(text, "the message"))
            return
        word, *rest = text.split(maxsplit=1)
        argument = rest[0] if rest else ""
        command = _COMMANDS.get(word)
        if command is None:
            raise OptionsError(f"there is no command {word}; /help lists those there are")
        if argument and not command.usage:
            raise OptionsError(f"{word} takes nothing after it; it got {argument!r}")
        if not argument and command.usage and not command.usage.startswith("["):
            raise OptionsError(f"{word} needs {command.usage}; /help tells more")
        command.run(self, argument)

    def ask(self, text: str) -> None:
        """Draw the answer to a message. Ctrl-C stops it and what came of it is kept."""
        with (
            silent_keyboard(sys.stdin),
            interrupts.Stoppable() as ctrl_c,
            ProgressBar(self.err) as bar,
        ):
            events = self.conversation.ask(text, bar, ctrl_c.stopped)
            try:
                with contextlib.closing(events):
                    for event in events:
                        self.view.event(event)
            except Stopped:
                pass
            finally:
                self.view.end()
            if ctrl_c.stopped():
                if not self.interactive:
                    raise KeyboardInterrupt
                self.tell("(stopped)")
        self._tell_length()

    def _tell_length(self) -> None:
        turn, limit = self.conversation.last, self.conversation.sampling.max_tokens
        if turn is None or turn.finish_reason != "length":
            return
        if limit is not None and len(turn.tokens) >= limit:
            self.tell(f"(cut at --max-tokens {limit})")
        else:
            self.tell(f"(the context of {self.engine.context} tokens is full; /reset empties it)")

    def save(self, name: str) -> None:
        """Keep the conversation, and the session's state beside it."""
        talk = self.conversation
        path = self.store.save(
            name,
            {
                "version": 1,
                "model": self.engine.name,
                "thinking": talk.thinking,
                "effort": talk.effort,
                "messages": talk.messages,
            },
        )
        try:
            talk.session.save(self.store.snapshot(name))
        except DS4Error as error:
            self.tell(f"(without the session's state: {error})")
        self.tell(f"Saved as {name} ({path}).")

    def resume(self, name: str) -> None:
        """Go on with a saved conversation."""
        content = self.store.load(name)
        talk = self.conversation
        talk.messages = content["messages"]
        talk.thinking = bool(content.get("thinking", talk.thinking))
        effort = content.get("effort")
        talk.effort = effort if effort in (None, "high", "max") else None
        talk.last = None
        talk.session = self._restored(name)
        self.tell(f"Resumed {name}: {len(talk.messages)} messages.")

    def _restored(self, name: str) -> Timeline:
        """The saved session, or an empty one that will read the conversation again."""
        path = self.store.snapshot(name)
        try:
            return self.engine.restore(path) if path.exists() else self.engine.session()
        except DS4Error as error:
            self.tell(f"(the conversation will be read again: {error})")
            return self.engine.session()

    def read(self, path: str) -> None:
        """Send a file's text as a message."""
        self.ask(read_file(path))

    def set_system(self, text: str) -> None:
        """Replace the system message; without text, tell what it is."""
        if text:
            self.conversation.system = text
        self.tell(f"System message: {self.conversation.system or '(none)'}")

    def think(self, effort: str) -> None:
        """Reason before answering; with `max`, at length."""
        if effort not in ("", "max"):
            raise OptionsError(f"/think takes nothing or max after it; it got {effort!r}")
        self.conversation.thinking, self.conversation.effort = True, effort or None
        self.tell("Reasons before it answers.")

    def do_not_think(self) -> None:
        """Answer at once."""
        self.conversation.thinking, self.conversation.effort = False, None
        self.tell("Answers without reasoning.")

    def show_stats(self) -> None:
        """What the last answer cost."""
        turn = self.conversation.last
        self.tell(statistics(turn) if turn else "Nothing was answered yet.")
        if turn and (lines := experts.counters(self.engine.stats())):
            self.tell(lines)

    def reset(self) -> None:
        """Forget the conversation."""
        self.conversation.reset()
        self.tell("The conversation is empty.")

    def quit(self) -> None:
        """End the chat."""
        self.over = True

    def show_help(self) -> None:
        """List the commands."""
        for word, command in _COMMANDS.items():
            usage = f"{word} {command.usage}".strip()
            self.tell(f"  {usage:16} {command.meaning}")
        self.tell("  Alt-Enter, or a backslash before Enter, starts a new line of the message.")
        self.tell("  Ctrl-C stops an answer. Ctrl-D ends the chat.")


class _Command(NamedTuple):
    run: Callable[[Chat, str], None]
    meaning: str
    usage: str = ""
    """What comes after it; in brackets when it can be left out."""


_COMMANDS = {
    "/help": _Command(lambda chat, _: chat.show_help(), "list the commands"),
    "/think": _Command(Chat.think, "reason before answering; max: at length", "[max]"),
    "/nothink": _Command(lambda chat, _: chat.do_not_think(), "answer at once"),
    "/system": _Command(Chat.set_system, "set the system message, or show it", "[TEXT]"),
    "/read": _Command(Chat.read, "send a file's text as a message", "FILE"),
    "/save": _Command(Chat.save, "keep the conversation on disk", "NAME"),
    "/resume": _Command(Chat.resume, "go on with a saved conversation", "NAME"),
    "/stats": _Command(lambda chat, _: chat.show_stats(), "tell what the last answer cost"),
    "/reset": _Command(lambda chat, _: chat.reset(), "forget the conversation"),
    "/quit": _Command(lambda chat, _: chat.quit(), "end the chat"),
}
