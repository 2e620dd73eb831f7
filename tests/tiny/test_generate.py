"""The embedded model speaks: text, stop strings, turns that reuse what was read."""


import numpy as np
import pytest

from ds4py import Engine, EngineOptions, SamplingOptions, Session
from ds4py.text import chat
from ds4py.text.tokenizer import Tokenizer

GREEDY = SamplingOptions(temperature=0, max_tokens=40)
QUESTION = [{"role": "user", "content": "Tell me a story about a dog."}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open("tiny")


@pytest.fixture
def tokenizer(engine: Engine) -> Tokenizer:
    assert engine.tokenizer is not None
    return engine.tokenizer


def asked(engine: Engine, tokenizer: Tokenizer) -> Session:
    session = engine.session()
    session.sync(tokenizer.encode(chat.segments(QUESTION, thinking=False)))
    return session


def test_text_is_what_the_tokens_decode_to(engine: Engine, tokenizer: Tokenizer) -> None:
    session = asked(engine, tokenizer)
    tokens = list(session.generate(GREEDY))
    ids = [token.id for token in tokens]
    if ids[-1] == engine.config.eos_token_id:
        ids.pop()
    text = "".join(token.text for token in tokens)
    assert text == tokenizer.decode(ids)
    assert len(text) > 20
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)


def test_stop_strings_end_inside_and_across_tokens(engine: Engine, tokenizer: Tokenizer) -> None:
    whole = "".join(token.text for token in asked(engine, tokenizer).generate(GREEDY))
    for start, end in ((3, 5), (7, 14), (0, 2), (len(whole) // 2, len(whole) // 2 + 9)):
        stop = whole[start:end]
        options = SamplingOptions(temperature=0, max_tokens=40, stop=("never", stop))
        tokens = list(asked(engine, tokenizer).generate(options))
        assert "".join(token.text for token in tokens) == whole[: whole.find(stop)]
        assert tokens[-1].finish_reason == "stop"


def test_next_turn_reads_only_what_is_new(engine: Engine, tokenizer: Tokenizer) -> None:
    session = asked(engine, tokenizer)
    answer = "".join(token.text for token in session.generate(GREEDY))
    held = session.position
    history = [*QUESTION, {"role": "assistant", "content": answer}]
    history.append({"role": "user", "content": "What is 12 + 13?"})
    prompt = tokenizer.encode(chat.segments(history, thinking=False))
    reused = session.sync(prompt)
    assert reused >= min(held, len(prompt)) - 128  # at worst back to the last checkpoint
    np.testing.assert_array_equal(session.logits(), engine.score(prompt)[-1])


def test_steps_of_the_shipped_model_agree(engine: Engine) -> None:
    """Decode = prefill = chunks on real weights, across the window and a row of every kind."""
    ids = [int(t) for t in np.random.default_rng(0).integers(0, engine.config.vocab_size, 300)]
    whole = engine.score(ids)
    for chunks in ([126, *[1] * 10, 164], [1, 2, 3, 60, 65, 169]):
        np.testing.assert_array_equal(engine.score(ids, chunks), whole)


def test_numpy_and_mlx_agree_on_the_shipped_model(engine: Engine) -> None:
    ids = [int(t) for t in np.random.default_rng(1).integers(0, engine.config.vocab_size, 60)]
    options = EngineOptions(kernels="reference", trained_rounding=False)
    reference = Engine.open("tiny", options).score(ids)
    exact = Engine.open("tiny", EngineOptions(dtype="float32", trained_rounding=False)).score(ids)
    fast = Engine.open("tiny", EngineOptions(trained_rounding=False)).score(ids)
    assert np.abs(reference - exact).max() < 1e-3
    assert np.abs(fast - exact).max() < 1e-3
