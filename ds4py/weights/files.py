"""What lies at a path: DeepSeek's own layout, our bundle, or a GGUF file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds4py.config import ModelConfig
from ds4py.errors import WeightsError
from ds4py.formats import gguf
from ds4py.text import tokenizer as tokenizers
from ds4py.text.tokenizer import Tokenizer
from ds4py.weights.bundle import Bundle, is_bundle
from ds4py.weights.checkpoint import Checkpoint, Progress
from ds4py.weights.gguf import GGUFCheckpoint
from ds4py.weights.gguf_config import config_of
from ds4py.weights.gguf_tokenizer import tokenizer_of
from ds4py.weights.source import Source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: its config, and ways to its tokenizer and weights."""

    path: Path
    """The directory, or the GGUF file."""
    config: ModelConfig
    gguf: gguf.GGUF | None = None

    @staticmethod
    def at(path: Path) -> ModelFiles:
        """A directory or GGUF file. Raises ConfigError, WeightsError."""
        found = path if path.is_file() else _gguf_in(path)
        if found is None:
            return ModelFiles(path, ModelConfig.load(path))
        header = gguf.read(found)
        return ModelFiles(found, config_of(header), header)

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
            return GGUFCheckpoint(self.gguf, self.config, progress)
        kind = Bundle if is_bundle(self.path) else Checkpoint
        return kind(self.path, self.config, progress)


def _gguf_in(directory: Path) -> Path | None:
    """The one GGUF file of a directory that is no model otherwise."""
    if (directory / "config.json").exists():
        return None
    files = sorted(directory.glob("*.gguf"))
    if len(files) > 1:
        raise WeightsError(
            f"{directory} holds {len(files)} GGUF files; name the one to open, such as {files[0]}"
        )
    return files[0] if files else None
