"""`ds4 pull` against a hub on loopback: real HTTP, real processes, real kills."""

import contextlib
import os
import pty
import random
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ds4py.cli.progress import ByteProgress
from ds4py.engine.engine import resolve
from ds4py.errors import InputError
from ds4py.hub import place
from ds4py.hub.parts import PART_BYTES
from ds4py.weights.files import ModelFiles
from tests.cli.hub_runner import Runner, start
from tests.cli.hub_server import Hub, serve
from tests.golden import sets

REPO = "someone/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def tiny() -> dict[str, bytes]:
    """A model of 1 MB that opens, and files nobody wants."""
    folder = sets.DATA / "fast"
    files = {name: (folder / name).read_bytes() for name in ("config.json", WEIGHTS)}
    unwanted = {"README.md": b"words", "folder/other.json": b"{}", "image.png": b"\x89" * 20000}
    return files | {"LICENSE": b"words"} | unwanted


@pytest.fixture
def hub(server: Hub, tiny: dict[str, bytes]) -> Hub:
    """The server, forgetful and well-behaved."""
    fresh = Hub(endpoint=server.endpoint, storage=server.storage)
    server.__dict__.update(fresh.__dict__)
    server.repositories[REPO] = dict(tiny)
    return server


@pytest.fixture(scope="module")
def runner(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with start(tmp_path_factory.mktemp("runner"), server.endpoint) as running:
        yield running


def content(directory: Path) -> dict[str, bytes]:
    """All files below a directory, without our own record."""
    files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != place.RECORD}


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: files[name] for name in ("config.json", WEIGHTS, "LICENSE")}


def opens(directory: Path) -> bool:
    """Whether the engine takes the directory as a model: all it checks before it reads weights."""
    try:
        found = resolve(directory)
        ModelFiles.at(found).source()
    except InputError:
        return False
    return True


