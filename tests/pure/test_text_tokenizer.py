"""Both tokenizers on small ones made here: exact round trips, and text that stays text."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ds4py.errors import PromptError, TokenizerError
from ds4py.text import chat
from ds4py.text.detokenizer import Detokenizer
from ds4py.text.messages import BOS, CONTROL_TOKENS, EOS, Segment
from ds4py.text.tokenizer import Tokenizer, load

CORPUS = [
    "the quick <think> brown fox </think>",
    "Hello  world, DSML | 123",
    "def f(x):\n    x",
] * 9
OTHERS = [token for token in CONTROL_TOKENS if token not in (BOS, EOS)]


def hf_tokenizer(special: bool = True, in_vocabulary: bool = True) -> tokenizers.Tokenizer:
    """Byte-level BPE like DeepSeek's: control tokens added on top, or part of the vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(CONTROL_TOKENS) if in_vocabulary else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [tokenizers.AddedToken(t, special=special, normalized=False) for t in CONTROL_TOKENS]
    )
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    return tokenizer


def sentencepiece_model(**settings: Any) -> bytes:
    """A model with byte fallback that keeps white space, unless `settings` say otherwise."""
    model = io.BytesIO()
    defaults: dict[str, Any] = {
        "vocab_size": 400,
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "control_symbols": OTHERS,
        "bos_piece": BOS,
        "eos_piece": EOS,
        "bos_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **(defaults | settings)
    )
    return model.getvalue()


KINDS = {
    "json": {},
    "json, not special": {"special": False},
    "json, added on top": {"special": False, "in_vocabulary": False},
    "model": {},
    "model, user symbols": {"control_symbols": [], "user_defined_symbols": OTHERS},
    "model, prefix, user symbols": {
        "add_dummy_prefix": True,
        "control_symbols": [],
        "user_defined_symbols": OTHERS,
    },
    "model, prefix": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
}


def write(directory: Path, kind: str) -> Path:
    if kind.startswith("json"):
        hf_tokenizer(**KINDS[kind]).save(str(directory / "tokenizer.json"))
    else:
        (directory / "tokenizer.model").write_bytes(sentencepiece_model(**KINDS[kind]))
    return directory


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    return load(write(tmp_path_factory.mktemp("tokenizer"), request.param))


texts = st.text(st.characters(blacklist_categories=["Cs"]), max_size=15) | st.lists(
    st.sampled_from([*CONTROL_TOKENS, " ", "  ", "▁", "\n", "a", "the", "<0x41>", "<", "th", "日"]),
    max_size=8,
).map("".join)


@given(text=texts)
def test_text_comes_back_and_stays_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not any(tokenizer.is_control(token_id) for token_id in ids)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    assert tokenizer.decode(ids) == text


