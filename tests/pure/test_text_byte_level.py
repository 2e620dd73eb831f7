"""The tokenizer made from bare lists, as GGUF files carry them, against the one of tokenizer.json.

The cuts are those of DeepSeek's tokenizer.json, so a tokenizer.json with them must give the same
ids; where text is cut is also compared with cuts made by hand.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from ds4py.errors import PromptError, TokenizerError
from ds4py.formats.gguf import GGUF
from ds4py.text.byte_level import (
    CONTROL,
    CUTS,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    ByteLevelTokenizer,
    Vocabulary,
    read_vocabulary,
)
from ds4py.text.messages import BOS, CONTROL_TOKENS, EOS, Segment
from ds4py.text.tokenizer import Tokenizer, load
from ds4py.weights.gguf_tokenizer import fields_beside, tokenizer_of

CORPUS = [
    "the quick brown fox 1234567 jumps, over the <think> lazy dog.\n\n  def f(x):\n\treturn 12",
    "日本語のテキスト 今日は良い天気です。 Привет мир! naïve café 😀😀 a+b=c; $x_1 ~!",
] * 9


def deepseek_json(path: Path) -> Path:
    """A small tokenizer.json with DeepSeek's cuts; one token special, the others merely added."""
    library = tokenizers.Tokenizer(models.BPE())
    cuts = [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in CUTS]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([*cuts, last])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens(
        [tokenizers.AddedToken(t, special=False, normalized=False) for t in CONTROL_TOKENS[2:]]
    )
    library.save(str(path))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = read_vocabulary(deepseek_json(folder / "tokenizer.json"))
    return ByteLevelTokenizer(vocabulary, 0, 1, "the file"), load(folder)


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20) | st.lists(
    st.sampled_from(
        [*CONTROL_TOKENS, " ", "  ", "\r\n", "\n", "\t", "12", "345", "the", "$x", "日"]
    ),
    max_size=10,
).map("".join)


@given(text=texts)
def test_ids_are_those_of_the_json_file(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    own, from_json = both
    ids = own.encode(text)
    assert ids == from_json.encode(text)
    assert own.decode(ids) == text and not any(map(own.is_control, ids))
    after = [Segment("<｜User｜>", control=True), Segment(text)]
    assert own.encode(after) == from_json.encode(after)


def test_tokens_are_those_of_the_json_file(both: tuple[Tokenizer, Tokenizer]) -> None:
    own, from_json = both
    assert (own.vocab_size, own.bos_id, own.eos_id) == (from_json.vocab_size, 0, 1)
    for token_id in range(-1, own.vocab_size + 1):
        assert own.piece(token_id) == from_json.piece(token_id)
        assert own.is_control(token_id) == from_json.is_control(token_id)
    for text in CONTROL_TOKENS:
        assert own.control_id(text) == from_json.control_id(text) is not None
    with pytest.raises(PromptError, match="character 1"):
        own.encode("a\ud800")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("12345678", ["123", "456", "78"]),
        ("x1y22", ["x", "1", "y", "22"]),
        ("今日abc", ["今日", "abc"]),
        ("カナひら漢字", ["カナひら漢字"]),
        ("it's $HOME", ["it", "'s", " $", "HOME"]),
        ("it's\t$HOME", ["it", "'s", "\t", "$HOME"]),
        (" hello world", [" hello", " world"]),
        ("a  b", ["a", " ", " b"]),
        ("end.\n\nNew", ["end", ".\n\n", "New"]),
        ("line \n x", ["line", " \n", " x"]),
        ("tail  ", ["tail", "  "]),
        ("naïve café", ["naïve", " café"]),
        ("a ++ b", ["a", " ++", " b"]),
        ("😀😀!", ["😀😀!"]),
    ],
)
def test_cuts_made_by_hand(text: str, pieces: list[str]) -> None:
    cuts = [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in CUTS]
    found = pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)
    assert [piece for piece, _ in found] == pieces


def test_the_edges_of_the_han_and_kana_run() -> None:
    """First and last of the three ranges stand by themselves, their neighbours are letters."""
    cuts = [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in CUTS]
    sequence = pre_tokenizers.Sequence(cuts)
    for code in (0x4E00, 0x9FA5, 0x3041, 0x309F, 0x30A1, 0x30FF):
        found = sequence.pre_tokenize_str(f"a{chr(code)}b")
        assert [piece for piece, _ in found] == ["a", chr(code), "b"]
    for code in (0x9FA6, 0x3105, 0x4DBF):
        assert len(sequence.pre_tokenize_str(f"a{chr(code)}b")) == 1


