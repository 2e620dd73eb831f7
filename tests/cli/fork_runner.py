"""Runs `ds4` again and again in forked children of a process that has imported everything.

One JSON line on stdin for each run, `{"pid": n}` and `{"status": n}` back. A run is a real process:
it has its own signals, its own files for stdout and stderr, and may be killed. `kill_at` kills it
at that many-th file operation, where no signal from outside could be aimed.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import ds4py.hub.pull
from ds4py.cli import app, commands, pull
from ds4py.hub import manifest

_OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "os.truncate"}


def kill_at(number: int) -> None:
    """Die at the number-th file operation from now on."""
    count = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal count
        if event in _OPERATIONS:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def child(order: dict[str, Any]) -> int:
    for number, path in enumerate((os.devnull, order["out"], order["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOCTTY), number)
    # New streams for what may be another kind of file than before; they last until the end.
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    if order.get("kill_at"):
        kill_at(order["kill_at"])
    if "part_bytes" not in order:
        return app.main(order["arguments"])
    wanted = manifest.choose(order["arguments"][1])
    ds4py.hub.pull.pull(wanted, Path(order["directory"]), part_bytes=order["part_bytes"])
    return 0


def main() -> None:
    assert commands.app and pull.run  # imported here, once
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                code = child(order)
                sys.stdout.flush()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main()
