"""The official clients for Node, and real coding agents run headless, against a scripted model.

The packages are installed from npm into a folder of their own, or taken from DS4_NODE (a folder
with node_modules); agents are large and only looked for there:

    npm install --prefix DIR openai @anthropic-ai/sdk ai @ai-sdk/openai-compatible zod \
        @anthropic-ai/claude-code @openai/codex opencode-ai @earendil-works/pi-coding-agent
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import Served

pytestmark = pytest.mark.long

HERE = Path(__file__).parent
PACKAGES = ["openai", "@anthropic-ai/sdk", "ai", "@ai-sdk/openai-compatible", "zod"]
KEY = {"OPENAI_API_KEY": "x", "ANTHROPIC_API_KEY": "x", "DS4_KEY": "x"}
WORD = "The magic word is XYZZY."


def answer(tool: str, parameter: str, value: str) -> str:
    """Reasoning and one call."""
    return (
        "I look.</think>\n\n<｜DSML｜tool_calls>\n"
        f'<｜DSML｜invoke name="{tool}">\n'
        f'<｜DSML｜parameter name="{parameter}" string="true">{value}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


@contextmanager
def scripted(directory: Path, answers: list[str]) -> Iterator[str]:
    """The URL of a scripted server in a process of its own."""
    script = directory / "answers.json"
    script.write_text(json.dumps(answers), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.scripted", str(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=HERE.parents[1],
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.communicate(timeout=30)


def environment(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": str(home), **KEY}


def node_folder(tmp_path: Path, packages: list[str]) -> Path:
    """A folder whose node_modules hold the packages."""
    if (given := os.environ.get("DS4_NODE")) is not None:
        return Path(given)
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("there is no node")
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(tmp_path), *packages]
    done = subprocess.run(install, capture_output=True, text=True, timeout=200, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot install the clients: {done.stderr[-200:]}")
    return tmp_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the clients are."""
    return node_folder(tmp_path_factory.mktemp("node"), PACKAGES)


