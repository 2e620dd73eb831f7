"""The models that have a short name: what `models/NAME.json` says about each.

A manifest holds only what somebody published: the repository, the commit, which of its files make
the model, and how many bytes of weights there must be. Hashes come from the hub when files are
fetched; a manifest may pin some as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from ds4py import assets
from ds4py.errors import OptionsError

SUFFIXES = (".safetensors", ".gguf")
"""Files that hold weights."""
_MODEL_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "LICENSE*")


@dataclass(frozen=True)
class Manifest:
    """What to fetch."""

    name: str
    repo: str
    revision: str | None = None
    """A commit, branch or tag; None: the main branch."""
    files: tuple[str, ...] = _MODEL_FILES
    """Patterns of paths in the repository. `*` does not cross a slash."""
    weight_bytes: int = 0
    """The weight files add up to this or more (their headers), or something is missing."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Pinned hashes by path."""
    about: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The published config.json: sizes can be told before anything is fetched."""

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return all(file.endswith(".gguf") for file in self.files)

    def wants(self, path: str) -> bool:
        """Whether the file belongs to the model."""
        return any(
            path.count("/") == pattern.count("/") and fnmatchcase(path, pattern)
            for pattern in self.files
        )


def names() -> list[str]:
    """The short names, in alphabetical order."""
    return sorted(_carried())


def load(name: str) -> Manifest | None:
    """The manifest of a short name; None when there is none."""
    raw = _carried().get(name)
    if raw is None:
        return None
    raw.pop("source", None)  # for people: where the facts come from
    other = raw.pop("config_of", None)  # the same model in other files
    if other is not None:
        raw["config"] = _carried()[other]["config"]
    return Manifest(name=name, **raw | {"files": tuple(raw["files"])})


def _carried() -> dict[str, dict[str, Any]]:
    """The manifests that travel with the package, by name."""
    found = {}
    for path in assets.path("models").glob("*.json"):
        raw = json.loads(path.read_text(encoding="utf-8"))
        if "repo" in raw:
            found[path.stem] = raw
    return found


def choose(name: str) -> Manifest:
    """A short name, `org/repo`, or `org/repo/FILE` as a manifest. Raises OptionsError."""
    known = load(name)
    if known is not None:
        return known
    parts = name.split("/")
    if len(parts) < 2 or not all(parts) or any(part.startswith(".") for part in parts):
        raise OptionsError(
            f"nothing is known as {name!r}; pull {', '.join(names())}, or a repository as "
            "ORG/REPO or ORG/REPO/FILE"
        )
    repo = "/".join(parts[:2])
    if len(parts) == 2:
        return Manifest(name, repo)
    return Manifest(name, repo, files=("/".join(parts[2:]),))
