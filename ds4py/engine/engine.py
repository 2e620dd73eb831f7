"""The engine: one loaded model, and the sessions made from it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from ds4py import assets
from ds4py.cache import snapshot
from ds4py.cache.rows import row_formats
from ds4py.config import ModelConfig
from ds4py.engine import memory
from ds4py.engine.checkpoints import TURNS_KEPT
from ds4py.engine.decode import Decoder
from ds4py.engine.footprint import Numerics, n_parameters
from ds4py.engine.memory import MemoryPlan
from ds4py.engine.options import EngineOptions
from ds4py.engine.pacing import Pacer
from ds4py.engine.session import Session, check_tokens
from ds4py.errors import InputError, OptionsError, WeightsError
from ds4py.experts.streamed import StreamedExperts
from ds4py.formats import gguf
from ds4py.hub import manifest, place
from ds4py.kernels import build
from ds4py.kernels.build import Launcher
from ds4py.kernels.decoded import DecodedMaps
from ds4py.model.moe import ExpertSource
from ds4py.model.mtp import DraftLayer
from ds4py.text.messages import ASSISTANT, USER
from ds4py.text.spelling import Spelling
from ds4py.text.tokenizer import Tokenizer
from ds4py.weights.files import ModelFiles
from ds4py.weights.load import Loader
from ds4py.weights.source import Source, fingerprint

NUMERICS = 1
"""Counts the changes after which the same weights give other rows."""
EMBEDDED = "tiny"
"""The model that travels with the package."""

Progress = Callable[[str, int, int], None]


def resolve(name: str | os.PathLike[str], models: Path | None = None) -> Path:
    """A model's directory or GGUF file from its path or name. Raises InputError.

    models: where pulled models lie; None: the usual place in the user's home.
    """
    if str(name) == EMBEDDED:
        return assets.path("models", EMBEDDED)
    path = Path(name).expanduser()
    if not path.exists():
        path = place.find(str(name), models or place.default_models()) or path
    if place.is_unfinished(path):
        raise InputError(
            f"{path} is a download that is not finished; give the same `ds4 pull` again, it goes "
            "on where it was"
        )
    if path.is_dir() or gguf.is_gguf(path):
        return path
    if path.exists():
        raise InputError(
            f"{path} is a file; a model is a directory with config.json and *.safetensors, or a "
            "GGUF file"
        )
    if str(name) in manifest.names():
        raise InputError(
            f"the model {name} is not on this machine; fetch it with `ds4 pull {name}`"
        )
    raise InputError(
        f"no model {str(name)!r}: there is no such directory and no pulled model of that name; "
        f"names are {EMBEDDED}, {', '.join(manifest.names())}, or what `ds4 pull` fetched"
    )


class Engine:
    """A loaded model. Made by `Engine.open`; everything is read-only but the counters."""

    def __init__(
        self,
        path: Path,
        name: str,
        options: EngineOptions,
        progress: Progress | None,
        launcher: Launcher | None = None,
    ):
        self.name, self.options = name, options
        files = ModelFiles.at(path)
        self.config: ModelConfig = files.config
        longest = self.config.longest_context
        if options.context is not None and options.context > longest:
            raise OptionsError(
                f"context is {options.context}; this model has positions for {longest} tokens"
            )
        ops, dtype, launcher = build.choose(options.kernels, options.dtype, launcher)
        self.launcher = launcher
        """Runs the Metal kernels; None: plain operations."""
        self.pacer = Pacer() if build.metal_available() else None
        """Bounds a chunk's time on a GPU; a CPU has nobody waiting for it."""
        self.tokenizer: Tokenizer | None = files.tokenizer()
        source = files.source(progress)
        rounded = options.trained_rounding
        # cache/rows.py says why; the kernels know no rounded rows but native ones.
        native = rounded and (options.dtype != "float32" or launcher is not None)
        rows = row_formats(ops, self.config, dtype, rounded, native)
        records = source.records()
        wishes = options.streaming
        self.has_draft = self._can_draft(source)
        """Whether there is an MTP layer this engine can run."""
        self.plan: MemoryPlan = memory.plan_memory(
            source,
            Numerics(
                ops, dtype, rows, options.prefill_chunk, launcher is not None, options.draft
            ),
            records,
            context=options.context,
            memory=options.memory,
            experts=options.experts,
            slots=wishes.slots,
        )
        self.context = self.plan.context
        if build.metal_available():  # MLX keeps freed buffers without a bound of its own
            mx.set_cache_limit(self.plan.scratch)
        streamed = None
        if self.plan.streamed and records is not None:
            streamed = StreamedExperts(ops, self.config, records, wishes)
        decoded = DecodedMaps(self.plan.decoded)
        self._loader = Loader(source, ops, dtype, rounded, native, launcher, streamed, decoded)
        self.model = self._loader.transformer()
        if options.draft:
            self.model = replace(self.model, draft=self._loader.draft(self.model))
        if streamed is not None and records is not None:
            if wishes.slots is None:
                self.plan = memory.refit(self.plan, self.config, records)
            streamed.start(self.plan.slots, self.model.blocks)
        self.decoder = Decoder(self.model)
        self.counters = {"prefill_tokens": 0, "decode_tokens": 0}

    @classmethod
    def open(
        cls,
        path_or_name: str | os.PathLike[str],
        options: EngineOptions | None = None,
        progress: Progress | None = None,
        launcher: Launcher | None = None,
    ) -> Engine:
        """Load a directory in DeepSeek's layout, a bundle, a GGUF file, or a model by its name.

        launcher: runs the Metal kernels where there is no GPU, for `kernels="metal"`.
        Raises InputError and its kin: ConfigError, WeightsError, TokenizerError, OptionsError.
        """
        path = resolve(path_or_name)
        return cls(path, path.name, options or EngineOptions(), progress, launcher)

    def session(self) -> Session:
        """A new, empty timeline."""
        return Session(self)

    def session_bytes(self, n_tokens: int) -> int:
        """Most memory that a session of that length takes, with its checkpoints."""
        return self.model.new_state().n_bytes_at(n_tokens) * 5 // 4

    def restore(self, path: os.PathLike[str] | str) -> Session:
        """A session from a file written by `Session.save`. Raises InputError."""
        session = Session(self)
        session.load(Path(path))
        return session

    def turns(self, tokens: Sequence[int], start: int) -> list[int]:
        """Positions from `start` on that a later prompt is likely to share: where turns begin.

        Before a user's turn (what comes before may be shared by other conversations), and after
        the token that opens a reply (what comes after it is rendered anew once reasoning is
        dropped from the history). The first of a prompt and the last few.
        """
        if self.tokenizer is None:
            return []
        user, assistant = (self.tokenizer.control_id(text) for text in (USER, ASSISTANT))
        found = [
            at + (token == assistant)
            for at, token in enumerate(tokens)
            if token in (user, assistant)
        ]
        return sorted({at for at in found[:1] + found[-TURNS_KEPT:] if at >= max(start, 1)})

    @property
    def experts(self) -> ExpertSource:
        """Where the routed experts of all layers come from."""
        return self._loader.experts

    def _can_draft(self, source: Source) -> bool:
        found = bool(self.config.mtp_layers) and source.has_draft
        if self.options.draft and not found:
            raise OptionsError(
                f"model {self.name} has no draft layer (MTP) that can be run, which --draft needs; "
                "leave it out"
            )
        return found

    @cached_property
    def spelling(self) -> Spelling:
        """What token ids say as text."""
        return Spelling(self.tokenizer)

    @cached_property
    def draft(self) -> DraftLayer:
        """The MTP layer, loaded when first asked for. Raises WeightsError when there is none."""
        if not self.has_draft:
            raise WeightsError(f"model {self.name} has no MTP weights this engine can run")
        return self.model.draft or self._loader.draft(self.model)

    def score(
        self, tokens: Sequence[int], chunks: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        """Teacher-forced logits at every position, float32 [T, V].

        chunks: sizes of the steps, which must add up to T; None = chunks of `prefill_chunk`.
        """
        ids, step = [int(t) for t in tokens], self.options.prefill_chunk
        check_tokens(ids, self.context, self.config.vocab_size)
        if chunks is None:
            chunks = [min(step, len(ids) - i) for i in range(0, len(ids), step)]
        if sum(chunks) != len(ids) or min(chunks) < 1:
            raise OptionsError(f"chunks add up to {sum(chunks)}; need the {len(ids)} tokens given")
        state, rows = self.model.new_state(), []
        for n in chunks:
            part = mx.array(ids[state.position : state.position + n])
            logits, delta = self.model.step(part, state)
            state.commit(delta, n)
            mx.eval(logits, *state.pending())  # bounds the graph to one chunk
            rows.append(np.array(logits))
        return np.concatenate(rows)

    def score_mtp(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Draft logits, float32 [T-1, V]: row p sees tokens 0..p+1 and predicts token p+2."""
        ids, chunk, draft = [int(t) for t in tokens], self.options.prefill_chunk, self.draft
        check_tokens(ids, self.context, self.config.vocab_size)
        model = replace(self.model, draft=draft)
        state, rows = model.new_state(), []
        for start in range(0, len(ids), chunk):
            part = mx.array(ids[start : start + chunk])
            _, delta = model.step(part, state, n_logits=0)
            first = int(start == 0)  # the first token has no pair
            streams = draft.ops.concatenate([state.frontier.streams, delta.streams[:-1]])
            logits = mx.zeros((0, self.config.vocab_size))
            if len(part) > first:
                logits = draft.logits(streams[first:], part[first:], state)
            state.commit(delta, len(part))
            mx.eval(logits, *state.pending())  # bounds the graph to one chunk
            rows.append(np.array(logits))
        return np.concatenate(rows)

    @cached_property
    def identity(self) -> str:
        """Names model and numerics: what must agree before a snapshot may be used."""
        config = hashlib.sha256(json.dumps(self.config.raw, sort_keys=True).encode()).hexdigest()
        weights = fingerprint(self._loader.checkpoint.files)
        numerics = f"{self._dtype_name} {self.model.ops.name} {self.options.trained_rounding}"
        return f"{config} {weights} {numerics} {self.routing} {snapshot.FORMAT}.{NUMERICS}"

    @property
    def routing(self) -> str:
        """ "exact": experts are the router's own choice. Another mode is another identity."""
        swap = self.options.streaming.swap
        return f"swap {swap}" if self.plan.streamed and swap else "exact"

    @property
    def _dtype_name(self) -> str:
        return (
            np.dtype(self.model.dtype).name
            if self.model.ops.name == "host"
            else (str(self.model.dtype).removeprefix("mlx.core."))
        )

    def stats(self) -> dict[str, Any]:
        """Counters since the model was opened, and what it is."""
        return {
            "model": self.name,
            "dtype": self._dtype_name,
            "operations": self.model.ops.name,
            "device": "gpu" if build.metal_available() else "cpu",
            "context": self.context,
            "parameters": n_parameters(self.config),
            **self.counters,
            "routing": self.routing,
            "draft": self.decoder.speculation.stats(),
            "experts": self.experts.stats(),
            "kernels": {} if self.launcher is None else self.launcher.stats(),
        }
