"""`ds4 pull`: fetch a model; progress on stderr, the model's directory on stdout.

Ctrl-C ends the process at once, as everywhere: what is on disk survives any kill.
"""

import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

from ds4py.cli.progress import ByteProgress
from ds4py.cli.settings import DEFAULT_MODEL, models_directory
from ds4py.errors import OptionsError
from ds4py.hub import manifest, place


def run(name: str, revision: str | None, to: str | None, token: str | None) -> int:
    """Fetch the model; the exit code."""
    if name == DEFAULT_MODEL:
        raise OptionsError(f"the model {name} is part of the program; there is nothing to pull")
    for option, value in (("--revision", revision), ("--to", to), ("--token", token)):
        if value is not None and not value.strip():
            raise OptionsError(f"{option} is empty; leave it out or give a value")
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise OptionsError("--token holds a character that no token has; copy it again")
    wanted = manifest.choose(name)
    if revision is not None and revision != wanted.revision:
        # What is known by heart belongs to the revision it was noted for.
        wanted = replace(wanted, revision=revision, weight_bytes=0, sha256={})
    directory = Path(to).expanduser() if to else models_directory() / place.folder_name(name)

    from ds4py.hub.pull import pull

    # The library's warnings tell of what it will try next; what matters reaches us as an error.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with ByteProgress(sys.stderr) as progress:
        pulled = pull(wanted, directory.absolute(), token, progress)
    print(pulled)
    return 0
