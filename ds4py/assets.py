"""Where the files that travel with the package lie: the embedded model and the kernel bodies.

In a checkout (and an editable install) they are the top-level folders `models/` and `metal/`; a
wheel carries the same folders under `ds4py/_data/`. Knows only places, not what the files mean.
"""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def path(*parts: str) -> Path:
    """The place of a carried file or folder, e.g. `path("models", "tiny")`.

    The place is returned whether or not something is there: the caller knows what it needs from it
    and which error to raise.
    """
    carried = _PACKAGE / "_data"
    root = carried if carried.is_dir() else _PACKAGE.parent
    return root.joinpath(*parts)
