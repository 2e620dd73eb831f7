"""`ds4 serve`: the HTTP server, from options to exit code."""

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds4py.cli.kv import kv_space, open_disk
from ds4py.cli.model import announce, tell_of_context, tokenizer_of
from ds4py.cli.settings import Settings, kv_directory, make_private, models_directory
from ds4py.errors import OptionsError
from ds4py.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from ds4py import Engine
    from ds4py.engine.scheduler import Scheduler
    from ds4py.server.worker import Opener

DEFAULT_KV_BYTES = 4 << 30
"""Memory of all sessions where nobody says; never less than one full context takes."""


@dataclass(frozen=True)
class ServeOptions:
    """What only the server is told."""

    host: str
    port: int | None
    """None: no TCP, because there is a Unix socket."""
    uds: str | None
    api_key: str | None
    insecure: bool
    slots: int
    queue: int
    thinking: bool
    strict_model: bool
    lenient: bool
    trace: str | None
    origins: tuple[str, ...]
    max_body: str
    kv_memory: str | None
    grace_s: float


def run(settings: Settings, options: ServeOptions) -> int:
    """Serve until stopped by a signal; the exit code."""
    from ds4py.server import listen
    from ds4py.server.app import Rules
    from ds4py.server.worker import Worker

    logging.basicConfig(format="ds4: %(message)s", stream=sys.stderr, level=logging.WARNING)
    settings.engine_options()  # a bad value is told before anything is opened
    kv_space(settings.kv_space)
    announce(settings.model)
    local = options.port is None or listen.is_loopback(options.host)
    if options.api_key == "":
        raise OptionsError("--api-key is empty; give a key or leave it out")
    if not local and options.api_key is None and not options.insecure:
        raise OptionsError(
            f"--host {options.host} can be reached from other machines; give an --api-key, or "
            "--insecure if everybody there may use this server"
        )
    rules = Rules(
        api_key=options.api_key,
        check_host=local,
        strict_model=options.strict_model,
        lenient=options.lenient,
        trace=_trace_file(options.trace),
        origins=options.origins,
        thinking=options.thinking,
        max_body=parse_size(options.max_body),
        state=make_private(kv_directory(settings.kv_dir)),
    )
    worker = Worker(_opener(settings, options), options.slots, options.queue)
    with ExitStack() as stack:
        listeners, names = [], []
        if options.port is not None:
            listeners.append(listen.open_tcp(options.host, options.port))
            names.append(_url(options.host, listeners[-1].getsockname()[1]))
        if options.uds is not None:
            path = Path(options.uds).expanduser()
            listeners.append(stack.enter_context(listen.open_unix(path)))
            names.append(f"unix:{path}")

        def ready(_stop: object) -> None:
            name = worker.engine.name if worker.engine else ""
            print(f"ds4: serving {name} at {' and '.join(names)}", file=sys.stderr, flush=True)

        listen.run(worker, rules, listeners, options.grace_s, ready)
    return 0


def _trace_file(option: str | None) -> Path | None:
    """`--trace`, a file that can be written. Raises OptionsError."""
    if option is None:
        return None
    path = Path(option).expanduser()
    try:
        path.touch(mode=0o600)
    except OSError as error:
        raise OptionsError(f"--trace cannot write {path}: {error.strerror}") from error
    return path


def _opener(settings: Settings, options: ServeOptions) -> "Opener":
    def opener(progress: "Callable[[str, int, int], None]") -> "tuple[Engine, Scheduler]":
        from ds4py import Engine
        from ds4py.engine.engine import resolve
        from ds4py.engine.scheduler import Scheduler

        path = resolve(settings.model.name, models_directory())
        engine = Engine.open(path, settings.engine_options(), progress)
        tokenizer_of(engine)
        tell_of_context(engine)
        disk = open_disk(engine, settings.kv_dir, settings.kv_space, background=True)
        if options.kv_memory is not None:
            return engine, Scheduler(engine, parse_size(options.kv_memory), disk)
        one = engine.session_bytes(engine.context)
        kv_bytes = max(one, min(options.slots * one, DEFAULT_KV_BYTES))
        return engine, Scheduler(engine, kv_bytes, disk)

    return opener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
