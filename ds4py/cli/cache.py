"""`ds4 cache`: what is kept on disk of prompts read before, and getting rid of it."""

import sys
from collections.abc import Sequence
from datetime import datetime
from json import dumps
from typing import TYPE_CHECKING, Annotated

import typer

from ds4py.errors import InputError, OptionsError

if TYPE_CHECKING:
    from ds4py.cache.index import Found
    from ds4py.cache.store import Store

SHORT = 12
"""Characters of a snapshot's name that are shown; any beginning that fits one names it."""

cache = typer.Typer(
    help="Look after the sessions kept on disk.",
    rich_markup_mode=None,
    invoke_without_command=True,
)

KvDir = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The directory. Default: $DS4_KV, else the user's cache."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]


@cache.command(short_help="List what is kept.")
def ls(kv_dir: KvDir = None, json: AsJson = False) -> int:
    """List the snapshots, the one used last first: name, tokens, bytes of its own, uses, date."""
    with _opened(kv_dir) as store:
        found = store.entries()
    if json:
        for entry in found:
            print(_as_json(entry))
        return 0
    print(f"{'name':{SHORT}} {'tokens':>8} {'own':>10} {'uses':>5}  saved")
    for entry in found:
        saved = datetime.fromtimestamp(entry.created).strftime("%Y-%m-%d %H:%M")
        size = _size(entry.n_bytes)
        print(f"{entry.name[:SHORT]} {entry.tokens:8} {size:>10} {entry.hits:5}  {saved}")
    return 0


@cache.command(short_help="Remove some or all of it.")
def rm(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="As ls shows them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every snapshot.")] = False,
    kv_dir: KvDir = None,
) -> int:
    """Remove snapshots, and the rows that no other snapshot needs."""
    if bool(names) == everything:
        raise OptionsError("name the snapshots to remove, or give --all; `ds4 cache ls` lists them")
    with _opened(kv_dir) as store:
        entries = store.entries()
        gone = [e.name for e in entries] if everything else _named(entries, names or [])
        freed = store.remove(gone)
        if store.trouble is not None:
            raise InputError(store.trouble)
    print(f"Removed {len(gone)} snapshots, {_size(freed)}.", file=sys.stderr)
    return 0


@cache.command(short_help="Check every file.")
def verify(kv_dir: KvDir = None) -> int:
    """Read every file and remove those that are damaged; the exit code is 2 if there were any."""
    n_bad = 0
    with _opened(kv_dir) as store:
        n_files = sum(store.stats()[kind] for kind in ("snapshots", "segments"))
        for path, reason in store.verify():
            n_bad += 1
            print(f"{path}: {reason}", file=sys.stderr)
    print(f"{n_files} files, {n_bad} damaged" + (" and removed" if n_bad else ""), file=sys.stderr)
    return 2 if n_bad else 0


@cache.command(short_help="Tell how much it is.")
def stats(kv_dir: KvDir = None, json: AsJson = False) -> int:
    """Tell how many snapshots and shared segments there are, and their bytes."""
    with _opened(kv_dir) as store:
        numbers = store.stats()
        where = str(store.directory)
    del numbers["budget"]  # each command that writes has its own --kv-space
    if json:
        print(dumps({"directory": where, **numbers}))
    else:
        counted = f"{numbers['snapshots']} snapshots over {numbers['segments']} segments"
        print(f"{where}: {counted}, {_size(numbers['bytes'])}")
    return 0


class _opened:
    """The store of an option, closed afterwards. Nothing is evicted."""

    def __init__(self, directory: str | None):
        self._directory = directory

    def __enter__(self) -> "Store":
        from ds4py.cache.store import Store
        from ds4py.cli.settings import kv_directory

        path = kv_directory(self._directory)
        if path is None or (self._directory is not None and not path.is_dir()):
            raise InputError(f"{path} is no directory; name one that --kv-dir was given")
        self._store = Store.open(path, n_bytes=1 << 62)
        return self._store

    def __exit__(self, *error: object) -> None:
        self._store.close()


def _named(entries: "Sequence[Found]", names: list[str]) -> list[str]:
    """Full names from their beginnings. Raises InputError."""
    found = []
    for name in names:
        fits = [e.name for e in entries if e.name.startswith(name)]
        if len(fits) != 1:
            what = "no snapshot" if not fits else f"{len(fits)} snapshots"
            raise InputError(f"{what} of that name: {name}; `ds4 cache ls` lists them")
        found += fits
    return found


def _as_json(entry: "Found") -> str:
    facts = ("name", "tokens", "n_bytes", "hits", "created", "identity")
    return dumps({fact: getattr(entry, fact) for fact in facts})


def _size(n_bytes: int) -> str:
    from ds4py.sizes import format_size

    return format_size(n_bytes)