def run_in(folder: Path, name: str, url: str) -> str:
    """What a program says of a server."""
    program = folder / name  # a module is resolved from where the program lies
    program.write_text((HERE / name).read_text(encoding="utf-8"), encoding="utf-8")
    command = ["node", str(program), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.stdout + done.stderr


def test_the_official_clients(tmp_path: Path, folder: Path) -> None:
    calls, word = answer("look", "where", "a &lt; b"), "I know.</think>The word is XYZZY."
    # One text for each request of the program, in its order.
    answers = [calls, word, calls, word, calls, word, calls, word, calls, word, calls, word]
    with scripted(tmp_path, answers) as url:
        assert run_in(folder, "node_clients.mjs", url) == "ok\n"


def test_features_of_the_official_clients(served: Served, folder: Path) -> None:
    assert run_in(folder, "node_features.mjs", served.url) == "ok\n"


def agent(name: str) -> str:
    """The program of an agent."""
    found = Path(os.environ.get("DS4_NODE", "")) / "node_modules" / ".bin" / name
    if not os.environ.get("DS4_NODE") or not found.exists():
        pytest.skip(f"{name} is not in DS4_NODE")
    return str(found)


def ask(
    command: list[str],
    project: Path,
    env: dict[str, str],
    question: str = "What is the magic word in note.txt?",
) -> str:
    """What an agent says when it is asked for the word in note.txt, or something else."""
    project.mkdir()
    (project / "note.txt").write_text(WORD, encoding="utf-8")
    done = subprocess.run(
        [*command, question],
        cwd=project,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_claude_code(tmp_path: Path) -> None:
    program, project = agent("claude"), tmp_path / "project"
    calls = answer("Read", "file_path", str(project / "note.txt"))
    with scripted(tmp_path, [calls, f"Good.</think>{WORD}"]) as url:
        names = {f"ANTHROPIC_DEFAULT_{kind}_MODEL": "m" for kind in ("OPUS", "SONNET", "HAIKU")}
        env = {
            **environment(tmp_path),
            **names,
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_MODEL": "m",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        }
        command = [program, "--output-format", "json", "--allowedTools", "Read", "-p"]
        said = json.loads(ask(command, project, env))
    assert said["result"] == WORD and said["num_turns"] == 2
    assert said["usage"]["cache_read_input_tokens"] > 0


def test_codex(tmp_path: Path) -> None:
    program = agent("codex")
    calls = answer("exec_command", "cmd", "cat note.txt")
    with scripted(tmp_path, [calls, f"Good.</think>{WORD}"]) as url:
        home = tmp_path / ".codex"
        home.mkdir()
        (home / "config.toml").write_text(
            'model = "m"\nmodel_provider = "ds4"\ncheck_for_update_on_startup = false\n'
            f'[model_providers.ds4]\nname = "ds4"\nbase_url = "{url}/v1"\n'
            'wire_api = "responses"\nenv_key = "DS4_KEY"\n[analytics]\nenabled = false\n',
            encoding="utf-8",
        )
        command = [program, "exec", "--disable", "plugins", "--skip-git-repo-check", "--json"]
        said = ask([*command, "-s", "read-only"], tmp_path / "project", environment(tmp_path))
    items = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    texts = [event["item"].get("text") for event in items if event["type"] == "item.completed"]
    assert WORD in texts
    assert any(WORD in str(event.get("item", {}).get("aggregated_output")) for event in items)


def test_pi(tmp_path: Path) -> None:
    program = agent("pi")
    with scripted(tmp_path, [answer("read", "path", "note.txt"), f"Good.</think>{WORD}"]) as url:
        home = tmp_path / ".pi" / "agent"
        home.mkdir(parents=True)
        model = {
            "id": "m",
            "name": "m",
            "reasoning": True,
            "input": ["text"],
            "contextWindow": 16384,
            "maxTokens": 4096,
            "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        }
        provider = {"baseUrl": f"{url}/v1", "api": "openai-completions", "apiKey": "x"}
        providers = {"providers": {"ds4": {**provider, "models": [model]}}}
        (home / "models.json").write_text(json.dumps(providers), encoding="utf-8")
        env = {**environment(tmp_path), "PI_OFFLINE": "1", "PI_TELEMETRY": "0"}
        command = [program, "-p", "--provider", "ds4", "--model", "m"]
        said = ask(command, tmp_path / "project", env)
    assert said.strip() == WORD


def opencode(home: Path, url: str, limit: dict[str, int], **more: Any) -> dict[str, str]:
    """The environment of an opencode that knows one model, the server's; more: of its settings."""
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "ds4",
        "options": {"baseURL": f"{url}/v1", "apiKey": "x"},
        "models": {"m": {"name": "m", "tool_call": True, "limit": limit}},
    }
    config = {
        "autoupdate": False,
        "share": "disabled",
        "model": "ds4/m",
        "small_model": "ds4/m",
        "provider": {"ds4": provider},
        **more,
    }
    return {
        **environment(home),
        "OPENCODE_CONFIG_CONTENT": json.dumps(config),
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
    }


def test_opencode(tmp_path: Path) -> None:
    program, project = agent("opencode"), tmp_path / "project"
    calls = answer("read", "filePath", str(project / "note.txt"))
    # Its two first requests, a title and the question, come in either order: both read the file.
    with scripted(tmp_path, [calls, calls, f"Good.</think>{WORD}"]) as url:
        env = opencode(tmp_path, url, {"context": 200000, "output": 32000})
        said = ask([program, "run", "--format", "json"], project, env)
    parts = [json.loads(line)["part"] for line in said.splitlines() if line.startswith("{")]
    assert WORD in [part.get("text") for part in parts]
    assert any(WORD in str(part.get("state", {}).get("output")) for part in parts)
