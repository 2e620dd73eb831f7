"""Where fetched models lie and how a finished one is told from an unfinished one.

A pull fills `NAME.partial` and keeps its own notes in the folder `.pull` inside. When every file
has been checked it writes `pulled.json` and renames the directory to `NAME`. So there is one rule:
a directory with `.pull` and without `pulled.json` is not a model yet. Knows no network.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds4py.errors import PullError

PARTIAL = ".partial"
NOTES = ".pull"
RECORD = "pulled.json"


@dataclass(frozen=True)
class FileRecord:
    """One checked file: its path in the directory, its size and its hash."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    """The id of a small file's git blob, where the hub knows no sha256."""


@dataclass(frozen=True)
class Record:
    """What `pulled.json` says: where the files came from."""

    repo: str
    revision: str
    """The commit."""
    files: tuple[FileRecord, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"


def default_models() -> Path:
    """Where models are kept unless the user chose another place."""
    return Path.home() / ".local" / "share" / "ds4" / "models"


def folder_name(name: str) -> str:
    """`org/repo` -> `org--repo`: one folder for each model, whatever its name."""
    return name.replace("/", "--")


def partial(directory: Path) -> Path:
    """The directory that is filled before `directory` exists."""
    return directory.with_name(directory.name + PARTIAL)


def is_unfinished(directory: Path) -> bool:
    """Whether a pull is filling, or has left, this directory (or this file of its notes)."""
    if directory.parent.name == NOTES:
        return True
    return (directory / NOTES).is_dir() and not (directory / RECORD).is_file()


def find(name: str, models: Path) -> Path | None:
    """The directory of a pulled model, or the unfinished one; None when there is neither."""
    parts = name.split("/")
    if not all(parts) or any(part.startswith(".") for part in parts):
        return None
    directory = models / folder_name(name)
    return next((path for path in (directory, partial(directory)) if path.is_dir()), None)


def read_record(directory: Path) -> Record | None:
    """What was pulled into a directory; None when nothing was. Raises PullError."""
    path = directory / RECORD
    try:
        raw: Any = json.loads(path.read_text(encoding="utf-8"))
        files = tuple(FileRecord(**file) for file in raw["files"])
        return Record(str(raw["repo"]), str(raw["revision"]), files)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PullError(
            f"{path} cannot be read ({error}); remove {directory} and pull the model again"
        ) from error