def small() -> Vocabulary:
    """All bytes, one merge, two control tokens, one unused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [BOS, EOS, *alphabet, "ab", "[PAD]", "<think>"]
    kinds = [CONTROL] * 2 + [NORMAL] * 257 + [UNUSED, USER_DEFINED]
    return Vocabulary(tokens, ["a b"], kinds)


def test_kinds_of_tokens() -> None:
    tokenizer = ByteLevelTokenizer(small(), 0, 1, "the file")
    assert tokenizer.vocab_size == 261
    (ab,) = tokenizer.encode("ab")
    assert tokenizer.piece(ab) == b"ab"
    assert tokenizer.piece(259) == b"" and tokenizer.piece(260) == b"<think>"
    assert [tokenizer.is_control(i) for i in (0, 1, 2, 259, 260)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    guessed = ByteLevelTokenizer(replace(small(), kinds=None), 0, 1, "the file")
    assert [guessed.is_control(i) for i in (0, 1, 2, 260)] == [True, True, False, True]
    assert guessed.encode("ab <think>") == tokenizer.encode("ab <think>")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda v: replace(v, merges=["ab"]), "merge 0 is 'ab'"),
        (lambda v: replace(v, merges=["a b", "a b c"]), "merge 1 is 'a b c'"),
        (lambda v: replace(v, merges=[" b"]), "merge 0 is ' b'"),
        (lambda v: replace(v, merges=["b a"]), "merge 0 is 'b' with 'a'"),
        (lambda v: replace(v, tokens=[*v.tokens, "ab"], kinds=[*v.kinds, NORMAL]), "'ab' twice"),
        (lambda v: replace(v, tokens=[*v.tokens, BOS], kinds=[*v.kinds, CONTROL]), "twice"),
        (lambda v: replace(v, kinds=v.kinds[:-1]), "261 tokens but 260 token types"),
        (
            lambda v: replace(v, tokens=["x" if t == "a" else t for t in v.tokens]),
            r"'x' twice|no token for 1 of the 256 bytes \(0x61",
        ),
        (lambda v: replace(v, kinds=[NORMAL] * 2 + list(v.kinds[2:])), "bos is token 0"),
        (lambda v: Vocabulary([], []), "no token for 256 of the 256 bytes"),
    ],
)
def test_lists_that_make_no_tokenizer(edit: Any, says: str) -> None:
    with pytest.raises(TokenizerError, match=says) as caught:
        ByteLevelTokenizer(edit(small()), 0, 1, "the file")
    assert "the file" in str(caught.value) and "\n" not in str(caught.value)


def changed(path: Path, edit: Any) -> Path:
    description = json.loads(deepseek_json(path).read_text())
    edit(description)
    path.write_text(json.dumps(description))
    return path


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["pre_tokenizer"]["pretokenizers"].pop(0), "does not cut text"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(invert=True), "does not cut text"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"][-1].update(use_regex=True), "does not cut"),
        (lambda d: d.update(pre_tokenizer=None), "does not cut text"),
        (lambda d: d.update(normalizer={"type": "NFC"}), "does not cut text"),
        (lambda d: d["model"].update(type="Unigram"), "does not cut text"),
        (lambda d: d["model"].pop("merges"), "not a tokenizer.json of a BPE"),
        (lambda d: d.pop("added_tokens"), "not a tokenizer.json of a BPE"),
    ],
)
def test_other_json_files_are_refused(tmp_path: Path, edit: Any, says: str) -> None:
    with pytest.raises(TokenizerError, match=says):
        read_vocabulary(changed(tmp_path / "tokenizer.json", edit))


def test_merges_may_be_pairs_and_ids_may_have_gaps(tmp_path: Path) -> None:
    def edit(description: dict[str, Any]) -> None:
        pairs = [m.split(" ") if isinstance(m, str) else m for m in description["model"]["merges"]]
        description["model"]["merges"] = pairs
        description["added_tokens"][-1]["id"] += 3

    path = changed(tmp_path / "tokenizer.json", edit)
    vocabulary = read_vocabulary(path)
    assert vocabulary.kinds is not None and list(vocabulary.kinds).count(UNUSED) == 3
    own = ByteLevelTokenizer(vocabulary, 0, 1, "the file")
    text = "the quick 日本語 1234"
    assert own.encode(text) == load(tmp_path).encode(text)


def test_through_the_metadata_of_a_gguf_file(tmp_path: Path) -> None:
    deepseek_json(tmp_path / "tokenizer.json")
    original = load(tmp_path)
    size = original.vocab_size + 3
    file = GGUF(Path("m.gguf"), 3, 32, fields_beside(tmp_path, size, 0, 1), {})
    found = tokenizer_of(file, size, 0, 1)
    text = "the quick 日本語 1234 <think>"
    assert found.encode(text) == original.encode(text)
    assert found.vocab_size == size and found.piece(size - 1) == b""
