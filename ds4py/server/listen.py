"""The listening side: sockets, the loop, and how it ends.

On the first signal no new connection is taken, what runs may finish for a while, then it is ended
with an error of its own protocol; the second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import resource
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from ds4py.errors import InputError, OptionsError
from ds4py.server.app import Rules, Service, make_app
from ds4py.server.connection import MAX_HEAD, Connection
from ds4py.server.worker import Worker

MAX_UNIX_PATH = 103
"""Bytes of a socket's path; macOS has room for no more."""
BACKLOG = 512
LAST_WORDS_S = 5.0
"""How long clients may take to read how their answers ended."""
SPARE_FILES = 128
"""File descriptors for everything that is no connection: macOS gives a process 256 in all."""

Announce = Callable[[Callable[[], object]], None]
"""Called when the model is loaded and requests are answered, with what stops the server."""

log = logging.getLogger("ds4.server")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to the address."""
    try:
        return ipaddress.ip_address(_resolve(host, 0)[1][0]).is_loopback
    except ValueError:
        return False


def open_tcp(host: str, port: int) -> socket.socket:
    """A listening socket. Raises InputError, OptionsError."""
    family, address = _resolve(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror}; another --port may be free"
        ) from error
    listener.setblocking(False)
    return listener


def _resolve(host: str, port: int) -> tuple[int, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise OptionsError(f"--host is {host!r}, which is no address of this machine") from error
    return found[0], found[4]  # type: ignore[return-value]


@contextlib.contextmanager
def open_unix(path: Path) -> Iterator[socket.socket]:
    """A listening socket at `path`, mode 0600; removed at the end. A stale one is replaced.

    Raises InputError when the path is taken or cannot be used.
    """
    if len(os.fsencode(path)) > MAX_UNIX_PATH:
        raise InputError(f"the path {path} is too long for a socket; {MAX_UNIX_PATH} bytes fit")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
        ours = os.stat(path).st_ino
    except OSError as error:
        listener.close()
        raise InputError(f"cannot make the socket {path}: {error.strerror or error}") from error
    except InputError:
        listener.close()
        raise
    listener.setblocking(False)
    try:
        yield listener
    finally:
        listener.close()
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == ours:
                os.unlink(path)


def _remove_stale(path: Path) -> None:
    """Make way: a socket that nobody listens on is what a killed server left."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise InputError(f"{path} exists and is no socket; choose another --uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise InputError(f"{path} cannot be used: {error}; choose another --uds") from error
    raise InputError(f"another server listens on {path}; stop it or choose another --uds")


def _allow_files(connection: type[Connection]) -> None:
    """Have file descriptors for the connections there may be, or fewer connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connection.MAX_CONNECTIONS + SPARE_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    connection.MAX_CONNECTIONS = min(connection.MAX_CONNECTIONS, max(soft - SPARE_FILES, 16))


class _Server(uvicorn.Server):
    """uvicorn's server, with signals left to `run`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(
    worker: Worker,
    rules: Rules,
    listeners: list[socket.socket],
    grace_s: float,
    announce: Announce,
    connection: type[Connection] = Connection,
) -> None:
    """Serve until a signal comes. Raises what kept the model from being loaded."""
    _allow_files(connection)
    service = Service(worker, rules)
    config = uvicorn.Config(
        make_app(service),
        http=connection,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=65,
        h11_max_incomplete_event_size=MAX_HEAD,
        backlog=BACKLOG,
    )
    try:
        asyncio.run(_serve(worker, _Server(config), listeners, grace_s, announce))
    finally:
        service.close()


async def _serve(
    worker: Worker,
    server: _Server,
    listeners: list[socket.socket],
    grace_s: float,
    announce: Announce,
) -> None:
    loop = asyncio.get_running_loop()
    endings: list[asyncio.Future[None]] = []

    async def end_answers() -> None:
        await asyncio.sleep(grace_s)
        await asyncio.to_thread(worker.stop)  # as long as a step and writing sessions take
        await asyncio.sleep(LAST_WORDS_S)
        for left in list(server.server_state.connections):
            left.transport.abort()

    def on_signal() -> None:
        if endings:
            os._exit(130)
        server.should_exit = True
        endings.append(asyncio.ensure_future(end_answers()))

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
    worker.ended = lambda: loop.call_soon_threadsafe(setattr, server, "should_exit", True)
    worker.start()
    serving = asyncio.ensure_future(server.serve(sockets=listeners))
    while not worker.opened.is_set() and not serving.done():
        await asyncio.sleep(0.01)
    if worker.error is not None:
        server.should_exit = True
    elif not server.should_exit:
        announce(lambda: loop.call_soon_threadsafe(on_signal))
    await serving
    for ending in endings:
        ending.cancel()
    await asyncio.to_thread(worker.stop)
    if worker.error is not None:
        raise worker.error
