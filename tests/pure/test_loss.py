"""Losses, divergences and their intervals, by hand arithmetic."""

import numpy as np

from ds4py import assets
from ds4py.eval import loss
from ds4py.eval.loss import Document
from ds4py.text import tokenizer as tokenizers

TWO = [Document((0, 1, 1), 1), Document((0, 0), 1)]


def test_loss_and_divergence() -> None:
    even, sure = np.zeros((2, 2), np.float32), np.array([[0, np.log(3)]], np.float32)
    found = [loss.log_probabilities(even), loss.log_probabilities(sure)]
    np.testing.assert_allclose(loss.losses(found, TWO), [2 * np.log(2), np.log(4)], rtol=1e-6)
    assert np.isclose(loss.per_token(loss.losses(found, TWO), TWO), np.log(16) / 3)
    moved = loss.divergences(found, [found[0], loss.log_probabilities(even[:1])])
    wanted = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)
    np.testing.assert_allclose(moved, [0, wanted], atol=1e-6)


def test_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    texts = [Document(tuple(range(11)), 1) for _ in range(200)]
    base = rng.normal(10, 5, 200)
    found = loss.difference(base + 1, base, texts)
    assert np.allclose((found.value, found.low, found.high), 0.1)
    noisy = loss.difference(base + rng.normal(1, 2, 200), base, texts)
    assert noisy.low < 0.1 < noisy.high
    assert np.isclose(noisy.high - noisy.low, 2 * 1.96 * 0.2 / np.sqrt(200), rtol=0.2)


def test_documents_end_with_what_is_predicted() -> None:
    tokenizer = tokenizers.load(assets.path("models", "tiny"))
    made = loss.documents(tokenizer, 3, seed=1)
    assert made == loss.documents(tokenizer, 3, seed=1) != loss.documents(tokenizer, 3, seed=2)
    assert len(made) == 15 and all(0 < text.first < len(text.ids) for text in made)
    assert all(text.ids[-1] == tokenizer.eos_id for text in made)
    assert tokenizer.decode(made[1].ids[made[1].first :]).count("=") == 1  # the sum