def test_a_model_is_fetched_and_opens(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    done = runner("pull", REPO, "--to", str(directory))
    assert (done.code, done.out) == (0, f"{directory}\n")
    assert all(line.startswith("ds4: ") for line in done.err.splitlines())
    assert content(directory) == wanted(tiny)
    assert opens(directory) and not place.partial(directory).exists()
    record = place.read_record(directory)
    assert record is not None and (record.repo, record.revision) == (REPO, hub.commit)
    # The token went to the hub and not to the storage behind it, which is another machine's.
    assert {asked.token for asked in hub.asked if asked.from_storage} == {None}
    assert {asked.token for asked in hub.asked if not asked.from_storage} == {"Bearer secret"}
    before = hub.calls
    again = runner("pull", REPO, "--to", str(directory))
    assert (again.code, again.out, again.err) == (0, f"{directory}\n", "")
    assert hub.calls == before


def test_a_pulled_model_has_a_name(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    models = runner.folder / "home" / ".local" / "share" / "ds4" / "models"
    absent = runner("inspect", REPO)
    assert "no pulled model of that name" in absent.complaint()
    done = runner("pull", REPO)
    assert done.out == f"{models / 'someone--tiny'}\n"
    shown = runner("inspect", REPO)
    assert shown.code == 0 and str(models) in shown.out
    models.joinpath("someone--tiny").rename(models / "someone--tiny.partial")
    assert runner("inspect", REPO).code == 0  # still complete: its record says so
    models.joinpath("someone--tiny.partial", place.NOTES).mkdir()
    models.joinpath("someone--tiny.partial", place.RECORD).unlink()
    assert "is a download that is not finished" in runner("inspect", REPO).complaint()
    note = models / "someone--tiny.partial" / place.NOTES / "x.data"
    note.write_bytes(b"GGUF")
    assert "is a download that is not finished" in runner("inspect", str(note)).complaint()


def test_one_file_of_a_repository(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    hub.repositories[REPO] = {"a.gguf": b"GGUF a", "b.gguf": b"GGUF b"}
    assert "give one of its files as" in runner("pull", REPO).complaint()
    done = runner("pull", f"{REPO}/b.gguf")
    directory = Path(done.out.strip())
    assert directory.name == "someone--tiny--b.gguf"
    assert content(directory) == {"b.gguf": b"GGUF b"}


def test_the_bar_leaves_stdout_alone(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how a terminal says that its other end is gone
            while data := os.read(ours, 65536):
                drawn.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    hub.repositories[REPO][WEIGHTS] = bytes(3_000_000)
    done = runner("pull", REPO, "--to", str(tmp_path / "m"), terminal=os.ttyname(theirs))
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert (done.code, done.out) == (0, f"{tmp_path / 'm'}\n")
    assert b"Checking" in b"".join(drawn) and b"ds4" not in b"".join(drawn)


def test_a_broken_transfer_goes_on(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    hub.cut[WEIGHTS] = [300_000, 500_000, 1]
    done = runner("pull", REPO, "--to", str(directory))
    assert done.code == 0 and content(directory) == wanted(tiny)
    starts = [asked.start for asked in hub.asked if asked.path == WEIGHTS]
    assert starts == [0, 300_000, 800_000, 800_001]


def test_a_server_without_ranges(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    hub.ignores_ranges, hub.cut[WEIGHTS] = True, [300_000]
    done = runner("pull", REPO, "--to", str(directory))
    assert done.code == 0 and content(directory) == wanted(tiny)


@pytest.mark.parametrize("path", [WEIGHTS, "config.json"], ids=["sha256", "git"])
def test_a_damaged_file_is_fetched_again(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path, path: str
) -> None:
    directory = tmp_path / "model"
    hub.damage[path] = 1
    done = runner("pull", REPO, "--to", str(directory))
    assert done.code == 0 and content(directory) == wanted(tiny)
    assert sum(asked.path == path for asked in hub.asked) == 2


def test_a_file_damaged_twice_is_refused(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    hub.damage[WEIGHTS] = 2
    told = runner("pull", REPO, "--to", str(directory)).complaint()
    assert f"{WEIGHTS} arrived damaged twice" in told
    assert not directory.exists() and not opens(place.partial(directory))
    done = runner("pull", REPO, "--to", str(directory))
    assert done.code == 0 and content(directory) == wanted(tiny)


def test_killed_at_twenty_moments(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    """Whatever is left opens only if it is the model, and the next run goes on with it."""
    moments, kills, finished = random.Random(7), 0, 0
    while kills < 20:
        directory = tmp_path / f"model{finished}"
        order = {"directory": str(directory), "part_bytes": 1 << 17}
        done = runner("pull", REPO, kill_at=moments.randrange(1, 60), **order)
        assert done.code in (0, -signal.SIGKILL), done.err
        kills += done.code != 0
        for left in (directory, place.partial(directory)):
            if opens(left):
                assert place.read_record(left) is not None
                assert wanted(content(left)) == wanted(tiny)
        if done.code == 0:
            finished += 1
            assert content(directory) == wanted(tiny)
    assert runner("pull", REPO, **order).code == 0
    assert content(directory) == wanted(tiny) and opens(directory)


def test_killed_at_every_step_of_the_end(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    """All that makes it open is there, one file is not: the moment a mistake would be dangerous."""
    prepared, model = place.partial(tmp_path / "prepared"), tmp_path / "model"
    while not ((prepared / WEIGHTS).exists() and (prepared / "config.json").exists()):
        hub.damage["LICENSE"] = 2  # ends a run, perhaps before the other files were complete
        assert runner("pull", REPO, "--to", str(tmp_path / "prepared")).code == 2
    for moment in range(1, 1000):
        shutil.copytree(prepared, place.partial(model))
        done = runner("pull", REPO, directory=str(model), part_bytes=PART_BYTES, kill_at=moment)
        left = model if model.exists() else place.partial(model)
        if opens(left):
            assert wanted(content(left)) == wanted(tiny)
        if done.code == 0:
            break
        assert done.code == -signal.SIGKILL, done.err
        shutil.rmtree(left)
    assert moment > 10 and opens(model)


def test_killed_from_outside_while_bytes_arrive(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    directory, moments = tmp_path / "model", random.Random(8)
    large = moments.randbytes(20_000_000)
    hub.repositories[REPO] = {WEIGHTS: large}
    left = 0

    def kill(n_bytes: int) -> None:
        nonlocal left
        if 0 < left <= n_bytes:
            runner.signal(signal.SIGKILL)
        left -= n_bytes

    hub.on_bytes = kill
    for _ in range(4):
        left = moments.randrange(2_500_000, 4_500_000)
        assert runner("pull", REPO, "--to", str(directory)).code == -signal.SIGKILL
        assert not directory.exists() and not opens(place.partial(directory))
    assert runner("pull", REPO, "--to", str(directory)).code == 0
    assert content(directory) == {WEIGHTS: large}
    starts = [asked.start for asked in hub.asked]
    assert starts == sorted(starts) and len(starts) == 5 and starts[-1] > 0


def test_ctrl_c(runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path) -> None:
    directory = tmp_path / "model"

    def interrupt(n_bytes: int) -> None:
        hub.on_bytes = lambda n: None
        runner.signal(signal.SIGINT)

    hub.on_bytes = interrupt
    done = runner("pull", REPO, "--to", str(directory))
    assert (done.code, done.out) == (130, "")
    assert all(line.startswith("ds4: ") for line in done.err.splitlines())
    assert not directory.exists() and not opens(place.partial(directory))
    assert runner("pull", REPO, "--to", str(directory)).code == 0
    assert content(directory) == wanted(tiny)


@pytest.mark.parametrize(
    ("refuse", "told"),
    [
        ((401, ""), "refuses the token"),
        ((401, "RepoNotFound"), "there is no someone/tiny"),
        ((401, "GatedRepo"), "someone/tiny is gated: accept its terms"),
        ((403, "GatedRepo"), "someone/tiny is gated: accept its terms"),
        ((403, ""), "this token may not read someone/tiny"),
        ((404, "RepoNotFound"), "there is no someone/tiny"),
        ((500, ""), "answers 500 for someone/tiny; try again later"),
    ],
)
def test_the_hub_refuses(
    runner: Runner, hub: Hub, tmp_path: Path, refuse: tuple[int, str], told: str
) -> None:
    hub.refuse = refuse
    assert told in runner("pull", REPO, "--to", str(tmp_path / "model")).complaint()
    assert [*tmp_path.iterdir()] == []


def test_the_hub_lists_files_and_refuses_them(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    hub.refuse_files = [(403, "GatedRepo")] * 3
    told = runner("pull", REPO, "--to", str(tmp_path / "model")).complaint()
    assert "someone/tiny is gated: accept its terms" in told


def test_a_busy_hub_is_asked_again(
    runner: Runner, hub: Hub, tiny: dict[str, bytes], tmp_path: Path
) -> None:
    hub.repositories[REPO] = {WEIGHTS: tiny[WEIGHTS]}
    hub.refuse_files = [(503, "")]
    assert runner("pull", REPO, "--to", str(tmp_path / "model")).code == 0
    assert content(tmp_path / "model") == {WEIGHTS: tiny[WEIGHTS]}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nobody/knows"], "there is no nobody/knows"),
        ([REPO, "--revision", "old"], "has no revision 'old'"),
        (["nonsense"], "nothing is known as 'nonsense'; pull flash, flash-gguf, pro"),
        (["a/../b"], "nothing is known as"),
        (["tiny"], "part of the program"),
        (["some one/tiny"], "not the name of a repository"),
        ([REPO, "--token", ""], "--token is empty"),
        ([REPO, "--token", "hf_ä"], "--token holds a character"),
        ([REPO + "/absent.gguf"], "names no weights"),
        (["flash"], "there is no deepseek-ai/DeepSeek-V4-Flash"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_request(
    runner: Runner, hub: Hub, tmp_path: Path, arguments: list[str], told: str
) -> None:
    place_to = [] if "--token" in arguments else ["--to", str(tmp_path / "model")]
    assert told in runner("pull", *arguments, *place_to).complaint()
    assert [*tmp_path.iterdir()] == []


def test_the_disk_is_too_small(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    hub.sizes[WEIGHTS] = shutil.disk_usage(tmp_path).total * 2
    told = runner("pull", REPO, "--to", str(tmp_path / "model")).complaint()
    assert "are still to come" in told and "too little" in told
    assert hub.asked == []


def test_a_directory_that_is_not_ours(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    own = tmp_path / "photos"
    own.mkdir()
    (own / "cat.png").write_bytes(b"cat")
    assert "was not made by `ds4 pull`" in runner("pull", REPO, "--to", str(own)).complaint()
    file = runner("pull", REPO, "--to", str(own / "cat.png"))
    assert "was not made by `ds4 pull`" in file.complaint()
    below = runner("pull", REPO, "--to", str(own / "cat.png" / "model"))
    assert "cannot write" in below.complaint() and "Not a directory" in below.err
    other = tmp_path / "model"
    place.partial(other).mkdir()
    (place.partial(other) / "cat.png").write_bytes(b"cat")
    assert "was not made by `ds4 pull`" in runner("pull", REPO, "--to", str(other)).complaint()
    assert (own / "cat.png").exists() and (place.partial(other) / "cat.png").exists()


def test_another_revision_and_a_changed_file(
    runner: Runner, hub: Hub, tmp_path: Path, tiny: dict[str, bytes]
) -> None:
    directory = tmp_path / "model"
    assert runner("pull", REPO, "--to", str(directory)).code == 0
    same = runner("pull", REPO, "--to", str(directory), "--revision", "main")
    assert same.code == 0 and same.out == f"{directory}\n"
    hub.commit = "a" * 40
    told = runner("pull", REPO, "--to", str(directory), "--revision", "main").complaint()
    assert "holds revision cccccccccccc, not aaaaaaaaaaaa" in told
    os.truncate(directory / WEIGHTS, 5)
    told = runner("pull", REPO, "--to", str(directory)).complaint()
    assert f"{WEIGHTS} was changed or removed" in told


def test_a_newer_commit_replaces_what_an_unfinished_pull_left(
    runner: Runner, hub: Hub, tmp_path: Path, tiny: dict[str, bytes]
) -> None:
    directory = tmp_path / "model"
    hub.repositories[REPO]["extra.json"] = b"{}"
    hub.damage[WEIGHTS] = 2
    assert runner("pull", REPO, "--to", str(directory)).code == 2
    changed = tiny["config.json"] + b"\n"
    hub.repositories[REPO] = tiny | {"config.json": changed}
    hub.commit = "b" * 40
    assert runner("pull", REPO, "--to", str(directory)).code == 0
    assert content(directory) == wanted(tiny) | {"config.json": changed}


def test_the_library_s_cache_is_used(
    runner: Runner, hub: Hub, tmp_path: Path, tiny: dict[str, bytes]
) -> None:
    cache = runner.folder / "home" / ".cache" / "huggingface" / "hub" / "models--someone--tiny"
    snapshot = cache / "snapshots" / hub.commit
    snapshot.mkdir(parents=True)
    (snapshot / WEIGHTS).write_bytes(tiny[WEIGHTS])
    (snapshot / "config.json").write_bytes(tiny["config.json"].swapcase())
    try:
        done = runner("pull", REPO, "--to", str(tmp_path / "model"))
        # The damaged one was noticed, fetched, and is still the library's.
        assert (snapshot / "config.json").read_bytes() == tiny["config.json"].swapcase()
    finally:
        shutil.rmtree(cache)
    assert done.code == 0 and content(tmp_path / "model") == wanted(tiny)
    assert {asked.path for asked in hub.asked} == {"config.json", "LICENSE"}


def test_two_pulls_at_once(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    import fcntl

    notes = place.partial(tmp_path / "model") / place.NOTES
    notes.mkdir(parents=True)
    with open(notes / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = runner("pull", REPO, "--to", str(tmp_path / "model")).complaint()
    assert "another `ds4 pull` is filling" in told


def test_no_network_and_offline(ds4: Any, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for name, value, told in (
            ("HF_ENDPOINT", nowhere, f"cannot reach {nowhere}"),
            ("HF_HUB_OFFLINE", "1", "HF_HUB_OFFLINE is set"),
        ):
            done = ds4("pull", REPO, env={name: value, "DS4_MODELS": str(tmp_path)})
            assert done.returncode == 2 and done.stdout == ""
            assert done.stderr.startswith("error: ") and told in done.stderr
            assert done.stderr.count("\n") == 1


def test_a_listing_is_not_trusted(runner: Runner, hub: Hub, tmp_path: Path) -> None:
    for path in ("../up.json", "/etc/x.json", ".pull/x.json", "pulled.json", "a\\b.json"):
        hub.repositories[REPO] = {path: b"{}"}
        told = runner("pull", REPO, "--to", str(tmp_path / "model")).complaint()
        assert "which cannot be fetched" in told
    assert [*tmp_path.iterdir()] == []


class Lines(list[str]):
    """A stream that is no terminal."""

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        self.append(text)
        return len(text)

    def flush(self) -> None:
        pass


def test_lines_of_progress() -> None:
    times = iter([0.0, 0.0, 5.0, 10.0, 10.0, 11.0, 11.0, 12.0])
    err: Any = Lines()
    clock: Callable[[], float] = lambda: next(times)  # noqa: E731
    with ByteProgress(err, clock) as progress:
        progress("download", 10_000_000, 110_000_000)
        progress("download", 11_000_000, 110_000_000)
        progress("download", 60_000_000, 110_000_000)
        progress("check", 0, 110_000_000)
        progress("check", 110_000_000, 110_000_000)
    assert "".join(err).splitlines() == [
        "ds4: fetching: 10.0 MB of 110.0 MB",
        "ds4: fetching: 60.0 MB of 110.0 MB, 5.0 MB/s, 10 s left",
        "ds4: checking: 0 B of 110.0 MB",
    ]
