"""What was asked for on the command line, checked as far as it can be without a model."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ds4py.cli.arguments import NO_EXPERT_CHOICE, ExpertChoice
from ds4py.errors import OptionsError, PromptError

if TYPE_CHECKING:
    from ds4py import EngineOptions, SamplingOptions

DEFAULT_MODEL = "tiny"


@dataclass(frozen=True)
class ModelChoice:
    """Which model to open, and the notice that says so when the user did not."""

    name: str
    notice: str | None


def choose_model(option: str | None, environ: Mapping[str, str] = os.environ) -> ModelChoice:
    """`--model`, else DS4_MODEL, else the embedded tiny model."""
    if option:
        return ModelChoice(option, None)
    if option is not None:
        raise OptionsError("--model is empty; give the name or the directory of a model")
    if name := environ.get("DS4_MODEL"):
        return ModelChoice(name, f"ds4: model {name} (from DS4_MODEL)")
    return ModelChoice(DEFAULT_MODEL, f"ds4: model {DEFAULT_MODEL} (embedded)")


def models_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where `ds4 pull` puts models: DS4_MODELS, else `ds4/models` in the user's data directory."""
    if chosen := environ.get("DS4_MODELS"):
        return Path(chosen).expanduser()
    root = environ.get("XDG_DATA_HOME") or ""
    data = Path(root) if os.path.isabs(root) else Path.home() / ".local" / "share"
    return data / "ds4" / "models"


def kv_directory(option: str | None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """`--kv-dir`: where conversations outlive the process; "none": nowhere.

    Without the option DS4_KV, else `ds4/kv` in the user's cache directory.
    """
    chosen = option or environ.get("DS4_KV")
    if chosen:
        return None if chosen == "none" else Path(chosen).expanduser()
    root = environ.get("XDG_CACHE_HOME") or ""
    cache = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    return cache / "ds4" / "kv"


def make_private(path: Path | None) -> Path | None:
    """Make such a directory when it is missing. Raises OptionsError."""
    if path is None:
        return None
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OptionsError(
            f"cannot use {path} for conversations: {error.strerror}; name another --kv-dir, or none"
        ) from error
    return path


@dataclass(frozen=True)
class Settings:
    """One request's choices: model, conversation mode, sampling. None: the engine's default."""

    model: ModelChoice
    system: str = ""
    thinking: bool | None = None
    """None: nobody said."""
    effort: str | None = None
    """None, or "max" for the longest reasoning."""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    context: int | None = None
    memory: str | None = None
    experts: ExpertChoice = NO_EXPERT_CHOICE
    kernels: str | None = None
    draft: bool = False
    kv_dir: str | None = None
    """Where sessions are kept; None: the usual place."""
    kv_space: str | None = None
    """What they may take there; "0": nothing is kept."""

    def engine_options(self) -> "EngineOptions":
        """Raises OptionsError on a value that makes no sense."""
        from ds4py import EngineOptions
        from ds4py.experts.options import StreamingOptions

        streaming = dict(vars(self.experts))
        where = streaming.pop("where")
        return EngineOptions(
            streaming=StreamingOptions(**_given(**streaming)),
            draft=self.draft,
            **_given(
                context=self.context, memory=self.memory, kernels=self.kernels, experts=where
            ),
        )

    def sampling_options(self) -> "SamplingOptions":
        """Raises OptionsError on a value that makes no sense."""
        from ds4py import SamplingOptions

        return SamplingOptions(
            stop=self.stop,
            **_given(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                seed=self.seed,
            ),
        )


def _given(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def thinking_mode(think: bool | None, think_max: bool) -> tuple[bool | None, str | None]:
    """(thinking, effort) from --think/--no-think and --think-max; thinking None: nobody said."""
    if think_max and think is False:
        raise OptionsError("--no-think and --think-max contradict each other; give one of them")
    if think_max:
        return True, "max"
    return think, None


def read_prompt(argument: str | None, stdin: TextIO) -> str:
    """The prompt: the argument, or all of stdin for `-` or when stdin is not a terminal.

    One trailing newline of stdin is dropped: `echo` and editors put it there. Raises PromptError
    when there is nothing to read, when it is empty, or when it is not UTF-8.
    """
    if argument is not None and argument != "-":
        text = checked_text(argument, "the prompt")
    elif argument is None and stdin.isatty():
        raise PromptError("no prompt; give it as an argument or pipe it in")
    else:
        text = read_all(stdin).removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise PromptError("the prompt is empty; give it as an argument or pipe it in")
    return text


def read_all(stdin: TextIO) -> str:
    """All of stdin, which must be UTF-8."""
    return decode(stdin.buffer.read(), "stdin")


def decode(data: bytes, where: str) -> str:
    """UTF-8 bytes as text; PromptError names the place and the first bad byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where} is not UTF-8 text (byte 0x{data[error.start]:02x} at position "
            f"{error.start}); convert it first, e.g. with iconv"
        ) from error


def read_system(value: str | None) -> str:
    """`--system`: the text, or what the file of that name holds."""
    if value is None:
        return ""
    text = checked_text(value, "--system")
    return read_file(text) if os.path.isfile(text) else text


def read_file(path: str) -> str:
    """A UTF-8 text file's content; PromptError says why it cannot be read."""
    try:
        with open(os.path.expanduser(path), "rb") as file:
            return decode(file.read(), path)
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}") from error


def stop_texts(values: Sequence[str] | None) -> tuple[str, ...]:
    """`--stop`, as often as it was given."""
    return tuple(checked_text(value, "--stop") for value in values or ())


def checked_text(value: str, where: str) -> str:
    """An argument as text: bytes that were no UTF-8 reach us as lone surrogates."""
    return decode(os.fsencode(value), where)
