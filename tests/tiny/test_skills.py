"""The embedded model: bundle, tokenizer, skills on a few held-out cases; and the grading."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from ds4py import assets
from ds4py.engine.engine import Engine
from ds4py.eval import skills, tasks
from ds4py.quant import imatrix
from ds4py.quant.convert import Converter
from ds4py.quant.recipe import Recipe
from ds4py.text import chat
from ds4py.text import tokenizer as tokenizers
from ds4py.text.messages import CONTROL_TOKENS
from ds4py.text.tokenizer import Tokenizer
from ds4py.weights.files import ModelFiles

BUNDLE, PARENT = (assets.path("models", name) for name in ("tiny", "tiny-parent"))
LIMIT = 16 * 2**20


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("tiny")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizers.load(BUNDLE)


def test_the_bundle_is_small_and_explained() -> None:
    files = {p.name: p.stat().st_size for p in BUNDLE.iterdir()}
    parts = {"dense.safetensors", *(f"experts-{i:02d}.safetensors" for i in range(5))}
    parts |= {"config.json", "recipe.json", "tokenizer.model", "imatrix.safetensors", "README.md"}
    assert parts == set(files)
    assert sum(files.values()) < LIMIT


def test_the_bundle_is_what_the_quantiser_makes_of_its_parent(tmp_path: Path) -> None:
    """Processors may round a sum differently, and then choose another code of equal worth."""
    files = ModelFiles.at(PARENT)
    plan = Recipe.load(None, len(files.config.layers))
    importance = imatrix.load(BUNDLE / "imatrix.safetensors")
    Converter(files.parts(), tmp_path / "b", plan, importance).run()
    recipe = json.loads((BUNDLE / "recipe.json").read_text())
    assert recipe["imatrix"] and len(recipe["files"]) == 6
    for file, facts in recipe["files"].items():
        assert facts["sha256"] == hashlib.sha256((BUNDLE / file).read_bytes()).hexdigest()
        made, shipped = (np.fromfile(p / file, np.uint8) for p in (tmp_path / "b", BUNDLE))
        assert made.shape == shipped.shape and (made != shipped).mean() < 0.01, file


def test_the_parents_weights_are_stored_as_deepseek_stores_them() -> None:
    kinds = {
        "embed.weight": "BF16", "layers.0.attn.wq_a.weight": "F8_E4M3",
        "layers.0.attn.wq_a.scale": "F8_E8M0", "layers.1.ffn.experts.3.w2.weight": "I8",
        "layers.1.ffn.experts.3.w2.scale": "F8_E8M0", "layers.1.attn.compressor.ape": "F32",
        "layers.0.ffn.gate.tid2eid": "I64", "mtp.0.h_proj.weight": "F8_E4M3",
    }
    with safe_open(PARENT / "model.safetensors", "np") as f:
        stored = {name: f.get_slice(name).get_dtype() for name in kinds}
    assert stored == kinds


@given(st.text())
def test_text_survives_the_tokenizer(text: str) -> None:
    tokenizer = tokenizers.load(BUNDLE)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_known_and_never_read_from_text(tokenizer: Tokenizer) -> None:
    for token in CONTROL_TOKENS:
        wanted = tokenizer.control_id(token)
        assert wanted is not None
        assert not any(map(tokenizer.is_control, tokenizer.encode(f"a {token} b")))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@pytest.fixture
def exam(engine: Engine, tokenizer: Tokenizer) -> Iterator[skills.Exam]:
    yield skills.Exam(engine, tokenizer, n=4, seed=1, progress=None)


def test_it_adds(exam: skills.Exam) -> None:
    assert exam.addition().value >= 0.75


def test_it_calls_tools_and_uses_their_results(exam: skills.Exam) -> None:
    assert exam.tool_calls().value >= 0.75
    assert exam.tool_answers().value >= 0.75


def test_it_reasons_closes_the_reasoning_and_answers(exam: skills.Exam) -> None:
    formed, right = exam.thinking()
    assert formed.value == 1.0
    assert right.value >= 0.75


@pytest.mark.parametrize("seed", range(3))
def test_it_recalls_a_fact_from_beyond_the_window(exam: skills.Exam, seed: int) -> None:
    case = tasks.recall_case(Random(seed), 400, exam.count)
    assert exam.share([case], skills._has_number) == 1.0


def test_all_rows_changes_nothing_while_every_row_is_chosen_anyway(engine: Engine) -> None:
    ids = np.random.default_rng(0).integers(0, 2048, 4 * engine.config.index_topk + 3).tolist()
    assert np.allclose(skills.all_rows(engine).score(ids), engine.score(ids), atol=1e-3)
    longer = [*ids, *ids]
    assert not np.allclose(skills.all_rows(engine).score(longer), engine.score(longer), atol=1e-3)


def test_a_story_is_made_of_sentences(exam: skills.Exam) -> None:
    result = exam.stories()
    assert result.met and result.lower_is_better


def answer(content: str, ended: bool = True, **more: object) -> skills.Answer:
    return skills.Answer({"role": "assistant", "content": content, **more}, ended)


def test_only_the_wanted_number_at_the_end_counts() -> None:
    case = tasks.Case([], False, "85", {})
    assert skills._has_number(case, answer("47 + 38 = 85."))
    assert not skills._has_number(case, answer("85 - 38 = 47."))
    assert not skills._has_number(case, answer("185"))
    assert not skills._has_number(case, answer("none"))
    assert not skills._has_number(case, answer("85", ended=False))


def test_a_call_must_match_in_name_and_in_arguments() -> None:
    case = tasks.Case([], False, "", {}, call=("f", {"n": 2}))

    def call(name: str, arguments: str) -> dict[str, object]:
        return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}

    assert skills._is_call(case, answer("", tool_calls=[call("f", '{"n": 2}')]))
    assert not skills._is_call(case, answer("", tool_calls=[call("g", '{"n": 2}')]))
    assert not skills._is_call(case, answer("", tool_calls=[call("f", '{"n": "2"}')]))
    assert not skills._is_call(case, answer("", tool_calls=[call("f", '{"n": 2}')] * 2))
    assert not skills._is_call(case, answer("f(2)"))


def test_reasoning_must_end_before_the_answer() -> None:
    assert skills._well_formed(answer("5", reasoning_content="2 + 3"))
    assert not skills._well_formed(answer("", reasoning_content="2 + 3 = 5"))
    assert not skills._well_formed(answer("5"))
    assert not skills._well_formed(answer("5</think>", reasoning_content="2 + 3"))
    assert not skills._well_formed(answer("5", ended=False, reasoning_content="2 + 3"))


def test_a_lower_loss_meets_the_target() -> None:
    assert skills.SkillResult("loss", 0.5, 1.0, "nats", 1, lower_is_better=True).met
    assert not skills.SkillResult("recall", 0.5, 1.0, "share", 1).met


def test_the_prompt_of_a_case_ends_where_the_answer_begins() -> None:
    case = tasks.addition_case(Random(1), thinking=True)
    assert chat.render(case.messages, True).endswith("<think>")
