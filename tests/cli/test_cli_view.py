"""What an answer looks like as plain text."""

import io
import itertools

import pytest

from ds4py.cli.progress import ProgressBar
from ds4py.cli.view import PlainView, can_draw, harmless, has_colour
from ds4py.text.events import Content, Reasoning, ToolCallStart


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


EVENTS = (Reasoning("think"), Content("a\x1b[31mb"), Content("\x07c"))


def test_a_pipe_gets_the_answer_byte_for_byte_and_no_reasoning() -> None:
    out, err = io.StringIO(), io.StringIO()
    view = PlainView(out, err)
    for event in EVENTS:
        view.event(event)
    view.end()
    assert out.getvalue() == "a\x1b[31mb\x07c\n"
    assert err.getvalue() == ""


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    out, err = Screen(), Screen()
    view = PlainView(out, err)
    for event in EVENTS:
        view.event(event)
    view.end()
    assert out.getvalue() == "a[31mbc\n"
    assert err.getvalue() == "think\n\n"


@pytest.mark.parametrize(("text", "shown"), [("x", "x\n"), ("x\n", "x\n"), ("", "")])
def test_the_last_line_is_finished_once(text: str, shown: str) -> None:
    out = io.StringIO()
    view = PlainView(out, io.StringIO())
    view.event(Content(text))
    view.end()
    assert out.getvalue() == shown


def test_a_tool_call_leaves_stdout_empty() -> None:
    out = io.StringIO()
    view = PlainView(out, io.StringIO())
    view.event(ToolCallStart(0, "call_0", "look"))
    view.end()
    assert out.getvalue() == ""


def test_harmless_keeps_lines_tabs_and_other_scripts() -> None:
    assert harmless("a\tb\nж 日本\u200d\r\x00\x7f\x85") == "a\tb\nж 日本\u200d"


def test_colour_needs_a_terminal_that_wants_it() -> None:
    assert has_colour(Screen(), {"TERM": "xterm"})
    assert not has_colour(io.StringIO(), {"TERM": "xterm"})
    assert not has_colour(Screen(), {"TERM": "xterm", "NO_COLOR": "1"})
    assert not can_draw({"TERM": "dumb"}) and not can_draw({})


def test_a_quick_stage_draws_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    err = Screen()
    with ProgressBar(err) as bar:
        for done in range(101):
            bar("load", done, 100)
    assert err.getvalue() == ""


def test_a_slow_stage_draws_a_bar_and_removes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    seconds = itertools.count(0.0)
    err = Screen()
    with ProgressBar(err, lambda: next(seconds)) as bar:
        for done in range(5):
            bar("prefill", done, 10)
        assert "Reading the prompt" in err.getvalue() and "40%" in err.getvalue()
    assert err.getvalue().rstrip("\n").endswith(("\x1b[?25h", "\x1b[2K"))
