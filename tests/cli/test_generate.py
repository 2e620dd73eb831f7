"""`ds4 generate` with the embedded model, in processes of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GREEDY = ("--temperature", "0", "--max-tokens")
PROMPT = "Tell me a short story about a fox."

KEYS = {
    "text": str,
    "reasoning": str,
    "tool_calls": list,
    "finish_reason": str,
    "tokens": list,
    "usage": dict,
    "timing": dict,
    "model": str,
}


def test_a_context_longer_than_the_model_was_made_for_is_told(ds4: Any) -> None:
    done = ds4("generate", PROMPT, *GREEDY, "2", "--context", "65536")
    assert done.returncode == 0 and "tiny was made for 16384 tokens" in done.stderr
    done = ds4("generate", PROMPT, "--context", "2000000")
    assert done.returncode == 2 and "positions for 1048576 tokens" in done.stderr


def test_the_answer_is_on_stdout_and_the_model_is_named_first(ds4: Any) -> None:
    done = ds4("generate", PROMPT, *GREEDY, "12")
    assert done.returncode == 0 and len(done.stdout.split()) > 3
    assert done.stderr == "ds4: model tiny (embedded)\n"


def test_a_named_model_is_not_announced(ds4: Any) -> None:
    first = ds4("generate", PROMPT, *GREEDY, "5", "--model", "tiny")
    assert first.stderr == ""
    second = ds4("generate", PROMPT, *GREEDY, "5", env={"DS4_MODEL": "tiny"})
    assert second.stderr == "ds4: model tiny (from DS4_MODEL)\n"
    assert first.stdout == second.stdout


def test_a_prompt_can_be_piped(ds4: Any) -> None:
    expected = ds4("generate", PROMPT, *GREEDY, "5").stdout
    assert ds4("generate", *GREEDY, "5", stdin=PROMPT + "\n").stdout == expected
    assert ds4("generate", "-", *GREEDY, "5", stdin=PROMPT + "\n").stdout == expected


def test_json_has_every_key(ds4: Any) -> None:
    done = ds4("generate", PROMPT, *GREEDY, "8", "--json", "--stats")
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    answer = json.loads(line)
    assert {key: type(value) for key, value in answer.items()} == KEYS
    assert answer["finish_reason"] in ("stop", "length") and answer["model"] == "tiny"
    assert len(answer["tokens"]) == answer["usage"]["completion_tokens"] <= 8
    assert answer["usage"]["prompt_tokens"] > 8 and answer["usage"]["cached_tokens"] == 0
    assert set(answer["timing"]) == {
        "load_s", "prefill_s", "decode_s", "prefill_tps", "decode_tps",
    }  # fmt: skip
    assert all(value > 0 for value in answer["timing"].values())
    assert answer["text"].strip() == ds4("generate", PROMPT, *GREEDY, "8").stdout.strip()
    assert "tok/s" in done.stderr.splitlines()[-1]


def test_reasoning_is_not_part_of_the_answer(ds4: Any) -> None:
    arguments = ("generate", "What is 12 + 30?", "--think", *GREEDY, "200")
    answer = json.loads(ds4(*arguments, "--json").stdout)
    assert answer["reasoning"] and "think>" not in answer["text"] + answer["reasoning"]
    done = ds4(*arguments)
    assert done.stdout.strip() == answer["text"].strip()
    assert done.stderr.count("\n") == 1


def test_seed_and_stop(ds4: Any) -> None:
    arguments = ("generate", PROMPT, "--max-tokens", "12", "--seed", "7")
    text = ds4(*arguments).stdout
    assert ds4(*arguments).stdout == text
    word = text.split()[2]
    cut = json.loads(ds4(*arguments, "--stop", "@@@", "--stop", word, "--json").stdout)
    assert cut["text"] == text[: text.index(word)] and cut["finish_reason"] == "stop"


def test_raw_continues_the_text(ds4: Any) -> None:
    done = ds4("generate", "Once upon a time", "--raw", *GREEDY, "8", "--json")
    answer = json.loads(done.stdout)
    assert answer["text"] and answer["usage"]["prompt_tokens"] < 20


def test_control_tokens_in_a_prompt_are_only_text(ds4: Any) -> None:
    plain, spelled = (
        json.loads(ds4("generate", prompt, *GREEDY, "1", "--json").stdout)["usage"]
        for prompt in ("x", "x<｜end▁of▁sentence｜>")
    )
    assert spelled["prompt_tokens"] > plain["prompt_tokens"] + 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_told(ds4: Any) -> None:
    with open("/dev/full", "wb") as full:
        process = ds4.start("generate", PROMPT, *GREEDY, "5", stdin=None, stdout=full)
        err = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 1
    assert "No space left" in err and "Traceback" not in err and "Exception" not in err


@pytest.mark.parametrize("arguments", [("--help",), ("generate", PROMPT, *GREEDY, "50")], ids=str)
def test_a_reader_that_leaves_ends_us_quietly(ds4: Any, arguments: tuple[str, ...]) -> None:
    with ds4.start(*arguments) as process:
        process.stdout.close()
        assert process.stderr.read().decode().strip() in ("", "ds4: model tiny (embedded)")
        assert process.wait(timeout=120) == 0


def test_a_closed_stdout_is_no_error(ds4: Any) -> None:
    command = [sys.executable, "-m", "ds4py", "generate", PROMPT, *GREEDY, "2"]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command],
        env=ds4.environment(),
        timeout=120,
        check=False,
    )
    assert closed.returncode == 0


def test_help_lists_what_there_is(ds4: Any) -> None:
    done = ds4("--help")
    assert done.returncode == 0 and done.stderr == ""
    commands = [line.split()[0] for line in done.stdout.partition("Commands:")[2].splitlines()[1:]]
    expected = "generate chat serve inspect verify pull quantize imatrix cache bench"
    assert commands == expected.split()
    assert ds4().stdout == done.stdout
    assert ds4("--version").stdout.startswith("ds4 ")


def test_the_state_directory_stays_untouched(ds4: Any) -> None:
    ds4("generate", PROMPT, *GREEDY, "2")
    assert list(Path(ds4.home).iterdir()) == []


def test_kernels_can_be_chosen(ds4: Any) -> None:
    text = ds4("generate", PROMPT, *GREEDY, "5").stdout
    assert ds4("generate", PROMPT, *GREEDY, "5", "--kernels", "reference").stdout == text
    for command in (["generate", PROMPT], ["serve"], ["bench", "speed"]):
        done = ds4(*command, "--kernels", "fast")
        assert done.returncode == 2 and "auto, metal, reference" in done.stderr
    if sys.platform != "darwin":
        done = ds4("generate", PROMPT, "--kernels", "metal")
        assert done.returncode == 2 and "no Metal device" in done.stderr


def test_drafting_gives_the_same_text(ds4: Any) -> None:
    plain, drafting = (
        ds4("generate", PROMPT, *GREEDY, "20", "--stats", *option) for option in ([], ["--draft"])
    )
    assert drafting.stdout == plain.stdout
    assert re.search(r"^ds4: [1-9]\d* tokens drafted, \d+ accepted", drafting.stderr, re.MULTILINE)
    assert "drafted" not in plain.stderr


def test_mlx_is_told_when_to_hand_over_work() -> None:
    """Before it is loaded, and a value of the user's own stands."""
    program = (
        "import os\n"
        "from ds4py.cli.model import open_engine\n"
        "from ds4py.cli.settings import ModelChoice, Settings\n"
        "open_engine(Settings(ModelChoice('tiny', None)))\n"
        "print(os.environ['MLX_MAX_OPS_PER_BUFFER'], os.environ['MLX_MAX_MB_PER_BUFFER'])"
    )
    environ = {**os.environ, "MLX_MAX_OPS_PER_BUFFER": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["7", "1000000"]
