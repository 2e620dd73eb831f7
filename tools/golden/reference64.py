"""DeepSeek V4's forward pass in float64 numpy, written from the paper and the published model code.

It is an oracle, not an engine: a whole sequence at once, no cache, no chunks, nothing shared with
the package. Shapes: T tokens, H streams, D hidden, N heads, R compressed rows. Angles are computed
in float32, as the published code does, because that is part of the model's definition.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.golden.presets import Config, Tensors

Array = NDArray[np.float64]
ROPE = 64  # rotated channels, always the last ones of a head


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def power_of_two_at_least(x: Array) -> Array:
    """2 ** ceil(log2(x)), exactly."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(1.0, np.where(mantissa == 0.5, exponent - 1, exponent))


def round_to_grid(x: Array, mantissa_bits: int, lowest_exponent: int) -> Array:
    """Nearest value with that many mantissa bits, ties to even; subnormal below the exponent."""
    exponent = np.maximum(np.frexp(x)[1] - 1, lowest_exponent)
    step = np.ldexp(1.0, exponent - mantissa_bits)
    return np.rint(x / step) * step


def round_trip(x: Array, block: int, largest: float, floor: float, grid: tuple[int, int]) -> Array:
    """To a small float format with one power-of-two scale per block of the last axis, and back."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    top = np.maximum(np.abs(blocks).max(-1, keepdims=True), floor)
    scale = power_of_two_at_least(top / largest)
    rounded = round_to_grid(np.clip(blocks / scale, -largest, largest), *grid)
    return (rounded * scale).reshape(x.shape)


def fp8(x: Array) -> Array:
    """E4M3 in blocks of 64."""
    return round_trip(x, 64, 448.0, 1e-4, (3, -6))


def fp4(x: Array) -> Array:
    """E2M1 in blocks of 32."""
    return round_trip(x, 32, 6.0, 6 * 2.0**-126, (1, 0))


def hadamard(n: int) -> Array:
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(n)


class Reference:
    """One model: `logits` of a whole sequence, and `draft` of its MTP layer.

    `rounding` switches the trained FP8 and FP4 round trips of stored rows on; `noise` disturbs what
    they round by that share, as another evaluation order in float32 would. `closest` records how
    near the closest choice of the indexer came to a tie.
    """

    def __init__(
        self,
        config: Config,
        tensors: Tensors,
        rounding: bool = False,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.c = config
        self.w = {n: t.astype(np.float64) if t.dtype.kind == "f" else t for n, t in tensors.items()}
        self.rounding = rounding
        self.noise = noise
        self.random = np.random.default_rng(seed)
        self.eps = config["rms_norm_eps"]
        self.closest = math.inf

    def logits(self, ids: NDArray[Any]) -> tuple[Array, Array]:
        """Logits [T, V], and the streams [T, H, D] that the MTP layer reads."""
        x = np.repeat(self.w["embed.weight"][ids][:, None], self.c["hc_mult"], axis=1)
        for number in range(self.c["num_hidden_layers"]):
            hashed = number < self.c["num_hash_layers"]
            x = self.block(f"layers.{number}.", self.c["compress_ratios"][number], hashed, x, ids)
        return self.head("", x), x

    def draft(self, streams: Array, ids: NDArray[Any]) -> Array:
        """MTP logits [T-1, V]: row t reads the streams of t and token t+1, predicts token t+2."""
        p, w = "mtp.0.", self.w
        e = rms(w["embed.weight"][ids[1:]], self.eps) * w[p + "enorm.weight"]
        h = rms(streams[:-1], self.eps) * w[p + "hnorm.weight"]
        x = (e @ w[p + "e_proj.weight"].T)[:, None] + h @ w[p + "h_proj.weight"].T
        return self.head(p, self.block(p, 0, False, x, ids[1:]))

    def head(self, p: str, x: Array) -> Array:
        flat = rms(x.reshape(len(x), -1), self.eps)
        mixes = flat @ self.w[p + "hc_head_fn"].T
        pre = sigmoid(mixes * self.w[p + "hc_head_scale"] + self.w[p + "hc_head_base"])
        collapsed = ((pre + self.c["hc_eps"])[..., None] * x).sum(1)
        normed = rms(collapsed, self.eps) * self.w[p + "norm.weight"]
        return normed @ self.w["head.weight"].T

    def block(self, p: str, ratio: int, hashed: bool, x: Array, ids: NDArray[Any]) -> Array:
        for site in ("attn", "ffn"):
            inner, post, comb = self.connect(f"{p}hc_{site}_", x)
            inner = rms(inner, self.eps) * self.w[f"{p}{site}_norm.weight"]
            if site == "attn":
                y = self.attention(p + "attn.", ratio, inner)
            else:
                y = self.experts(p + "ffn.", hashed, inner, ids)
            # the mixing matrix is summed over its first index
            x = post[..., None] * y[:, None] + np.einsum("tjk,tjd->tkd", comb, x)
        return x

    def connect(self, p: str, x: Array) -> tuple[Array, Array, Array]:
        """Hyper-connection: block input [T, D], output weights [T, H], mixing matrix [T, H, H]."""
        n, eps = self.c["hc_mult"], self.c["hc_eps"]
        scale, base = self.w[p + "scale"], self.w[p + "base"]
        m = rms(x.reshape(len(x), -1), self.eps) @ self.w[p + "fn"].T
        pre = sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
        post = 2 * sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = softmax((m[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)) + eps
        comb /= comb.sum(1, keepdims=True) + eps
        for _ in range(self.c["hc_sinkhorn_iters"] - 1):
            comb /= comb.sum(2, keepdims=True) + eps
            comb /= comb.sum(1, keepdims=True) + eps
        return (pre[..., None] * x).sum(1), post, comb

    def frequencies(self, ratio: int) -> NDArray[np.float32]:
        """Radians per position of the 32 pairs: YaRN wherever rows are compressed."""
        if not ratio:
            powers = np.arange(0, ROPE, 2, dtype=np.float32) / np.float32(ROPE)
            return (1.0 / np.float32(self.c["rope_theta"]) ** powers).astype(np.float32)
        y, base = self.c["rope_scaling"], self.c["compress_rope_theta"]
        plain = base ** (-np.arange(0, ROPE, 2) / ROPE)

        def corner(turns: float) -> float:
            span = y["original_max_position_embeddings"] / (turns * 2 * math.pi)
            return ROPE * math.log(span) / (2 * math.log(base))

        low = max(math.floor(corner(y["beta_fast"])), 0)
        high = min(math.ceil(corner(y["beta_slow"])), ROPE - 1)
        ramp = np.clip((np.arange(ROPE // 2) - low) / (high - low), 0, 1)
        return (plain / y["factor"] * ramp + plain * (1 - ramp)).astype(np.float32)

    def rotate(self, x: Array, positions: NDArray[Any], ratio: int, back: bool = False) -> Array:
        """Rotates neighbouring pairs of the last 64 channels of x [T, ..., channels]."""
        angle = (positions.astype(np.float32)[:, None] * self.frequencies(ratio)).astype(np.float64)
        angle = angle.reshape(len(x), *[1] * (x.ndim - 2), -1)
        cos, sin = np.cos(angle), np.sin(angle) * (-1 if back else 1)
        a, b = x[..., -ROPE::2], x[..., -ROPE + 1 :: 2]
        out = x.copy()
        out[..., -ROPE::2], out[..., -ROPE + 1 :: 2] = a * cos - b * sin, a * sin + b * cos
        return out

    def attention(self, p: str, ratio: int, x: Array) -> Array:
        w, c, t = self.w, self.c, len(x)
        heads, dim, at = c["num_attention_heads"], c["head_dim"], np.arange(t)
        latent = rms(x @ w[p + "wq_a.weight"].T, self.eps) * w[p + "q_norm.weight"]
        q = rms((latent @ w[p + "wq_b.weight"].T).reshape(t, heads, dim), self.eps)
        q = self.rotate(q, at, ratio)
        rows = rms(x @ w[p + "wkv.weight"].T, self.eps) * w[p + "kv_norm.weight"]
        rows = self.store(self.rotate(rows, at, ratio))
        age = at[:, None] - at[None]
        seen = (age >= 0) & (age < c["sliding_window"])
        if ratio:
            pooled = self.store(self.compress(p + "compressor.", ratio, dim, x))
            chosen = (at[:, None] + 1) // ratio > np.arange(len(pooled))[None]
            if ratio == 4:
                chosen &= self.index(p + "indexer.", latent, x)
            rows, seen = np.concatenate([rows, pooled]), np.concatenate([seen, chosen], axis=1)
        scores = np.einsum("tnd,rd->tnr", q, rows) * dim**-0.5
        scores = np.where(seen[:, None], scores, -np.inf)
        sink = np.broadcast_to(w[p + "attn_sink"][None, :, None], (t, heads, 1))
        weights = softmax(np.concatenate([scores, sink], axis=-1))[..., :-1]
        out = self.rotate(np.einsum("tnr,rd->tnd", weights, rows), at, ratio, back=True)
        groups = out.reshape(t, c["o_groups"], -1)
        wo_a = w[p + "wo_a.weight"].reshape(c["o_groups"], c["o_lora_rank"], -1)
        return np.einsum("tgi,goi->tgo", groups, wo_a).reshape(t, -1) @ w[p + "wo_b.weight"].T

    def store(self, rows: Array) -> Array:
        """What a stored attention row reads back as: FP8 except for its rotated channels."""
        if not self.rounding:
            return rows
        return np.concatenate([fp8(self.disturb(rows[..., :-ROPE])), rows[..., -ROPE:]], axis=-1)

    def disturb(self, x: Array) -> Array:
        return x * (1 + self.noise * self.random.standard_normal(x.shape)) if self.noise else x

    def compress(self, p: str, ratio: int, dim: int, x: Array) -> Array:
        """One rotated row [R, dim] per complete block of `ratio` tokens."""
        count = len(x) // ratio
        x = x[: count * ratio]
        u = (x @ self.w[p + "wkv.weight"].T).reshape(count, ratio, -1)
        z = (x @ self.w[p + "wgate.weight"].T).reshape(count, ratio, -1) + self.w[p + "ape"]
        if ratio == 4:  # the second half of the own block, the first half of the one before
            before = np.zeros((1, ratio, dim))
            u = np.concatenate([np.concatenate([before, u[:-1, :, :dim]]), u[..., dim:]], axis=1)
            before = np.full((1, ratio, dim), -np.inf)
            z = np.concatenate([np.concatenate([before, z[:-1, :, :dim]]), z[..., dim:]], axis=1)
        if not count:
            return np.zeros((0, dim))
        rows = rms((softmax(z, axis=1) * u).sum(1), self.eps) * self.w[p + "norm.weight"]
        return self.rotate(rows, np.arange(count) * ratio, ratio)

    def index(self, p: str, latent: Array, x: Array) -> NDArray[np.bool_]:
        """Which compressed rows each query may use, bool [T, R]."""
        c, t = self.c, len(x)
        heads, dim = c["index_n_heads"], c["index_head_dim"]
        q = (latent @ self.w[p + "wq_b.weight"].T).reshape(t, heads, dim)
        q = self.rotate(q, np.arange(t), 4)
        rows = self.compress(p + "compressor.", 4, dim, x)
        if self.rounding:
            q, rows = (fp4(self.disturb(y @ hadamard(dim))) for y in (q, rows))
        weights = (x @ self.w[p + "weights_proj.weight"].T) * (dim * heads) ** -0.5
        scores = np.einsum("tnr,tn->tr", np.maximum(np.einsum("tnd,rd->tnr", q, rows), 0), weights)
        visible = (np.arange(t)[:, None] + 1) // 4 > np.arange(len(rows))[None]
        scores = np.where(visible, scores, -np.inf)
        order = np.argsort(-scores, axis=1, kind="stable")
        chosen = np.zeros_like(visible)
        np.put_along_axis(chosen, order[:, : c["index_topk"]], True, axis=1)
        if len(rows) > c["index_topk"]:
            edge = -np.sort(-scores, axis=1)[:, c["index_topk"] - 1 : c["index_topk"] + 1]
            edge = edge[np.isfinite(edge).all(1)]
            self.closest = min(self.closest, float((edge[:, 0] - edge[:, 1]).min(initial=math.inf)))
        return chosen & visible

    def experts(self, p: str, hashed: bool, x: Array, ids: NDArray[Any]) -> Array:
        used = self.c["num_experts_per_tok"]
        scores = np.sqrt(np.logaddexp(0, x @ self.w[p + "gate.weight"].T))
        if hashed:
            chosen = self.w[p + "gate.tid2eid"][ids]
        else:
            biased = scores + self.w[p + "gate.bias"]
            chosen = np.argsort(-biased, axis=1, kind="stable")[:, :used]
        weights = np.take_along_axis(scores, chosen, axis=1)
        weights *= self.c["routed_scaling_factor"] / weights.sum(1, keepdims=True)
        y = self.expert(p + "shared_experts.", x)
        for e in range(self.c["n_routed_experts"]):
            rows, slots = np.nonzero(chosen == e)
            y[rows] += self.expert(f"{p}experts.{e}.", x[rows]) * weights[rows, slots][:, None]
        return y

    def expert(self, p: str, x: Array) -> Array:
        limit = self.c["swiglu_limit"]
        gate = np.minimum(x @ self.w[p + "w1.weight"].T, limit)
        up = np.clip(x @ self.w[p + "w3.weight"].T, -limit, limit)
        return (gate * sigmoid(gate) * up) @ self.w[p + "w2.weight"].T
