"""Text <-> token ids, from tokenizer.json (HF tokenizers) or tokenizer.model (sentencepiece).

Control tokens come from control segments only: the libraries never see one, and text that spells
one is encoded as the characters it is. Text is encoded as it would be inside the whole prompt,
and decoding goes through bytes, so that any cut of the tokens gives the same text. Knows nothing
of messages; a tokenizer is loaded once and holds no state.
"""

import functools
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds4py.errors import PromptError, TokenizerError
from ds4py.text.messages import BOS, CONTROL_TOKENS, EOS, Segment

SPACE = "▁"
"""How sentencepiece writes a space inside a piece."""


class Tokenizer(ABC):
    """What both kinds have in common. `vocab_size`: one more than the highest id."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def __init__(self, controls: Mapping[str, int], unknown_id: int | None) -> None:
        """controls: text -> id of every control token. unknown_id: what unknown text becomes."""
        self._controls = dict(controls)
        self._control_text = {token_id: text for text, token_id in controls.items()}
        self._forbidden = set(self._control_text) - {unknown_id}
        spelled = sorted(self._controls, key=len, reverse=True)
        self._spelling = re.compile("|".join(re.escape(text) for text in spelled) or r"(?!)")
        self._pieces: dict[int, bytes] = {}

    def encode(self, prompt: str | Sequence[Segment]) -> list[int]:
        """Token ids of a prompt; plain text never gives a control token.

        Raises TokenizerError for a control segment without a token, PromptError for text that is
        not Unicode (half a surrogate pair).
        """
        segments = [Segment(prompt)] if isinstance(prompt, str) else prompt
        ids: list[int] = []
        for position, (text, control, tokens) in enumerate(segments):
            if tokens:
                ids += tokens
            elif not control:
                ids += self._plain_ids(text, first=position == 0)
            elif text in self._controls:
                ids.append(self._controls[text])
            else:
                raise TokenizerError(
                    f"the tokenizer has no token {text!r}, which this prompt needs; "
                    "use the tokenizer files of a DeepSeek V4 model."
                )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of whole token sequences; invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.piece(token_id) for token_id in ids).decode("utf-8", "replace")

    def piece(self, token_id: int) -> bytes:
        """The bytes a token adds to the output; a control token its own text, an unused id none."""
        piece = self._pieces.get(token_id)
        if piece is None:
            control = self._control_text.get(token_id)
            piece = self._piece(token_id) if control is None else control.encode()
            self._pieces[token_id] = piece
        return piece

    def is_control(self, token_id: int) -> bool:
        """Whether only a control segment gives this token."""
        return token_id in self._control_text

    def control_id(self, text: str) -> int | None:
        """The id of a control token, None if there is none of that text."""
        return self._controls.get(text)

    @abstractmethod
    def _encode(self, text: str, first: bool) -> list[int]:
        """Ids of text that is not empty; first: it begins the prompt."""

    @abstractmethod
    def _piece(self, token_id: int) -> bytes:
        """Bytes of a token that is no control token."""

    def _plain_ids(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        try:
            ids = self._encode(text, first)
        except UnicodeEncodeError as exc:
            raise PromptError(
                f"the text is not Unicode at character {exc.start}: half a surrogate pair."
            ) from exc
        if self._forbidden.isdisjoint(ids):
            return ids
        # The library matches this spelling by itself: let it see the two ends apart.
        cuts = [found.start() + 1 for found in self._spelling.finditer(text)]
        cuts = [cut for cut in cuts if cut < len(text)] or list(range(1, len(text)))
        if not cuts:
            raise PromptError(f"the tokenizer has no plain token for {text!r}; leave it out.")
        edges = [0, *cuts, len(text)]
        ids = []
        for start, end in itertools.pairwise(edges):
            ids += self._plain_ids(text[start:end], first and start == 0)
        return ids


class JsonTokenizer(Tokenizer):
    """tokenizer.json. Every added token is a control token, be it marked special or not."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        description = _read_json(path)
        try:
            added = {entry["content"]: int(entry["id"]) for entry in description["added_tokens"]}
            model = description["model"]
            text_only = {
                **description,
                "added_tokens": [],
                "post_processor": None,
                "truncation": None,
                "padding": None,
            }
            self._text = tokenizers.Tokenizer.from_str(json.dumps(text_only))
        except Exception as exc:  # the library raises Exception itself
            raise TokenizerError(
                f"{path} is not a tokenizer.json that can be used ({exc}); fetch it again."
            ) from exc
        self._byte_level = _uses(description, "ByteLevel")
        if not self._byte_level and not _uses(description, "Metaspace", "ByteFallback"):
            raise TokenizerError(
                f"{path} is neither byte-level nor made of {SPACE} pieces; need one of the two."
            )
        ids = [*self._text.get_vocab().values(), *added.values()]
        self.vocab_size = max(ids, default=-1) + 1
        unknown = model.get("unk_token")
        super().__init__(added, self._text.token_to_id(unknown) if unknown else None)
        ends = _Ends(path.parent, self.control_id, self.vocab_size)
        self.bos_id, self.eos_id = ends.find("bos", BOS, "<s>"), ends.find("eos", EOS, "</s>")

    def _encode(self, text: str, first: bool) -> list[int]:
        text.encode()  # the library reports half a surrogate pair as a TypeError
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids

    def _piece(self, token_id: int) -> bytes:
        token = self._text.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            return b""
        return byte_level_piece(token) if self._byte_level else _spaced_piece(token)


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model. Control tokens are its control pieces, and V4's own however it has them.

    White space is kept as it is whatever the model's normaliser says. A space before the text is
    added only where the model was trained so, and only at the very start of a prompt.
    """

    # The format (protobuf) lets a later copy of a field override an earlier one, so appending to
    # the file changes the normaliser: no collapsing of white space, no space before the text.
    _KEEP_SPACES = b"\x1a\x02\x20\x00"
    _NO_PREFIX = b"\x1a\x02\x18\x00"

    def __init__(
        self, path: Path, model: bytes | None = None, ends: tuple[int, int] | None = None
    ) -> None:
        """path: the file, or what `model` came from. ends: ids of BOS and EOS, if known."""
        import sentencepiece

        try:
            model = path.read_bytes() if model is None else model
            if not model:
                raise ValueError("the file is empty")
            load = sentencepiece.SentencePieceProcessor
            self._first = load(model_proto=model + self._KEEP_SPACES)
            self._later = load(model_proto=model + self._KEEP_SPACES + self._NO_PREFIX)
        except Exception as exc:  # RuntimeError, OSError, ValueError, by the kind of damage
            raise TokenizerError(
                f"{path} is not a sentencepiece model that can be used ({exc}); fetch it again."
            ) from exc
        processor = self._later
        self.vocab_size = processor.get_piece_size()
        everything = range(self.vocab_size)
        texts = {token_id: processor.id_to_piece(token_id) for token_id in everything}
        controls = {
            text: token_id
            for token_id, text in texts.items()
            if processor.is_control(token_id) or text in CONTROL_TOKENS
        }
        self._bytes = {
            int(texts[token_id][3:5], 16): token_id
            for token_id in everything
            if processor.is_byte(token_id)
        }
        super().__init__(controls, processor.unk_id())
        self._adds_prefix = self._first.encode("a") != self._later.encode("a")
        if ends is not None:
            self.bos_id, self.eos_id = ends
            return
        beside = _Ends(path.parent, self.control_id, self.vocab_size)
        self.bos_id = beside.find("bos", BOS, "<s>", own=processor.bos_id())
        self.eos_id = beside.find("eos", EOS, "</s>", own=processor.eos_id())

    def decode(self, ids: Iterable[int]) -> str:
        """As above; the space that the model adds at the start of a text is left out."""
        ids = list(ids)
        text = super().decode(ids)
        added = self._adds_prefix and ids and not self.is_control(ids[0])
        return text.removeprefix(" ") if added else text

    def _encode(self, text: str, first: bool) -> list[int]:
        text.encode()
        processor = self._first if first else self._later
        if SPACE not in text or len(self._bytes) < 256:
            return list(processor.encode(text))
        # The library would read this character as a space: write its bytes.
        ids: list[int] = []
        for position, part in enumerate(text.split(SPACE)):
            if position:
                ids += [self._bytes[byte] for byte in SPACE.encode()]
                processor = self._later
            if part:
                ids += processor.encode(part)
        return ids

    def _piece(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size or self._later.is_unused(token_id):
            return b""
        if self._later.is_unknown(token_id):
            return "\N{REPLACEMENT CHARACTER}".encode()
        return _spaced_piece(self._later.id_to_piece(token_id))


def load(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory: tokenizer.json, else tokenizer.model.

    Raises TokenizerError when there is neither or the file is damaged.
    """
    for name, kind in (
        ("tokenizer.json", JsonTokenizer),
        ("tokenizer.model", SentencePieceTokenizer),
    ):
        path = Path(directory) / name
        if path.is_file():
            return kind(path)
    raise TokenizerError(
        f"{directory} has no tokenizer.json and no tokenizer.model; copy the model's tokenizer "
        "file there."
    )