@given(text=texts)
def test_text_after_a_control_token_gains_nothing(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode([Segment("<｜User｜>", control=True), Segment(text)])
    assert ids[0] == tokenizer.control_id("<｜User｜>")
    assert not any(tokenizer.is_control(token_id) for token_id in ids[1:])
    detokenizer = Detokenizer(tokenizer)
    pushed = "".join(detokenizer.push(token_id) for token_id in ids[1:]) + detokenizer.flush()
    assert pushed == text
    assert tokenizer.decode(ids) == "<｜User｜>" + text


def test_control_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == tuple(map(tokenizer.control_id, (BOS, EOS)))
    for token in CONTROL_TOKENS:
        (token_id,) = tokenizer.encode([Segment(token, control=True)])
        assert token_id == tokenizer.control_id(token)
        assert tokenizer.is_control(token_id)
        assert tokenizer.piece(token_id) == token.encode()
    assert tokenizer.control_id("the") is None
    assert tokenizer.encode("") == tokenizer.encode([]) == []
    assert tokenizer.piece(tokenizer.vocab_size) == tokenizer.piece(-1) == b""
    with pytest.raises(TokenizerError, match="no token '<nothing>'"):
        tokenizer.encode([Segment("<nothing>", control=True)])
    with pytest.raises(PromptError, match="character 1"):
        tokenizer.encode("a\ud800")


CONVERSATION = [
    {"role": "system", "content": "Be  12.\n", "tools": [{"function": {"name": "the"}}]},
    {"role": "user", "content": " Hello world\n"},
    {
        "role": "assistant",
        "reasoning_content": "so ",
        "content": " fox",
        "tool_calls": [{"function": {"name": "the", "arguments": '{"x": "a b", "y": [1]}'}}],
    },
    {"role": "tool", "content": " done"},
]


@pytest.mark.parametrize("kind", ["json", "json, added on top"])
def test_segments_give_the_ids_of_the_whole_string(tmp_path: Path, kind: str) -> None:
    tokenizer, whole = load(write(tmp_path, kind)), hf_tokenizer(**KINDS[kind])
    ids = whole.encode(chat.render(CONVERSATION), add_special_tokens=False).ids
    assert tokenizer.encode(chat.segments(CONVERSATION)) == ids


def test_text_that_spells_a_token_is_cut_like_any_text(tmp_path: Path) -> None:
    description = json.loads(hf_tokenizer(in_vocabulary=False).to_str())
    description |= {"added_tokens": [], "post_processor": None}
    plain = tokenizers.Tokenizer.from_str(json.dumps(description))
    text = "say <think> and </think> and ｜DSML｜"
    assert load(write(tmp_path, "json, added on top")).encode(text) == plain.encode(text).ids


def test_segments_give_the_ids_of_the_whole_string_in_sentencepiece(tmp_path: Path) -> None:
    """Only user symbols are matched inside a string; BOS, a control piece, is left out of it."""
    tokenizer = load(write(tmp_path, "model, user symbols"))
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    bos, *segments = [s for s in chat.segments(CONVERSATION) if s.text != EOS]
    ids = whole.encode("".join(s.text for s in segments))
    assert tokenizer.encode([bos, *segments]) == [tokenizer.bos_id, *ids]


def test_a_prefix_space_stands_only_where_the_model_was_trained_so(tmp_path: Path) -> None:
    tokenizer = load(write(tmp_path, "model, prefix"))
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert tokenizer.encode("the fox") == whole.encode("the fox")
    assert tokenizer.piece(tokenizer.encode("the")[0]) == b" the"
    after = tokenizer.encode([Segment(BOS, control=True), Segment("the")])
    assert b"".join(map(tokenizer.piece, after[1:])) == b"the"


def test_pieces_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for directory, kind in (("a", "json"), ("b", "model")):
        tokenizer = load(write(tmp_path / directory, kind))
        found = {tokenizer.piece(token_id) for token_id in range(tokenizer.vocab_size)}
        assert {bytes([byte]) for byte in range(256)} <= found
        assert b" quick" in found or b"quick" in found


def test_tokenizer_json_comes_first(tmp_path: Path) -> None:
    write(tmp_path, "json")
    write(tmp_path, "model")
    assert type(load(tmp_path)).__name__ == "JsonTokenizer"


def test_ends_are_found_by_name_or_number(tmp_path: Path) -> None:
    write(tmp_path, "json")
    tokenizer = load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 5, "eos_token_id": [7, 8]}))
    assert (load(tmp_path).bos_id, load(tmp_path).eos_id) == (5, 7)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<think>"}, "eos_token": "<｜User｜>"})
    )
    named = load(tmp_path)
    assert named.bos_id == tokenizer.control_id("<think>")
    assert named.eos_id == tokenizer.control_id("<｜User｜>")


def without_ends(tmp_path: Path) -> None:
    model = json.loads(hf_tokenizer(in_vocabulary=False).to_str())
    model["added_tokens"] = [t for t in model["added_tokens"] if t["content"] not in (BOS, EOS)]
    model["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))


def not_bytes(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.save(str(tmp_path / "tokenizer.json"))


def file(name: str, content: bytes) -> Any:
    return lambda directory: (directory / name).write_bytes(content)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda directory: None, "no tokenizer.json and no tokenizer.model"),
        (file("tokenizer.json", b""), "cannot be read as JSON"),
        (file("tokenizer.json", b"\xff\xfe"), "cannot be read as JSON"),
        (file("tokenizer.json", b"[]"), "no object"),
        (file("tokenizer.json", b"{}"), "is not a tokenizer.json"),
        (
            file("tokenizer.json", b'{"added_tokens": [], "model": {"type": "X"}}'),
            "is not a tokenizer.json",
        ),
        (file("tokenizer.model", b""), "empty"),
        (file("tokenizer.model", b"not a model"), "sentencepiece"),
        (file("tokenizer.model", sentencepiece_model()[:-500]), "sentencepiece"),
        (without_ends, "no bos token"),
        (not_bytes, "neither byte-level"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, make: Any, says: str) -> None:
    make(tmp_path)
    with pytest.raises(TokenizerError, match=says):
        load(tmp_path)


class Bytes(Tokenizer):
    """A token is the bytes of its number: each id stands for one byte."""

    vocab_size, bos_id, eos_id = 256, 0, 0

    def __init__(self) -> None:
        super().__init__({}, None)

    def _encode(self, text: str, first: bool) -> list[int]:
        return list(text.encode())

    def _piece(self, token_id: int) -> bytes:
        return bytes([token_id])


@given(st.binary(max_size=30) | st.text(max_size=9).map(lambda t: t.encode("utf-8", "ignore")))
def test_detokenizer_equals_decoding_at_once(data: bytes) -> None:
    detokenizer = Detokenizer(Bytes())
    for _ in range(2):  # it may be used again
        text = "".join(detokenizer.push(byte) for byte in data) + detokenizer.flush()
        assert text == data.decode("utf-8", "replace") == Bytes().decode(data)


def test_detokenizer_holds_back_no_more_than_a_character() -> None:
    detokenizer = Detokenizer(Bytes())
    assert [detokenizer.push(byte) for byte in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert [detokenizer.push(byte) for byte in b"\xe2\x82a\xff"] == ["", "", "\ufffda", "\ufffd"]
    assert (detokenizer.push(0xE2), detokenizer.flush(), detokenizer.flush()) == ("", "\ufffd", "")
