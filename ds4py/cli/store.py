"""Conversations and typing history on disk, in the user's state directory.

Everything is readable by the user alone and replaced whole: a file is written beside its place and
renamed. Knows nothing of terminals or models.
"""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds4py.errors import InputError, OptionsError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_ROLES = {"system", "user", "assistant", "tool"}


class StoreError(InputError):
    """A saved conversation is missing, unreadable or cannot be written."""


def state_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where this program keeps what it remembers: the XDG state directory's `ds4` folder."""
    root = environ.get("XDG_STATE_HOME") or ""
    return Path(root if os.path.isabs(root) else Path.home() / ".local" / "state") / "ds4"


class Store:
    """Saved conversations by name: `chats/NAME.json`, and the session's rows in `chats/NAME.kv`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def history_file(self) -> Path:
        """The file of lines typed before, made when missing. Raises OSError."""
        self._make(self.directory)
        path = self.directory / "history"
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
        return path

    def snapshot(self, name: str) -> Path:
        """Where the session of a conversation is kept."""
        return self._chats() / f"{_checked(name)}.kv"

    def save(self, name: str, content: Mapping[str, Any]) -> Path:
        """Write a conversation, all or nothing; the path. Raises OptionsError, StoreError."""
        path = self._chats() / f"{_checked(name)}.json"
        try:
            self._make(self.directory)
            self._make(path.parent)
            _replace(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def load(self, name: str) -> dict[str, Any]:
        """What was saved under the name. Raises OptionsError, StoreError."""
        path = self._chats() / f"{_checked(name)}.json"
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise StoreError(f"no saved conversation {name}; {self._known()}") from None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise StoreError(f"{path} is not a saved conversation: {error}") from error
        if not _is_conversation(content):
            raise StoreError(f"{path} is not a saved conversation; save it again with /save")
        return dict(content)

    def names(self) -> list[str]:
        """The names of all saved conversations."""
        return sorted(path.stem for path in self._chats().glob("*.json"))

    def _known(self) -> str:
        names = self.names()
        return f"there are: {', '.join(names)}" if names else "none was saved yet"

    def _chats(self) -> Path:
        return self.directory / "chats"

    @staticmethod
    def _make(directory: Path) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise OptionsError(
            f"{name!r} cannot name a conversation; use up to 64 letters, digits, '.', '_' and '-'"
        )
    return name


def _is_conversation(content: Any) -> bool:
    if not isinstance(content, dict) or not isinstance(content.get("messages"), list):
        return False
    return all(
        isinstance(message, dict)
        and message.get("role") in _ROLES
        and isinstance(message.get("content"), str)
        for message in content["messages"]
    )


def _replace(path: Path, text: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
