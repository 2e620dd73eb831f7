"""A small random model as a GGUF file, and as the float32 checkpoint its blocks stand for.

Plain types, Q8_0 and MXFP4 are encoded by the `gguf` package; the others, which it only decodes,
are random blocks with scales that give the spread wanted. The package decodes all of them, so the
values owe nothing to this project's decoders.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf as package
import numpy as np
from numpy.typing import NDArray

from ds4py.config import ModelConfig
from ds4py.formats import gguf, gguf_write
from ds4py.formats.gguf import Field
from ds4py.formats.gguf_write import NewTensor
from ds4py.text.byte_level import CONTROL, NORMAL, UNUSED, Vocabulary
from ds4py.text.messages import CONTROL_TOKENS
from ds4py.text.tokenizer import byte_alphabet
from ds4py.weights.gguf import Slot, slots
from ds4py.weights.gguf_config import metadata_of
from ds4py.weights.gguf_tokenizer import tokenizer_fields
from tests.golden import sets
from tools.golden.presets import Config, Preset, Tensors, config, draw, tokens

PRESET = Preset(
    ratios=(0, 4, 16, 4),
    tokens=70,
    topk=8,
    hidden=256,
    inner=256,
    experts=6,
    experts_used=2,
    lora=64,
    vocab=320,
)

# Pattern of a GGUF name -> type; what matches none has the usual type of the contract.
Q2 = ()
Q4 = ((r"_exps\.", "Q4_K"),)
PLAIN = ((r"exps\.|_q_a\.", "F16"), (r"_kv\.", "BF16"), (r"attn_output", "F32"))
MIXED = (
    (r"ffn_(gate|up)_exps\.", "MXFP4"),
    (r"blk\.3\.ffn_down_exps\.", "Q6_K"),
    (r"ffn_down_exps\.", "Q4_K"),
    (r"attn_(q_a|kv|output_a)\.", "Q4_K"),  # rows of 256; those of attn_q_b are shorter
    (r"^output\.|shexp", "Q6_K"),
    (r"token_embd|_fn\.", "F32"),
    (r"ffn_gate_inp|attn_norm|e_proj", "BF16"),
    (r"ffn_norm|_compressor_ape", "F16"),
    (r"_compressor_kv|indexer\.", "Q8_0"),
)

# Where the float16 scales of a block stand, and their sizes relative to each other: chosen so
# that the mean of random blocks is zero.
SCALES = {
    "Q2_K": {80: 1.0, 82: 1.5},
    "Q4_K": {0: 1.0, 2: 7.5},
    "Q6_K": {208: 1.0},
    "IQ2_XXS": {0: 1.0},
}


class Built(NamedTuple):
    """A model in both forms."""

    path: Path
    """The GGUF file."""
    values: Path
    """The directory with the float32 values."""
    ids: list[int]
    config: Config


def build(
    folder: Path,
    types: tuple[tuple[str, str], ...],
    seed: int = 1,
    by_package: bool = False,
    draft: bool = True,
) -> Built:
    """Write both forms; by_package: the `gguf` package writes the file."""
    c = config(PRESET)
    drawn = dict(draw(c, seed))
    parsed = ModelConfig.from_dict(c)
    data: dict[str, tuple[str, Slot, NDArray[Any]]] = {}
    meant: Tensors = {}
    for slot in slots(parsed) + (slots(parsed, draft=True) if draft else []):
        kind = next((t for pattern, t in types if re.search(pattern, slot.name)), slot.types[0])
        stored, values = encode(np.stack([drawn[name] for name in slot.holds]), kind, seed)
        data[slot.name] = kind, slot, stored
        meant |= dict(zip(slot.holds, values, strict=True))
    fields = metadata_of(parsed, "random") | tokenizer_fields(vocabulary(PRESET.vocab), 0, 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.gguf"
    (write_by_package if by_package else write)(path, fields, data)
    stored = {name: sets.plain(tensor) for name, tensor in meant.items()}
    values = sets.write(folder / "values", c, stored)
    return Built(path, values, tokens(c, PRESET.tokens, seed).tolist(), c)


def vocabulary(size: int) -> Vocabulary:
    """Control tokens, bytes, one merge, the rest unused."""
    spelled = [*CONTROL_TOKENS, *sorted(byte_alphabet()), "ab"]
    unused = [f"[PAD{i}]" for i in range(size - len(spelled))]
    kinds = [CONTROL] * len(CONTROL_TOKENS) + [NORMAL] * 257 + [UNUSED] * len(unused)
    return Vocabulary(spelled + unused, ["a b"], kinds)


def encode(x: NDArray[Any], kind: str, seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """[parts, ..., cols] -> stored rows, and the values they stand for in the shape of x."""
    if kind == "I32":
        return x.astype(np.int32), x
    type_of = package.GGMLQuantizationType[kind]
    if kind in SCALES:
        stored = random_blocks(x, kind, seed)
    else:
        stored = package.quantize(np.ascontiguousarray(x), type_of)
    return stored, package.dequantize(stored, type_of).reshape(x.shape).astype(np.float32)


def random_blocks(x: NDArray[Any], kind: str, seed: int) -> NDArray[np.uint8]:
    """Blocks of the spread of x."""
    type_of = package.GGMLQuantizationType[kind]
    n_values, n_bytes = package.GGML_QUANT_SIZES[type_of]
    rng = np.random.default_rng([seed, x.size])
    blocks = rng.integers(0, 256, (x.size // n_values, n_bytes), np.uint8)

    def scaled(size: float) -> NDArray[np.uint8]:
        for offset, relative in SCALES[kind].items():
            scale = np.array([size * relative], np.float16).view(np.uint8)
            blocks[:, offset : offset + 2] = scale
        return blocks

    unit = package.dequantize(scaled(2.0**-10), type_of).std() * 2.0**10
    shape = (*x.shape[:-1], x.shape[-1] // n_values * n_bytes)
    return scaled(float(x.std() / unit)).reshape(shape)


Data = dict[str, tuple[str, Slot, NDArray[Any]]]


def write(path: Path, fields: dict[str, Field], data: Data) -> None:
    gguf_write.write(
        path,
        fields,
        [
            NewTensor(name, kind, slot.dims, lambda stored=stored: stored)
            for name, (kind, slot, stored) in data.items()
        ],
    )


def write_by_package(path: Path, fields: dict[str, Field], data: Data) -> None:
    """The same file from the other writer, which gives arrays of whole numbers as i32."""
    writer = package.GGUFWriter(path, "deepseek4")
    kinds = {k: package.GGUFValueType(i) for i, k in enumerate(gguf.KINDS)}
    for key, (kind, value) in fields.items():
        if key == "general.architecture":
            continue
        if kind.endswith("[]"):
            writer.add_array(key, [v.item() if hasattr(v, "item") else v for v in value])
        else:
            writer.add_key_value(key, value, kinds[kind])
    for name, (kind, slot, stored) in data.items():
        raw = None if kind in ("F32", "F16", "I32") else package.GGMLQuantizationType[kind]
        shape = (*reversed(slot.dims[1:]), stored.shape[-1])
        writer.add_tensor(name, np.ascontiguousarray(stored.reshape(shape)), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
