"""A sentencepiece model survives the way through bare lists; what does not is refused."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from ds4py import assets
from ds4py.errors import TokenizerError
from ds4py.formats.gguf import GGUF, Field
from ds4py.text.messages import CONTROL_TOKENS, Segment
from ds4py.text.pieces import Pieces, model_bytes, read_pieces
from ds4py.text.tokenizer import Tokenizer, load
from ds4py.weights.gguf_tokenizer import fields_beside, tokenizer_of

TINY = assets.path("models", "tiny")


def in_gguf(**changes: Field) -> GGUF:
    metadata = fields_beside(TINY, 2048, 0, 1)
    metadata |= {f"tokenizer.ggml.{key}": field for key, field in changes.items()}
    return GGUF(Path("m.gguf"), 3, 32, metadata, {})


@pytest.fixture(scope="module")
def both() -> tuple[Tokenizer, Tokenizer]:
    return tokenizer_of(in_gguf(), load(TINY).vocab_size, 0, 1), load(TINY)


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=20) | st.lists(
    st.sampled_from([*CONTROL_TOKENS, " ", "  ", "▁", "\n", "fox", "tool", "12", "日", "<0x41>"]),
    max_size=10,
).map("".join)


@given(text=texts)
def test_ids_are_those_of_the_model(both: tuple[Tokenizer, Tokenizer], text: str) -> None:
    own, original = both
    assert own.encode(text) == original.encode(text)
    after = [Segment("<｜User｜>", control=True), Segment(text)]
    assert own.encode(after) == original.encode(after)


def test_tokens_are_those_of_the_model(both: tuple[Tokenizer, Tokenizer]) -> None:
    own, original = both
    assert (own.vocab_size, own.bos_id, own.eos_id) == (original.vocab_size, 0, 1)
    for token_id in range(-1, own.vocab_size + 1):
        assert own.piece(token_id) == original.piece(token_id)
        assert own.is_control(token_id) == original.is_control(token_id)


def train(path: Path, **settings: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox", "jumps over it"] * 9),
        model_writer=model,
        vocab_size=60,
        minloglevel=2,
        hard_vocab_limit=False,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.mark.parametrize("prefix", [True, False])
def test_lists_as_the_library_sees_them(tmp_path: Path, prefix: bool) -> None:
    path = train(tmp_path / "m.model", model_type="bpe", add_dummy_prefix=prefix)
    pieces = read_pieces(path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(library.get_piece_size())
    assert pieces.texts == [library.id_to_piece(i) for i in ids]
    assert pieces.scores == [library.get_score(i) for i in ids]
    assert pieces.adds_prefix is prefix
    again = sentencepiece.SentencePieceProcessor(model_proto=model_bytes(pieces, "it"))
    assert again.encode("the fox jumps") == library.encode("the fox jumps")


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="type 1; only a BPE"):
        read_pieces(train(tmp_path / "m.model", model_type="unigram"))


@given(st.binary(max_size=80))
def test_other_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "m.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=r"m\.model is "):
        read_pieces(path)


def test_every_truncation_is_refused_or_shorter(tmp_path: Path) -> None:
    whole = model_bytes(Pieces(["<unk>", "a", "b"], [0, 0, -1], [2, 1, 1], False), "it")
    path = tmp_path / "m.model"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with contextlib.suppress(TokenizerError):
            assert len(read_pieces(path).texts) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scores": Field("f32[]", [0.0])}, "2048 tokens, 1 scores, 2048 types"),
        ({"scores": Field("string", "x")}, "scores is a string"),
        ({"token_type": Field("i32[]", [1] * 2048)}, "0 unknown tokens"),
        ({"token_type": Field("f32[]", [1.0] * 2048)}, r"token_type is a f32\[\]"),
        ({"add_space_prefix": Field("u32", 1)}, "add_space_prefix is a u32"),
        ({"model": Field("string", "t5")}, "model is 't5'; need 'gpt2' or 'llama'"),
    ],
)
def test_lists_that_make_no_model(changes: dict[str, Field], says: str) -> None:
    with pytest.raises(TokenizerError, match=says) as caught:
        tokenizer_of(in_gguf(**changes), 2048, 0, 1)
    assert "m.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json and no tokenizer\.model"):
        fields_beside(tmp_path, 2048, 0, 1)
    file = in_gguf()
    short = replace(
        file, metadata={**file.metadata, "tokenizer.ggml.tokens": Field("string[]", [])}
    )
    with pytest.raises(TokenizerError, match="has 0 tokens"):
        tokenizer_of(short, 2048, 0, 1)


def test_a_vocabulary_larger_than_the_tokenizer() -> None:
    """Models round their vocabulary up; ids without a token get one that is never used."""
    file = GGUF(Path("m.gguf"), 3, 32, fields_beside(TINY, 2050, 0, 1), {})
    padded, original = tokenizer_of(file, 2050, 0, 1), load(TINY)
    assert (padded.vocab_size, padded.piece(2048), padded.piece(2049)) == (2050, b"", b"")
    text = "Anna had a [PAD2048] and a small dog."
    assert padded.encode(text) == original.encode(text)
    with pytest.raises(TokenizerError, match="has 2048 tokens; the model's vocabulary is 2047"):
        fields_beside(TINY, 2047, 0, 1)