class _Ends:
    """Finds the tokens that begin and end a text, from the files beside the tokenizer."""

    def __init__(self, directory: Path, control_id: Any, vocab_size: int) -> None:
        self._control_id = control_id
        self._vocab_size = vocab_size
        self._tokens = _read_json(directory / "tokenizer_config.json", optional=True)
        self._config = _read_json(directory / "config.json", optional=True)

    def find(self, kind: str, *names: str, own: int = -1) -> int:
        """kind: "bos" or "eos"; names: usual texts of it; own: what the tokenizer file says."""
        token = self._tokens.get(f"{kind}_token")
        named = token.get("content") if isinstance(token, dict) else token
        configured = self._config.get(f"{kind}_token_id")
        if isinstance(configured, list) and configured:
            configured = configured[0]
        candidates = [self._control_id(named), configured]
        candidates += [self._control_id(name) for name in names] + [own]
        for candidate in candidates:
            if type(candidate) is int and 0 <= candidate < self._vocab_size:
                return candidate
        raise TokenizerError(
            f"the tokenizer has no {kind} token ({' or '.join(names)}); name it as "
            f"{kind}_token in tokenizer_config.json."
        )


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise TokenizerError(f"{path} cannot be read as JSON ({exc}); fetch it again.") from exc
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} is JSON but no object; fetch it again.")
    return value


def _uses(description: dict[str, Any], *kinds: str) -> bool:
    """Whether tokenizer.json has a step of one of these types, at any depth."""
    steps = [description.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            if step.get("type") in kinds:
                return True
            steps += step.values()
        elif isinstance(step, list):
            steps += step
    return False


def _spaced_piece(piece: str) -> bytes:
    """Bytes of a sentencepiece piece: <0xNN> is one byte, SPACE a space."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()


def byte_level_piece(token: str) -> bytes:
    """Bytes of a token of byte-level BPE; what its alphabet lacks stands for itself."""
    alphabet = byte_alphabet()
    return b"".join(bytes([alphabet[c]]) if c in alphabet else c.encode() for c in token)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level BPE (GPT-2) writes bytes: printable ones stand for
    themselves, the others for 256, 257, ... in order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + position): byte for position, byte in enumerate(others)}
