"""MLX and numpy compute the same model operations; a row never depends on its neighbours."""

from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import attend, compress, hyper, index, moe, rounding, route
from ds4py.kernels.host import HostOps
from ds4py.kernels.norm import rms_norm
from ds4py.kernels.ops import MlxOps, Ops

HOST, EXACT, MLX = (cast(Ops, ops) for ops in (HostOps(), HostOps(np.float64), MlxOps()))
ALL = [pytest.param(ops, id=name) for name, ops in (("host", HOST), ("mlx", MLX))]


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def same(function: Any, *arrays: Any, tolerance: float = 2e-5) -> None:
    """`function(ops, *arrays)` agrees between MLX, float32 numpy and float64 numpy."""
    results = []
    for ops in (EXACT, HOST, MLX):
        out = function(ops, *(ops.array(a) for a in arrays))
        results.append([np.array(x) for x in (out if isinstance(out, tuple) else (out,))])
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            np.testing.assert_allclose(y, x, rtol=tolerance, atol=tolerance)


def hyper_weights(ops: Ops, h: int, d: int, rows: int) -> hyper.HyperWeights:
    fn = ops.pack([(normal(rows, h * d, seed=1) / 16, ops.wide)])
    base, scale = ops.array(normal(rows, seed=2)), ops.array(normal(rows, seed=3))
    return hyper.HyperWeights(fn, base, scale, 1e-6, 1e-6)


def test_sigmoid_far_out() -> None:
    x = np.array([-1000, -89, 0, 89, 1000], np.float32)
    same(lambda ops, a: ops.sigmoid(a), x)
    assert HOST.sigmoid(x).tolist()[0] == 0 and HOST.sigmoid(x).tolist()[-1] == 1


def test_norm() -> None:
    same(lambda ops, x, w: rms_norm(ops, x, w, 1e-6), normal(5, 3, 96), normal(96))


@pytest.mark.parametrize("n", [1, 3, 33])
def test_hyper_connections(n: int) -> None:
    def run(ops: Ops, streams: Any, y: Any) -> Any:
        w = hyper_weights(ops, 4, 48, 24)
        x, post, comb = hyper.mix(ops, streams, w, 20)
        return x, post, comb, hyper.expand(ops, y, streams, post, comb)

    same(run, normal(n, 4, 48), normal(n, 48, seed=5), tolerance=5e-5)


def test_expand_transposes_comb() -> None:
    streams, comb = normal(1, 4, 8), normal(1, 4, 4, seed=1)
    y, post = normal(1, 8, seed=2), normal(1, 4, seed=3)
    out = np.array(hyper.expand(HOST, y, streams, post, comb))[0]
    for k in range(4):
        expected = post[0, k] * y[0] + sum(comb[0, j, k] * streams[0, j] for j in range(4))
        np.testing.assert_allclose(out[k], expected, rtol=1e-5, atol=1e-5)


def test_sinkhorn_ends_with_columns() -> None:
    c = np.array(hyper.sinkhorn(HOST, normal(7, 4, 4) * 3, 20, 1e-6))
    np.testing.assert_allclose(c.sum(1), 1, atol=1e-5)
    assert np.abs(c.sum(2) - 1).max() < 0.05


@pytest.mark.parametrize(("ratio", "overlap"), [(4, 2), (16, 1)])
def test_pool_by_hand(ratio: int, overlap: int) -> None:
    d, n = 3, 2
    n_tokens = ratio * (n + overlap - 1)
    u, z = normal(n_tokens, overlap * d), normal(n_tokens, overlap * d, seed=1)
    z[:ratio] = -np.inf if overlap == 2 else z[:ratio]  # nothing before the sequence
    same(lambda ops, a, b: compress.pool(ops, a, b, ratio, overlap), u, z)
    out = np.array(compress.pool(HOST, u, z, ratio, overlap))
    for j in range(n):
        for channel in range(d):
            first = ratio * (j + overlap - 1)
            slots = [(u[t, -d + channel], z[t, -d + channel]) for t in range(first, first + ratio)]
            if overlap == 2:
                slots += [(u[t, channel], z[t, channel]) for t in range(first - ratio, first)]
            values, scores = np.array(slots, np.float64).T
            p = np.exp(scores - scores.max())
            assert abs((p * values).sum() / p.sum() - out[j, channel]) < 1e-5


@pytest.mark.parametrize("ops", ALL)
def test_select_breaks_ties_to_the_lower_row(ops: Ops) -> None:
    score = np.zeros((3, 40), np.float32)
    score[:, 30] = 1.0
    visible = np.array([[2], [35], [40]], np.int32)
    ids, valid = index.select(ops, ops.array(score), ops.array(visible), 4)
    assert np.array(ids).tolist() == [[0, 1, 0, 0], [0, 1, 2, 30], [0, 1, 2, 30]]
    assert np.array(valid).tolist() == [[True, True, False, False], [True] * 4, [True] * 4]


@pytest.mark.parametrize("ops", ALL)
def test_first_is_select_of_everything(ops: Ops) -> None:
    visible = ops.array(np.array([[0], [3], [5]], np.int32))
    score = ops.array(normal(3, 9))
    for x, y in zip(
        index.first(ops, visible, 5), index.select(ops, score, visible, 5), strict=True
    ):
        assert np.array(x).tolist() == np.array(y).tolist()


