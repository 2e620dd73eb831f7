"""Markdown is cut where the rest cannot change what was cut off, and drawn once."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ds4py.cli.markdown import Lines, MarkdownView, split_blocks
from ds4py.text.events import Content, Reasoning


@pytest.mark.parametrize(
    ("text", "blocks", "rest"),
    [
        ("", [], ""),
        ("one", [], "one"),
        ("one\ntwo\n", [], "one\ntwo\n"),
        ("one\n\n", [], "one\n\n"),
        ("one\n\ntwo", [], "one\n\ntwo"),
        ("one\n\ntwo\n", ["one"], "two\n"),
        ("one\n\na second paragraph", ["one"], "a second paragraph"),
        ("one\n\n\n\ntwo\n\nthree\n", ["one", "two"], "three\n"),
        ("one\n\n    code or a list's paragraph\n", [], "one\n\n    code or a list's paragraph\n"),
        ("- a\n\n- b\n", [], "- a\n\n- b\n"),
        ("1. a\n\n2. b\n\ntext after\n", ["1. a\n\n2. b"], "text after\n"),
        ("```py\na\n\nb\n```\n\nend.\n", ["```py\na\n\nb\n```"], "end.\n"),
        ("```\na\n\nb\n", [], "```\na\n\nb\n"),
        ("````\n```\n\nx\n````\n\ny\n", ["````\n```\n\nx\n````"], "y\n"),
        ("~~~\n```\n\nx\n", [], "~~~\n```\n\nx\n"),
    ],
)
def test_blocks(text: str, blocks: list[str], rest: str) -> None:
    assert split_blocks(text) == (blocks, rest)


LINES = st.lists(st.sampled_from(["", "text", "- item", "1. one", "```", "    in", "# head"]))


@given(LINES.map("\n".join))
def test_cutting_loses_nothing_but_blank_lines(text: str) -> None:
    blocks, rest = split_blocks(text)
    kept = [line for part in [*blocks, rest] for line in part.split("\n") if line.strip()]
    assert kept == [line for line in text.split("\n") if line.strip()]


@given(LINES.map("\n".join))
def test_what_is_cut_off_stays_cut_off_however_the_text_goes_on(text: str) -> None:
    shown: list[str] = []
    rest = ""
    for character in text:
        blocks, rest = split_blocks(rest + character)
        shown += blocks
    whole, _ = split_blocks(text)
    assert shown == whole[: len(shown)]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def draw(text: str, height: int = 12) -> str:
    """What is left in the scroll-back when the text arrived in small pieces."""
    out = Screen()
    console = Console(file=out, force_terminal=True, width=40, height=height, color_system=None)
    view = MarkdownView(out, io.StringIO(), console)
    for start in range(0, len(text), 5):
        view.event(Content(text[start : start + 5]))
    view.end()
    return out.getvalue()


def test_every_block_is_rendered_once_at_the_end() -> None:
    drawn = draw("# Head\n\nsome **bold** text\n\n- a\n- b\n")
    final = drawn.rsplit("\x1b[2K", 1)[-1]  # after the last erased line
    assert "• a" in final and "• b" in final and "**" not in drawn.replace("**b", "")


def test_only_what_fits_on_the_screen_is_redrawn() -> None:
    console = Console(width=40, height=6)
    text = "\n".join(f"- line {n}" for n in range(50))
    lines = console.render_lines(Lines(text, gap=False, most=4), console.options)
    shown = ["".join(segment.text for segment in line).strip() for line in lines]
    assert [line for line in shown if line] == [f"• line {n}" for n in range(46, 50)]


def test_blocks_are_one_blank_line_apart() -> None:
    drawn = draw("one\n\n- two\n- three\n\n# four\n\n| a |\n|---|\n| 5 |\n\nsix\n", height=40)
    out = Screen()
    console = Console(file=out, force_terminal=True, width=40, color_system=None)
    console.print(Lines("- x\n- y\n", gap=True))
    assert [line.strip() for line in out.getvalue().split("\n")][:3] == ["", "• x", "• y"]
    assert "\n\n\n" not in drawn.replace(" ", "")


def test_control_characters_do_not_reach_the_terminal() -> None:
    drawn = draw("a \x1b]52;c;AAAA\x07 b \x9b31m c")
    assert "]52;c;AAAA b" in drawn.replace("\n", " ").replace("  ", " ")
    assert "\x1b]" not in drawn and "\x07" not in drawn and "\x9b" not in drawn


def test_reasoning_is_dimmed_above_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, err = Screen(), Screen()
    view = MarkdownView(out, err, Console(file=out, width=40, height=12))
    for event in (Reasoning("\nhm"), Reasoning(" yes"), Content("It is.")):
        view.event(event)
    view.end()
    assert err.getvalue() == "\x1b[2mhm\x1b[0m\x1b[2m yes\x1b[0m\x1b[2m\n\n\x1b[0m"
    assert "hm" not in out.getvalue() and "It is." in out.getvalue()
