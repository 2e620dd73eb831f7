"""Real coding agents run headless against `ds4 serve` with the embedded model, and call a tool.

They are given one tool that the model was trained on, by the means each of them has for that, and
a short system prompt where they take one; Codex sends its own 12,000 tokens. Where the agents are
looked for, and with which packages: test_node.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.process import ROOT, Served, start, stop
from tests.server.test_node import agent, ask, environment, opencode

pytestmark = pytest.mark.long

QUESTION = "What is the weather in Rome?"
SYSTEM = "You are a helpful assistant."
PI_TOOL = """
export default function (pi) {
  pi.registerTool({
    name: %s, label: "Weather", description: %s, parameters: %s,
    async execute(id, given) {
      (await import("node:fs")).appendFileSync(%s, JSON.stringify(given) + "\\n");
      return { content: [{ type: "text", text: %s }], details: {} };
    },
  });
}
"""


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = start(tmp_path_factory.mktemp("serve"), "--context", "65536")
    try:
        yield running
    finally:
        assert stop(running) == 0


class Tool:
    """The weather tool of an agent, and what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.calls = directory / "calls"
        self.command = [sys.executable, "-m", "tests.server.weather_tool", str(self.calls)]
        self.env = {"PYTHONPATH": str(ROOT)}

    @property
    def cities(self) -> list[str]:
        return [json.loads(line)["city"] for line in self.calls.read_text().splitlines()]


@pytest.fixture
def tool(tmp_path: Path) -> Tool:
    return Tool(tmp_path)


def lines(said: str) -> list[Any]:
    return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


def test_claude_code(embedded: Served, tool: Tool, tmp_path: Path) -> None:
    names = {f"ANTHROPIC_DEFAULT_{kind}_MODEL": "m" for kind in ("OPUS", "SONNET", "HAIKU")}
    env = {
        **environment(tmp_path),
        **names,
        "ANTHROPIC_BASE_URL": embedded.url,
        "ANTHROPIC_MODEL": "m",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    command, *arguments = tool.command
    server = {"command": command, "args": arguments, "env": tool.env}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"home": server}}))
    options = ["--output-format", "json", "--system-prompt", SYSTEM, "--tools", ""]
    options += ["--strict-mcp-config", "--mcp-config", str(tmp_path / "mcp.json")]
    options += ["--allowedTools", "mcp__home__get_weather", "-p"]
    said = json.loads(ask([agent("claude"), *options], tmp_path / "project", env, QUESTION))
    assert said["num_turns"] == 2 and "21 degrees and sunny" in said["result"]
    # It says no temperature, and names a tool as none was in training: the city may be another.
    assert len(tool.cities) == 1
    assert said["usage"]["cache_read_input_tokens"] > 200


def test_codex(embedded: Served, tool: Tool, tmp_path: Path) -> None:
    home = tmp_path / ".codex"
    home.mkdir()
    (home / "config.toml").write_text(
        'model = "m"\nmodel_provider = "ds4"\ncheck_for_update_on_startup = false\n'
        f'[model_providers.ds4]\nname = "ds4"\nbase_url = "{embedded.url}/v1"\n'
        'wire_api = "responses"\nenv_key = "DS4_KEY"\n[analytics]\nenabled = false\n'
        f'[mcp_servers.home]\ncommand = "{tool.command[0]}"\n'
        f'args = {json.dumps(tool.command[1:])}\ndefault_tools_approval_mode = "approve"\n'
        f'env = {{ PYTHONPATH = "{ROOT}" }}\n',
        encoding="utf-8",
    )
    command = [agent("codex"), "exec", "--disable", "plugins", "--skip-git-repo-check", "--json"]
    said = lines(ask(command, tmp_path / "project", environment(tmp_path), QUESTION))
    items = [event["item"] for event in said if event["type"] == "item.completed"]
    (call,) = (item for item in items if item["type"] == "mcp_tool_call")
    assert (call["tool"], call["status"]) == ("get_weather", "completed")
    # Ten times the tokens it was trained on, at its temperature: it may copy a digit wrongly.
    assert items[-1]["type"] == "agent_message" and "degrees" in items[-1]["text"]
    assert said[-1]["usage"]["cached_input_tokens"] > 10_000
    assert len(tool.cities) == 1


def test_pi(embedded: Served, tool: Tool, tmp_path: Path) -> None:
    from tests.server.weather_tool import FUNCTION, RESULT

    home = tmp_path / ".pi" / "agent"
    home.mkdir(parents=True)
    model = {"id": "m", "name": "m", "reasoning": True, "input": ["text"]}
    model |= {"contextWindow": 16384, "maxTokens": 4096}
    provider = {"baseUrl": f"{embedded.url}/v1", "api": "openai-completions", "apiKey": "x"}
    providers = {"providers": {"ds4": {**provider, "models": [model]}}}
    (home / "models.json").write_text(json.dumps(providers), encoding="utf-8")
    given = (FUNCTION["name"], FUNCTION["description"], FUNCTION["parameters"])
    filled = PI_TOOL % tuple(json.dumps(one) for one in (*given, str(tool.calls), RESULT))
    (tmp_path / "tool.ts").write_text(filled, encoding="utf-8")
    command = [agent("pi"), "-p", "--provider", "ds4", "--model", "m", "--system-prompt", SYSTEM]
    command += ["--no-builtin-tools", "--no-skills", "--no-context-files"]
    command += ["-e", str(tmp_path / "tool.ts")]
    env = {**environment(tmp_path), "PI_OFFLINE": "1", "PI_TELEMETRY": "0"}
    said = ask(command, tmp_path / "project", env, QUESTION)
    assert said.strip() == "It is 21 degrees and sunny in Rome." and tool.cities == ["Rome"]


def test_opencode(embedded: Served, tool: Tool, tmp_path: Path) -> None:
    tools = {"*": False, "home_*": True}
    env = opencode(
        tmp_path,
        embedded.url,
        {"context": 65536, "output": 4096},
        agent={"plain": {"mode": "primary", "prompt": SYSTEM, "temperature": 0, "tools": tools}},
        mcp={"home": {"type": "local", "command": tool.command, "environment": tool.env}},
    )
    command = [agent("opencode"), "run", "--agent", "plain", "--format", "json"]
    said = lines(ask(command, tmp_path / "project", env, QUESTION))
    parts = [event["part"] for event in said]
    (call,) = (part for part in parts if part["type"] == "tool")
    assert (call["tool"], call["state"]["status"]) == ("home_get_weather", "completed")
    assert "21 degrees and sunny" in [part["text"] for part in parts if part["type"] == "text"][-1]
    assert len(tool.cities) == 1