def test_index_scores() -> None:
    q, w, rows = normal(3, 2, 16), normal(3, 2, seed=1), normal(2 * index.TILE, 16, seed=2)
    same(index.scores, q, w, rows)
    expected = np.einsum("shj,sh->sj", np.maximum(np.einsum("shd,jd->shj", q, rows), 0), w)
    np.testing.assert_allclose(index.scores(HOST, q, w, rows), expected, atol=1e-4)


def test_attention_is_softmax_with_a_sink() -> None:
    q, rows, sink = normal(2, 3, 8), normal(2, 1, 6, 8, seed=1), normal(3, seed=2)
    shared = normal(1, 2, 4, 8, seed=3)
    valid = np.array([[[1, 1, 1, 0, 1, 0]], [[0, 0, 0, 0, 0, 1]]], bool)
    seen = np.array([[[1, 0, 0, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 0, 0, 0]]], bool)

    def run(ops: Ops, *a: Any) -> Any:
        return attend.attend(ops, a[0], [(a[1], a[2]), (a[3], a[4])], a[5])

    same(run, q, rows, valid, shared, seen, sink)
    out = run(HOST, q, rows, valid, shared, seen, sink)
    for s in range(2):
        keys = np.concatenate([rows[s, 0][valid[s, 0]], shared[0].reshape(8, 8)[seen[s].ravel()]])
        for h in range(3):
            logits = np.append(keys @ q[s, h] * 8**-0.5, sink[h]).astype(np.float64)
            p = np.exp(logits - logits.max())
            np.testing.assert_allclose(out[s, h], (p[:-1] @ keys) / p.sum(), atol=1e-5)


def test_router() -> None:
    logits, bias = normal(9, 12) * 30, normal(12, seed=1)

    def run(ops: Ops, g: Any, b: Any) -> Any:
        score = route.scores(ops, g)
        ids = route.choose(ops, score, b, 3)
        return score, ids, route.weights(ops, score, ids, 1.5)

    same(run, logits, bias)
    score, ids, weights = run(HOST, logits, bias)
    np.testing.assert_allclose(score, np.sqrt(np.logaddexp(0, logits)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(weights).sum(1), 1.5, rtol=1e-5)
    assert set(ids[0]) == set(np.argsort(-(score[0] + bias))[:3])  # the bias chooses only


@pytest.mark.parametrize("n", [1, 2, 17])
def test_experts(n: int) -> None:
    n_experts, d, inner, k = 5, 24, 16, 3
    w1, w2 = normal(n_experts, 2 * inner, d) / 5, normal(n_experts, d, inner, seed=1) / 4
    rng = np.random.default_rng(3)
    ids = np.stack([rng.permutation(n_experts)[:k] for _ in range(n)])
    x, weight = normal(n, d, seed=4), np.abs(normal(n, k, seed=5))

    def run(ops: Ops, x: Any, ids: Any, weight: Any) -> Any:
        built = []
        for w in (w1, w2):
            builder = ops.pack_experts(n_experts, w.shape[1], w.shape[2], ops.wide)
            for e in range(n_experts):
                builder.put(e, 0, w[e])
            built.append(builder.done())
        return moe.routed(ops, x, ids, weight, *built, 0.5)

    same(run, x, ids, weight)
    out = run(HOST, x, ids, weight)
    for t in range(n):
        expected = np.zeros(d)
        for e, g in zip(ids[t], weight[t], strict=True):
            a, b = np.split(w1[e].astype(np.float64) @ x[t], 2)
            a, b = np.minimum(a, 0.5), np.clip(b, -0.5, 0.5)
            expected += w2[e] @ (a / (1 + np.exp(-a)) * b * g)
        np.testing.assert_allclose(out[t], expected, atol=1e-5)


def test_rounding_agrees_between_the_two() -> None:
    x = (normal(6, 2, 192) * np.exp(normal(6, 2, 1, seed=1) * 4)).astype(np.float32)
    same(lambda ops, a: rounding.fp8_round(ops, a, 128), x, tolerance=0)
    same(lambda ops, a: rounding.fp4_round(ops, a), np.eye(128, dtype=np.float32), tolerance=1e-6)


@pytest.mark.parametrize("k", [24, 128, 256, 300, 1024])
@pytest.mark.parametrize("n", [5, 24, 96, 260])
def test_host_products_do_not_depend_on_the_row_count(k: int, n: int) -> None:
    weight, x = HOST.pack([(normal(n, k), HOST.wide)]), normal(130, k, seed=1)
    whole = HOST.project(x, weight)[0]
    for size in (1, 2, 3, 7, 64):
        for start in (0, 61):
            part = HOST.project(x[start : start + size], weight)[0]
            np.testing.assert_array_equal(part, whole[start : start + size])


def test_bfloat16_weights_keep_their_type_in_mlx() -> None:
    weight = MLX.pack([(normal(4, 8), mx.bfloat16), (normal(3, 8), mx.float32)])
    out = MLX.project(mx.array(normal(2, 8)), weight)
    assert [y.dtype for y in out] == [mx.bfloat16, mx.float32]
