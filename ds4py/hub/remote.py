"""What a hub has and how to read a piece of it, on top of huggingface_hub.

The library finds the endpoint, the token, the proxy and the commit, and lists the files with their
hashes. Their bytes are read here: when the library (2.4) is killed in a file it begins that file
again from the first byte, and files are up to 86 GB large. Every foreign exception ends here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined] # documented, not in __all__
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from ds4py.errors import PullError
from ds4py.hub.fetch import Hiccup
from ds4py.hub.place import NOTES, RECORD, FileRecord

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_PIECE_BYTES = 1 << 20
_LIST_TIMEOUT_S = 30.0
_BUSY = (408, 429, 500, 502, 503, 504)


class Remote:
    """One commit of one repository."""

    def __init__(self, repo: str, revision: str | None, token: str | None):
        """Asks the hub which commit `revision` is. Raises PullError."""
        self.repo = repo
        self.host = constants.ENDPOINT
        self._api = HfApi(token=token)
        self._listing: Iterable[object] | None = None
        with self._explained(revision):
            try:
                info = self._api.model_info(repo, revision=revision, timeout=_LIST_TIMEOUT_S)
                self.revision = str(info.sha)
            except (httpx2.ConnectError, OfflineModeIsEnabled):
                # Perhaps another program of this machine has fetched it all.
                self._listing = get_cached_repo_tree(repo, revision=revision)
                self.revision = _cached_commit(repo, revision)
        self._headers = build_hf_headers(token=token) | {"Accept-Encoding": "identity"}

    def files(self) -> list[FileRecord]:
        """Every file of the commit, with size and hash. Raises PullError."""
        with self._explained(self.revision):
            listing = self._listing or self._api.list_repo_tree(
                self.repo, recursive=True, revision=self.revision
            )
            return [_checked(self.repo, item) for item in listing if hasattr(item, "blob_id")]

    def cached(self, path: str) -> Path | None:
        """The file in the cache that huggingface_hub keeps on this machine, if it is there."""
        found = try_to_load_from_cache(self.repo, path, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def read(self, file: FileRecord, start: int, stop: int) -> Iterator[bytes]:
        """Bytes `start` to `stop` of a file, in pieces. Raises PullError, Hiccup."""
        url = hf_hub_url(self.repo, file.path, revision=self.revision)
        headers = self._headers | {"Range": f"bytes={start}-{stop - 1}"}
        timeout = httpx2.Timeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with (
            self._explained(self.revision),
            _transient(self.host),
            get_session().stream("GET", url, headers=headers, timeout=timeout) as response,
        ):
            if response.status_code in _BUSY:
                raise Hiccup(f"{self.host} answers {response.status_code}", _retry_after(response))
            hf_raise_for_status(response)
            skip = _bytes_before(response, file, start)
            yield from _pieces(response, skip, stop - start)

    @contextlib.contextmanager
    def _explained(self, revision: str | None) -> Iterator[None]:
        """Turn what the libraries raise into one sentence."""
        try:
            yield
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
            self._explain(error, revision)
        except CachedRepoTreeNotFoundError as error:
            self._explain(error.__context__ or error, revision)

    def _explain(self, error: BaseException, revision: str | None) -> NoReturn:
        """Raise the PullError for a foreign exception."""
        repo, status = self.repo, None
        if isinstance(error, HfHubHTTPError):
            status = error.response.status_code
        if isinstance(error, GatedRepoError):
            text = (
                f"{repo} is gated: accept its terms at {self.host}/{repo}, then give a token with "
                "--token or `hf auth login`"
            )
        elif isinstance(error, RevisionNotFoundError):
            text = f"{repo} has no revision {revision!r}; leave --revision out for the newest"
        elif isinstance(error, RepositoryNotFoundError):
            text = (
                f"there is no {repo} at {self.host}, or it is private; check the name, or give a "
                "token with --token or `hf auth login`"
            )
        elif status == 401:
            text = f"{self.host} refuses the token; give another with --token or `hf auth login`"
        elif status == 403:
            text = f"this token may not read {repo}; give another with --token or `hf auth login`"
        elif status is not None:
            text = f"{self.host} answers {status} for {repo}; try again later"
        elif isinstance(error, HFValidationError):
            text = f"{repo!r} is not the name of a repository; give it as ORG/REPO"
        elif isinstance(error, OfflineModeIsEnabled):
            text = f"HF_HUB_OFFLINE is set and {repo} is not on this machine; unset it to fetch it"
        elif isinstance(error, httpx2.HTTPError | httpx2.InvalidURL):
            text = f"cannot reach {self.host} ({_reason(error)}); check the network and try again"
        elif isinstance(error, ValueError):
            text = f"{self.host} does not answer like a Hugging Face hub ({_reason(error)})"
        else:
            raise error
        raise PullError(text) from error


@contextlib.contextmanager
def _transient(host: str) -> Iterator[None]:
    try:
        yield
    except httpx2.ProxyError:
        raise
    except httpx2.TransportError as error:
        raise Hiccup(f"the connection to {host} broke ({_reason(error)})") from error


def _pieces(response: httpx2.Response, skip: int, n_bytes: int) -> Iterator[bytes]:
    """`n_bytes` of the body after the first `skip`, in pieces worth writing.

    What had arrived when a transfer breaks comes as a last piece before the error.
    """
    piece = bytearray()
    try:
        for data in response.iter_bytes():
            piece += data[skip : skip + n_bytes]
            n_bytes -= max(0, min(len(data) - skip, n_bytes))
            skip -= min(skip, len(data))
            if len(piece) >= _PIECE_BYTES or not n_bytes:
                yield bytes(piece)
                piece.clear()
            if not n_bytes:
                return
    except httpx2.TransportError:
        if piece:
            yield bytes(piece)
        raise
    if piece:
        yield bytes(piece)
    raise Hiccup(f"{response.url.host} ended a transfer too early")


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _retry_after(response: httpx2.Response) -> float:
    value = response.headers.get("Retry-After", "")
    return min(float(value), 300.0) if value.isdigit() else 0.0


def _bytes_before(response: httpx2.Response, file: FileRecord, start: int) -> int:
    """How many bytes come before the first that was asked for. Raises PullError."""
    if response.status_code != 206:
        return start  # the whole file: a cache on the way does not know about ranges
    told = response.headers.get("Content-Range", "")
    if told.startswith(f"bytes {start}-") and told.endswith((f"/{file.size}", "/*")):
        return 0
    raise PullError(
        f"{response.url.host} sends {told!r} of {file.path}, asked for byte {start} of "
        f"{file.size}; try again later"
    )


def _cached_commit(repo: str, revision: str | None) -> str:
    """The commit of a branch in the library's cache; a commit is itself."""
    name = revision or constants.DEFAULT_REVISION
    folder = "models--" + repo.replace("/", "--")
    ref = Path(constants.HF_HUB_CACHE, folder, "refs", name)
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else name


def _checked(repo: str, item: RepoFile | object) -> FileRecord:
    """A file of the listing, if it can be one: the hub is not trusted with our disk."""
    path, size = getattr(item, "path", None), getattr(item, "size", None)
    pure = PurePosixPath(path) if isinstance(path, str) else None
    if (
        pure is None
        or str(pure) != path
        or pure.is_absolute()
        or {"..", ".", NOTES, RECORD} & set(pure.parts)
        or "\\" in path
        or not isinstance(size, int)
        or size < 0
    ):
        raise PullError(f"{repo} lists a file {path!r} of {size!r} bytes, which cannot be fetched")
    lfs = getattr(item, "lfs", None)
    if lfs is not None:
        return FileRecord(path, int(lfs.size), sha256=str(lfs.sha256))
    return FileRecord(path, size, git_sha1=str(getattr(item, "blob_id", "")))
