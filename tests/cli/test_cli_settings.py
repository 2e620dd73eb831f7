"""Options become settings before any model is touched."""

import io
import os
from pathlib import Path

import pytest

from ds4py.cli import settings as given
from ds4py.errors import OptionsError, PromptError
from ds4py.experts.options import StreamingOptions


def stdin(data: bytes, terminal: bool = False) -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    return stream


def test_a_model_is_chosen_by_option_then_environment_then_default() -> None:
    assert given.choose_model("big", {"DS4_MODEL": "x"}) == given.ModelChoice("big", None)
    by_environment = given.choose_model(None, {"DS4_MODEL": "x"})
    assert by_environment.name == "x" and "DS4_MODEL" in (by_environment.notice or "")
    for environ in ({}, {"DS4_MODEL": ""}):
        embedded = given.choose_model(None, environ)
        assert embedded.name == "tiny" and "embedded" in (embedded.notice or "")
    with pytest.raises(OptionsError):
        given.choose_model("", {})


@pytest.mark.parametrize(
    ("think", "think_max", "mode"),
    [
        (None, False, (None, None)),
        (True, False, (True, None)),
        (False, False, (False, None)),
        (None, True, (True, "max")),
        (True, True, (True, "max")),
    ],
)
def test_thinking_modes(
    think: bool | None, think_max: bool, mode: tuple[bool | None, str | None]
) -> None:
    assert given.thinking_mode(think, think_max) == mode


def test_thinking_modes_that_contradict() -> None:
    with pytest.raises(OptionsError, match="contradict"):
        given.thinking_mode(False, True)


def test_the_argument_is_the_prompt_and_stdin_stays_unread() -> None:
    source = stdin(b"other")
    assert given.read_prompt("hello ", source) == "hello "
    assert source.read() == "other"


@pytest.mark.parametrize("argument", [None, "-"])
@pytest.mark.parametrize(
    ("data", "text"),
    [(b"a b\n", "a b"), (b"a\r\n", "a"), (b"a\n\n", "a\n"), ("héé".encode(), "héé")],
)
def test_stdin_loses_one_newline(argument: str | None, data: bytes, text: str) -> None:
    assert given.read_prompt(argument, stdin(data)) == text


@pytest.mark.parametrize("data", [b"", b"\n", b" \n\t"])
def test_an_empty_prompt_is_refused(data: bytes) -> None:
    with pytest.raises(PromptError, match="empty"):
        given.read_prompt(None, stdin(data))
    with pytest.raises(PromptError, match="empty"):
        given.read_prompt(data.decode() or " ", stdin(b"x"))


def test_no_prompt_on_a_terminal_is_refused_without_waiting() -> None:
    with pytest.raises(PromptError, match="no prompt"):
        given.read_prompt(None, stdin(b"x", terminal=True))


def test_bytes_that_are_no_text_are_named() -> None:
    with pytest.raises(PromptError, match=r"stdin is not UTF-8 text \(byte 0xff at position 3\)"):
        given.read_prompt("-", stdin(b"abc\xff"))
    with pytest.raises(PromptError, match="the prompt is not UTF-8"):
        given.read_prompt(os.fsdecode(b"\xff"), stdin(b""))
    with pytest.raises(PromptError, match="--stop is not UTF-8"):
        given.stop_texts(["ok", os.fsdecode(b"\xff")])


def test_system_is_a_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rules.txt"
    file.write_text("Be brief.", encoding="utf-8")
    assert given.read_system(None) == ""
    assert given.read_system("You are kind.") == "You are kind."
    assert given.read_system(str(file)) == "Be brief."
    assert given.read_system("x" * 5000) == "x" * 5000
    file.write_bytes(b"\xff")
    with pytest.raises(PromptError, match="not UTF-8"):
        given.read_system(str(file))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="No such file"):
        given.read_file(str(tmp_path / "absent"))
    with pytest.raises(PromptError, match="Is a directory"):
        given.read_file(str(tmp_path))


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "bench experts"])
def test_every_command_that_runs_a_model_takes_the_choices_of_experts(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They reach the engine as they were given."""
    from ds4py.cli import bench_experts, chat, generate, serve
    from ds4py.cli.commands import app

    seen: list[given.Settings] = []
    for module in (generate, chat, serve, bench_experts):
        monkeypatch.setattr(module, "run", lambda *args: seen.extend(_settings(args)))
    words = "--experts streamed --verify-experts always --swap-experts 0.05 --prefetch router"
    chosen = [*command.split(), *words.split(), "--expert-policy", "decayed", "--expert-readers=3"]
    app(chosen, standalone_mode=False)
    options = seen[0].engine_options()
    assert options.experts == "streamed"
    assert options.streaming == StreamingOptions(
        policy="decayed", readers=3, verify="always", prefetch="router", swap=0.05
    )
    app(command.split(), standalone_mode=False)
    assert seen[1].engine_options().streaming == StreamingOptions()


def _settings(arguments: tuple[object, ...]) -> list[given.Settings]:
    return [a for a in arguments if isinstance(a, given.Settings)]
