"""The same random models in transformers, which wrote DeepSeek V4 independently of this project.

Needs the `reference` extra. transformers reads DeepSeek's tensor names itself; the MTP layer, which
it does not implement, is put together here from its decoder layer.
"""

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as parts

from tools.golden import files
from tools.golden.presets import Config, Tensors

KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention"}
HIGH = "heavily_compressed_attention"
# What transformers calls by another name, or derives from what it is given.
TRANSLATED = {"architectures", "torch_dtype", "compress_ratios", "rope_scaling", "topk_method"}


def supports(c: Config) -> bool:
    """It knows one high ratio per model."""
    return len({r for r in c["compress_ratios"] if r not in KINDS}) <= 1


def translate(c: Config) -> DeepseekV4Config:
    ratios = c["compress_ratios"][: c["num_hidden_layers"]]
    high = next((r for r in ratios if r not in KINDS), 128)
    scaling = dict(c["rope_scaling"])
    config = DeepseekV4Config(
        **{key: value for key, value in c.items() if key not in TRANSLATED},
        rope_parameters={"rope_type": scaling.pop("type"), **scaling},
        layer_types=[KINDS.get(r, HIGH) for r in ratios],
        compress_rates={KINDS[4]: 4, HIGH: high},
    )
    config._attn_implementation = "eager"
    return config


class Draft(torch.nn.Module):
    """DeepSeek's MTP block: a sliding, score-routed layer on last streams and next token."""

    def __init__(self, config: DeepseekV4Config) -> None:
        super().__init__()
        longer = copy.deepcopy(config)
        longer.layer_types = [*config.layer_types, KINDS[0]]
        longer.mlp_layer_types = [*config.mlp_layer_types, "moe"]
        longer.num_hidden_layers = len(longer.layer_types)
        hidden = config.hidden_size
        self.window = config.sliding_window
        self.e_proj = torch.nn.Linear(hidden, hidden, bias=False)
        self.h_proj = torch.nn.Linear(hidden, hidden, bias=False)
        self.enorm = parts.DeepseekV4RMSNorm(hidden, config.rms_norm_eps)
        self.hnorm = parts.DeepseekV4RMSNorm(hidden, config.rms_norm_eps)
        self.norm = parts.DeepseekV4RMSNorm(hidden, config.rms_norm_eps)
        self.block = parts.DeepseekV4DecoderLayer(longer, config.num_hidden_layers)
        self.hc_head = parts.DeepseekV4HyperHead(config)

    def forward(self, main: Any, streams: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """streams [1, S, H, D] of positions 0..S-1, following [1, S] = tokens 1..S -> [1, S, V]."""
        count = following.shape[1]
        e = self.enorm(main.model.embed_tokens(following))
        x = self.e_proj(e).unsqueeze(2) + self.h_proj(self.hnorm(streams))
        at = torch.arange(count)
        rotation = main.model.rotary_emb(e, position_ids=at[None], layer_type="main")
        age = at[:, None] - at[None]
        hidden = (age < 0) | (age >= self.window)
        x = self.block(
            x,
            position_embeddings={"main": rotation},
            position_ids=at[None],
            attention_mask=torch.zeros(1, 1, count, count).masked_fill(hidden, float("-inf")),
            past_key_values=None,
        )
        return main.lm_head(self.norm(self.hc_head(x)))


def draft_names(tensors: Tensors, experts: int) -> dict[str, torch.Tensor]:
    """The mtp.0 tensors under the names of `Draft`."""
    renames = (
        (r"attn.attn_sink", "block.self_attn.sinks"),
        (r"attn.wq_a.", "block.self_attn.q_a_proj."),
        (r"attn.q_norm.", "block.self_attn.q_a_norm."),
        (r"attn.wq_b.", "block.self_attn.q_b_proj."),
        (r"attn.wkv.", "block.self_attn.kv_proj."),
        (r"attn.kv_norm.", "block.self_attn.kv_norm."),
        (r"attn.wo_a.", "block.self_attn.o_a_proj."),
        (r"attn.wo_b.", "block.self_attn.o_b_proj."),
        (r"attn_norm.", "block.input_layernorm."),
        (r"ffn_norm.", "block.post_attention_layernorm."),
        (r"hc_attn_", "block.attn_hc."),
        (r"hc_ffn_", "block.ffn_hc."),
        (r"hc_head_", "hc_head.hc_"),
        (r"ffn.gate.bias", "block.mlp.gate.e_score_correction_bias"),
        (r"ffn.gate.weight", "block.mlp.gate.weight"),
        (r"ffn.shared_experts.w1.", "block.mlp.shared_experts.gate_proj."),
        (r"ffn.shared_experts.w2.", "block.mlp.shared_experts.down_proj."),
        (r"ffn.shared_experts.w3.", "block.mlp.shared_experts.up_proj."),
    )
    found = {}
    for name, values in tensors.items():
        if not name.startswith("mtp.0.") or ".experts." in name:
            continue
        own = name.removeprefix("mtp.0.")
        for old, new in renames:
            if own.startswith(old):
                own = new + own.removeprefix(old)
                break
        found[own] = torch.from_numpy(values)

    def stacked(part: str) -> NDArray[Any]:
        return np.stack([tensors[f"mtp.0.ffn.experts.{e}.{part}.weight"] for e in range(experts)])

    both = np.concatenate([stacked("w1"), stacked("w3")], axis=1)
    found["block.mlp.experts.gate_up_proj"] = torch.from_numpy(both)
    found["block.mlp.experts.down_proj"] = torch.from_numpy(stacked("w2"))
    return found


class TransformersModel:
    """`logits` in chunks of any size and `draft`, both float32."""

    def __init__(self, c: Config, tensors: Tensors) -> None:
        self.config = translate(c)
        with tempfile.TemporaryDirectory() as folder:
            stored = {
                name: files.int64(t) if t.dtype.kind == "i" else files.float32(t)
                for name, t in tensors.items()
            }
            files.write(Path(folder) / "model.safetensors", stored)
            self.config.save_pretrained(folder)
            self.model, told = DeepseekV4ForCausalLM.from_pretrained(
                folder, config=self.config, dtype=torch.float32, output_loading_info=True
            )
        if told["missing_keys"] or told["mismatched_keys"]:
            raise ValueError(f"transformers did not find {told['missing_keys']}")
        self.model.eval()
        self.mtp = Draft(self.config).eval()
        self.mtp.load_state_dict(draft_names(tensors, c["n_routed_experts"]))

    @torch.no_grad()
    def logits(self, ids: NDArray[Any], chunks: list[int] | None = None) -> NDArray[np.float32]:
        """[T, V], each chunk continuing the one before."""
        given, cache, at, found = torch.from_numpy(ids)[None], None, 0, []
        cache = DynamicCache(config=self.config)
        for size in chunks or [len(ids)]:
            part = given[:, at : at + size]
            found.append(self.model(part, past_key_values=cache, use_cache=True).logits[0])
            at += size
        return torch.cat(found).numpy()

    @torch.no_grad()
    def draft(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """[T-1, V]: row t reads the streams of t and token t+1, predicts token t+2."""
        given, streams = torch.from_numpy(ids)[None], []
        last = self.model.model.layers[-1]
        hook = last.register_forward_hook(lambda _module, _inputs, out: streams.append(out))
        self.model(given, use_cache=False)
        hook.remove()
        return self.mtp(self.model, streams[0][:, :-1], given[:, 1:])[0].numpy()
