"""What lies at a path: DeepSeek's own layout, our bundle, or a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ds4py.config import ModelConfig
from ds4py.errors import WeightsError
from ds4py.formats import gguf
from ds4py.formats.gguf import GGUF
from ds4py.formats.safetensors import read_directory
from ds4py.text import tokenizer as tokenizers
from ds4py.text.tokenizer import Tokenizer
from ds4py.weights.apart import Apart
from ds4py.weights.bundle import Bundle, is_bundle
from ds4py.weights.checkpoint import Checkpoint, Progress
from ds4py.weights.gguf import GGUFCheckpoint
from ds4py.weights.gguf_config import config_of
from ds4py.weights.gguf_tokenizer import tokenizer_of
from ds4py.weights.source import Entry, Source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DRAFT_NAME = re.compile(r"(?i)\bmtp\b")
"""Names of GGUF files that hold an MTP layer alone, as in `DeepSeek-V4-Flash-MTP-Q4K.gguf`."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: its config, and ways to its tokenizer and weights."""

    path: Path
    """The directory, or the GGUF file."""
    config: ModelConfig
    gguf: GGUF | None = None
    draft: GGUF | None = None
    """A second GGUF file, with the MTP layer that the first has not."""

    @staticmethod
    def at(path: Path) -> ModelFiles:
        """A directory or GGUF file. Raises ConfigError, WeightsError."""
        found = path if path.is_file() else _gguf_in(path)
        if found is None:
            return ModelFiles(path, ModelConfig.load(path))
        header = gguf.read(found)
        return ModelFiles(found, config_of(header), header, _draft_beside(header))

    def tokenizer(self) -> Tokenizer | None:
        """None when a directory has none. Raises TokenizerError."""
        c = self.config
        if self.gguf is not None:
            return tokenizer_of(self.gguf, c.vocab_size, c.bos_token_id, c.eos_token_id)
        has_one = any((self.path / file).exists() for file in TOKENIZER_FILES)
        return tokenizers.load(self.path) if has_one else None

    def source(self, progress: Progress | None = None) -> Source:
        """The weights, checked as a whole. Raises WeightsError."""
        if self.gguf is not None:
            return GGUFCheckpoint(self.gguf, self.config, progress, self.draft)
        kind = Bundle if is_bundle(self.path) else Checkpoint
        return kind(self.path, self.config, progress)

    def tensors(self) -> Mapping[str, Entry]:
        """Everything that is stored, also what is set aside. Raises WeightsError."""
        plain = self.gguf is None and not is_bundle(self.path)
        return read_directory(self.path) if plain else self.parts().entries

    def parts(self) -> Source:
        """`source` with an entry for every expert's map, as a conversion needs it."""
        if self.gguf is None and is_bundle(self.path):
            return Apart(self.path, self.config)
        return self.source()


def _gguf_in(directory: Path) -> Path | None:
    """The one GGUF file of a directory that is no model otherwise."""
    if (directory / "config.json").exists():
        return None
    files = sorted(p for p in directory.glob("*.gguf") if not DRAFT_NAME.search(p.name))
    if len(files) > 1:
        raise WeightsError(
            f"{directory} holds {len(files)} GGUF files; name the one to open, such as {files[0]}"
        )
    return files[0] if files else None


def _draft_beside(main: GGUF) -> GGUF | None:
    """The file with the MTP layer beside one that has none. Raises WeightsError for several."""
    if any(name.startswith("mtp.") for name in main.tensors):
        return None
    beside = sorted(main.path.parent.glob("*.gguf"))
    found = [p for p in beside if DRAFT_NAME.search(p.name) and not p.samefile(main.path)]
    if len(found) > 1:
        raise WeightsError(
            f"{found[0]} and {found[1]} both lie beside {main.path}; keep the one draft layer that "
            "belongs to it there"
        )
    return gguf.read(found[0]) if found else None
