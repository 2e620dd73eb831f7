"""A sentencepiece model as bare lists of pieces, as GGUF files carry it, and back.

Only what decides how text is split goes along: pieces, scores, kinds, and whether a text begins
with a space. Source: sentencepiece_model.proto; numbers of kinds are the same in ggml.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds4py.errors import TokenizerError

UNKNOWN, BYTE = 2, 6
BPE = 2
"""The one model type whose merges follow from the scores alone."""

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_NAME, _PREFIX, _COLLAPSE = 1, 3, 4


@dataclass(frozen=True)
class Pieces:
    """A BPE model of sentencepiece as lists by id."""

    texts: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    adds_prefix: bool
    """Whether the model was trained with a space before every text."""


def read_pieces(path: Path) -> Pieces:
    """The lists of a tokenizer.model. Raises TokenizerError when it is not a BPE."""
    texts, scores, kinds = [], [], []
    settings = {_TRAINER: {_MODEL_TYPE: 1}, _NORMALIZER: {_PREFIX: 1}}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == _PIECE:
                numbers, strings = _sorted_fields(value)
                texts.append(strings.get(1, b"").decode())
                scores.append(struct.unpack("<f", strings.get(2, b"\0\0\0\0"))[0])
                kinds.append(numbers.get(3, 1))
            elif number in settings:
                settings[number] |= _sorted_fields(value)[0]
    except (OSError, ValueError, IndexError, struct.error) as exc:
        raise TokenizerError(f"{path} is not a sentencepiece model ({exc!r})") from exc
    if settings[_TRAINER][_MODEL_TYPE] != BPE:
        raise TokenizerError(
            f"{path} is a sentencepiece model of type {settings[_TRAINER][_MODEL_TYPE]}; only a "
            f"BPE ({BPE}) can be written as pieces and scores"
        )
    return Pieces(texts, scores, kinds, bool(settings[_NORMALIZER][_PREFIX]))


def model_bytes(pieces: Pieces, origin: str) -> bytes:
    """The lists as a tokenizer.model. origin: what to name in errors. Raises TokenizerError."""
    counts = {len(pieces.texts), len(pieces.scores), len(pieces.kinds)}
    unknown = [i for i, kind in enumerate(pieces.kinds) if kind == UNKNOWN]
    if len(counts) > 1 or len(unknown) != 1:
        raise TokenizerError(
            f"{origin} has {len(pieces.texts)} tokens, {len(pieces.scores)} scores, "
            f"{len(pieces.kinds)} types and {len(unknown)} unknown tokens; need as many of each, "
            "and one unknown token"
        )
    parts = [
        _field(_PIECE, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, k))
        for text, score, k in zip(pieces.texts, pieces.scores, pieces.kinds, strict=True)
    ]
    trainer = _field(_MODEL_TYPE, BPE) + _field(_BYTE_FALLBACK, int(BYTE in pieces.kinds))
    normalizer = _field(_NAME, b"identity") + _field(_PREFIX, int(pieces.adds_prefix))
    normalizer += _field(_COLLAPSE, 0)
    return b"".join([*parts, _field(_TRAINER, trainer), _field(_NORMALIZER, normalizer)])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of a protobuf message. Raises ValueError or IndexError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes in {len(data) - at}")
        yield key >> 3, data[at : at + size]
        at += size


def _sorted_fields(data: int | bytes) -> tuple[dict[int, int], dict[int, bytes]]:
    """The fields of a message inside another, by number: whole numbers, everything else."""
    if isinstance(data, int):
        raise ValueError("a number in place of a message")
    numbers: dict[int, int] = {}
    strings: dict[int, bytes] = {}
    for number, value in _fields(data):
        if isinstance(value, int):
            numbers[number] = value
        else:
            strings[number] = value
    return numbers, strings


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number without end")


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _encoded(number << 3 | 2) + _encoded(len(value)) + value
    return _encoded(number << 3) + _encoded(value)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
