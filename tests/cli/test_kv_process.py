"""Sessions on disk as a user meets them: the second run starts where the first one was."""

import json
import re
from pathlib import Path
from typing import Any

SYSTEM = "You are a careful assistant. You never invent facts. " * 12
QUICK = ("--max-tokens", "4", "--temperature", "0")


def cached(done: Any) -> int:
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["usage"]["cached_tokens"])


def test_a_system_prompt_is_read_once(ds4: Any, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text(SYSTEM)
    command = ("generate", "--system", str(tmp_path / "system.txt"), "--json", *QUICK)
    first = ds4(*command, "Who are you?")
    assert cached(first) == 0
    second = ds4(*command, "Who are you?")
    assert json.loads(second.stdout)["tokens"] == json.loads(first.stdout)["tokens"]
    assert cached(second) > 100
    assert cached(ds4(*command, "Tell me a story.")) == cached(second)
    assert cached(ds4(*command, "Who are you?", "--kv-space", "0")) == 0
    elsewhere = str(tmp_path / "kv")
    assert cached(ds4(*command, "Who are you?", env={"DS4_KV": elsewhere})) == 0
    assert cached(ds4(*command, "Who are you?", "--kv-dir", elsewhere)) > 100
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_resumed_conversation_is_not_read_again(ds4: Any) -> None:
    talk = ("chat", "--system", SYSTEM, *QUICK)
    assert ds4(*talk, stdin="Hello.\nHow are you?\n/save talk\n").returncode == 0
    done = ds4("chat", "--resume", "talk", *QUICK, stdin="Fine.\n/stats\n")
    found = re.search(r"prompt (\d+) tokens \((\d+) cached\)", done.stderr)
    assert found is not None, done.stderr
    assert int(found[2]) > int(found[1]) - 40  # all but the last reply and the new message


def test_looking_after_it(ds4: Any, tmp_path: Path, complaint: Any) -> None:
    where = ("--kv-dir", str(tmp_path / "kv"))
    assert ds4("generate", "--system", SYSTEM, "Hi", *QUICK, *where).returncode == 0
    listed = [json.loads(line) for line in ds4("cache", "ls", "--json", *where).stdout.splitlines()]
    assert listed and listed[0]["tokens"] > 100
    stats = json.loads(ds4("cache", "stats", "--json", *where).stdout)
    assert stats["snapshots"] == len(listed) and stats["segments"] >= 1
    assert stats["bytes"] == sum(p.stat().st_size for p in (tmp_path / "kv").glob("s*/*"))
    damaged = next((tmp_path / "kv" / "segments").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    checked = ds4("cache", "verify", *where)
    assert checked.returncode == 2 and str(damaged) in checked.stderr and not damaged.exists()
    assert ds4("cache", "verify", *where).returncode == 0
    assert "no snapshot of that name: zz" in complaint(ds4("cache", "rm", "zz", *where))
    assert json.loads(ds4("cache", "stats", "--json", *where).stdout)["snapshots"] == 0
    assert ds4("generate", "--system", SYSTEM, "Hi", *QUICK, *where).returncode == 0
    removed = ds4("cache", "rm", listed[0]["name"][:10], *where)
    assert removed.returncode == 0 and "Removed 1 snapshots" in removed.stderr
    assert list((tmp_path / "kv").glob("s*/*.snap")) == []


def test_bad_places(ds4: Any, tmp_path: Path, complaint: Any) -> None:
    (tmp_path / "file").write_text("x")
    generate = ("generate", "Hi", *QUICK)
    assert "cannot hold KV snapshots" in complaint(
        ds4(*generate, "--kv-dir", str(tmp_path / "file"))
    )
    assert "--kv-space is 'much'" in complaint(ds4(*generate, "--kv-space", "much"))
    assert "is no directory" in complaint(ds4("cache", "ls", "--kv-dir", str(tmp_path / "no")))
    usual = ds4(*generate, env={"XDG_CACHE_HOME": str(tmp_path / "file")})
    assert usual.returncode == 0 and "without sessions on disk" in usual.stderr
