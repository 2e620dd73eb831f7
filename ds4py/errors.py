"""Every error the package raises on purpose, as a tree.

A message is one line that says what was seen, what is needed and what to do. The library raises;
only `cli/` turns an error into an exit code. Owns no I/O.
"""


class DS4Error(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(DS4Error):
    """The user's input, file or option is at fault."""

    exit_code = 2


class ConfigError(InputError):
    """config.json has a key or value this engine cannot run exactly."""


class WeightsError(InputError):
    """A tensor or weight file is missing, left over, truncated or of the wrong shape or dtype."""


class TokenizerError(InputError):
    """Tokenizer files are missing or unusable."""


class PromptError(InputError):
    """The prompt does not fit: empty, longer than the context, or not text."""


class OptionsError(InputError):
    """An option has a value that makes no sense."""


class PullError(InputError):
    """A model cannot be fetched: the hub, the network, the disk, or what arrived is at fault."""


class KernelError(DS4Error):
    """A Metal kernel cannot be read, compiled or run here."""


class CapacityError(InputError):
    """There is no memory for another session now. `retry_after`: seconds; None: never will be."""

    def __init__(self, message: str, retry_after: float | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
