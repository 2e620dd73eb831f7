"""A tool server of the Model Context Protocol over stdin and stdout: the weather, always the same.

Writes the arguments of every call, one a line, to the file it is given.
"""

import json
import sys
from typing import Any

from ds4py.eval.toolpool import POOL

RESULT = '{"temperature": 21, "sky": "sunny"}'
FUNCTION = next(tool for tool in POOL if tool.name == "get_weather").schema()["function"]
TOOL = {
    "name": FUNCTION["name"],
    "description": FUNCTION["description"],
    "inputSchema": FUNCTION["parameters"],
}


def result(method: str, params: dict[str, Any]) -> dict[str, Any]:
    if method == "initialize":
        return {
            "protocolVersion": params["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "home", "version": "1"},
        }
    if method == "tools/list":
        return {"tools": [TOOL]}
    if method == "tools/call":
        with open(sys.argv[1], "a", encoding="utf-8") as file:
            file.write(json.dumps(params["arguments"]) + "\n")
        return {"content": [{"type": "text", "text": RESULT}]}
    return {}


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:  # otherwise nobody waits for an answer
            made = result(message["method"], message.get("params", {}))
            print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": made}), flush=True)


if __name__ == "__main__":
    main()
