"""Sampling: the noise is what it claims to be, and the shader draws what plain operations draw."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import sample
from ds4py.kernels.build import Launcher
from tests.kernels.shaders import LATER, caught, host, shader_runs


def keys(seed: int, positions: range) -> Any:
    return mx.array(np.stack([sample.noise_key(seed, p) for p in positions]))


def test_noise_is_gumbel() -> None:
    """Kolmogorov-Smirnov over 200,000 draws, over ids and over positions."""
    for noise in (
        np.array(sample.gumbel(keys(3, range(4)), 50_000)).ravel(),
        np.array(sample.gumbel(keys(3, range(50_000)), 4)).ravel(),
    ):
        below = np.exp(-np.exp(-np.sort(noise.astype(np.float64))))
        steps = np.arange(noise.size + 1) / noise.size
        distance = max(np.abs(below - steps[1:]).max(), np.abs(below - steps[:-1]).max())
        assert distance < 1.95 / np.sqrt(noise.size)  # 0.1 % point


def test_neighbouring_draws_do_not_agree() -> None:
    """Correlation between neighbouring ids, positions and seeds is that of independent draws."""
    noise = np.array(sample.gumbel(keys(3, range(400)), 400)).astype(np.float64)
    other = np.array(sample.gumbel(keys(4, range(400)), 400)).astype(np.float64)
    pairs = ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise, other))
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)


def test_the_likeliest_events_keep_their_resolution() -> None:
    """The noise that wins among 100,000 ids takes many values, not a few steps of a coarse grid."""
    top = np.array(sample.gumbel(keys(5, range(200)), 100_000)).max(1)
    assert len(np.unique(top)) == 200


class Case:
    """Logits of n rows, each with settings of its own."""

    def __init__(self, n: int, v: int, penalised: bool = False, biased: bool = False):
        rng = np.random.default_rng(v + n)
        self.logits = mx.array(rng.standard_normal((n, v)).astype(np.float32) * 4)
        settings = rng.uniform(0.5, 1.5, (n, 5)).astype(np.float32)
        settings[:, 1] = np.log(rng.uniform(0, 0.2, n) + 1e-9)
        self.settings, self.key = mx.array(settings), keys(7, range(n))
        self.optional: dict[str, Any] = {}
        if penalised:
            counts = rng.integers(0, 3, (n, v)) * (rng.random((n, v)) < 0.3)
            self.optional["counts"] = mx.array(counts.astype(np.float32))
            self.optional["in_prompt"] = mx.array(rng.random((n, v)) < 0.3)
        if biased:
            bias = rng.standard_normal((n, v)).astype(np.float32)
            self.optional["bias"] = mx.array(np.where(rng.random((n, v)) < 0.2, -np.inf, bias))

        top = np.array(self.scaled(False).max(1)) - 0.7
        top[1::2] = -np.inf
        self.lowest = mx.array(top)

    def run(self, launcher: Launcher, greedy: bool = False) -> Any:
        given = (self.logits, self.settings, self.key, self.lowest)
        return [sample.token(launcher, *given, **self.optional, greedy=greedy)]

    def compare(self, made: Any, greedy: bool = False) -> None:
        """The same token, unless two draws are closer than rounding."""
        given = (self.logits, self.settings, self.key, self.lowest)
        wanted = host([sample.token_ref(*given, **self.optional, greedy=greedy)])[0]
        found = host(made)[0]
        for row in np.flatnonzero(found != wanted):
            x = np.array(self.drawn(greedy))[row]
            assert abs(x[found[row]] - x[wanted[row]]) < 1e-5, (found[row], wanted[row])

    def drawn(self, greedy: bool) -> Any:
        x = self.scaled(greedy)
        return x if greedy else x + sample.gumbel(self.key, x.shape[1])

    def scaled(self, greedy: bool) -> Any:
        seen = (self.optional.get(name) for name in ("in_prompt", "counts", "bias"))
        x = sample.adjusted(self.logits, self.settings, *seen)
        return x if greedy else x / self.settings[:, :1]


@pytest.mark.shader
@pytest.mark.parametrize(("n", "v"), [(1, 5), (3, 96), (2, 2048), (9, 1500)])
@pytest.mark.parametrize("penalised", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_token(n: int, v: int, penalised: bool, greedy: bool) -> None:
    case = Case(n, v, penalised, biased=penalised)
    for made in shader_runs(lambda launcher: case.run(launcher, greedy)):
        case.compare(made, greedy)


@LATER
@pytest.mark.shader
def test_token_of_flash() -> None:
    case = Case(1, 129280)
    for made in shader_runs(case.run):
        case.compare(made)


@pytest.mark.shader
def test_equal_logits_give_the_lowest_id() -> None:
    case = Case(2, 700)
    case.logits = mx.zeros((2, 700)).at[:, 650:].add(1.0)
    for made in shader_runs(lambda launcher: case.run(launcher, True)):
        assert host(made)[0].tolist() == [650, 650]


@LATER
@pytest.mark.shader
@pytest.mark.parametrize(
    "change",
    [
        ("x *= 0x7feb352du", "x *= 0x7feb352fu"),
        ("mix_bits(counter + high) ^ low", "mix_bits(counter + high)"),
        ("-log(-log_one_plus(-uniform))", "-log(uniform)"),
        ("if (x < limit) continue;", ""),
        ("best.value + settings[row * 5 + 1]", "best.value"),
        ("max(lowest[row],", "max(-INFINITY,"),
        ("in_prompt || count > 0.0f", "count > 0.0f"),
        ("frequency * count", "frequency"),
        ("x > 0.0f ? x / repetition", "x <= 0.0f ? x / repetition"),
        ("if (BIASED) x += bias[base + id];", ""),
        ("i < SAMPLE_THREADS / 32; i++) best", "i < 1; i++) best"),
        ("noise_key[row * 2 + 1]", "noise_key[1]"),
    ],
)
def test_token_planted(change: tuple[str, str]) -> None:
    cases = [Case(40, 96, True, True), Case(40, 600)]

    def check(launcher: Launcher) -> None:
        for case in cases:
            case.compare(case.run(launcher))

    caught(check, {"sample_token": change})


class Bound:
    """Rows with logits, settings and bounds of their own."""

    def __init__(self, n: int, v: int, optional: bool = False, ties: bool = False):
        self.case = Case(n, v, optional, optional)
        rng = np.random.default_rng(n * v)
        k = rng.choice([0, 1, 2, v // 3, v, v + 5], n).astype(np.float32)
        self.bounds = np.stack([k, rng.choice([1, 0.9, 0.5, 1e-6, 0.999], n)], 1)
        self.bounds[:2] = [[min(v, 7), 0.8], [0, 0.3]][:n]
        if ties:
            self.case.logits = mx.round(self.case.logits)

    def run(self, launcher: Launcher) -> Any:
        given = (self.case.logits, self.case.settings, mx.array(self.bounds.astype(np.float32)))
        return list(sample.bound(launcher, *given, **self.case.optional))

    def compare(self, made: Any) -> None:
        """The k of float sums may end one place before or after a boundary of p."""
        scaled, lowest = host(made)
        wanted = np.array(self.case.scaled(False))
        np.testing.assert_allclose(scaled, wanted, rtol=1e-6)
        for x, least, (k, p) in zip(scaled.astype(np.float64), lowest, self.bounds, strict=True):
            ordered = np.sort(x)[::-1]
            within = ordered[int(k) - 1] if 0 < k <= len(x) else ordered[-1]
            if p >= 1:
                assert least == within or (least == -np.inf and k == 0)
                continue
            mass = np.where(x >= within, np.exp(x - x.max()), 0)
            mass /= mass.sum()
            assert least in x and mass[x > least].sum() < p + 1e-5
            assert mass[x >= least].sum() >= p - 1e-5


@pytest.mark.shader
@pytest.mark.parametrize(("n", "v"), [(1, 5), (3, 96), (9, 1500)])
@pytest.mark.parametrize("optional", [False, True])
def test_bound(n: int, v: int, optional: bool) -> None:
    case = Bound(n, v, optional, ties=n == 9)
    for made in shader_runs(case.run):
        case.compare(made)
    given = (case.case.logits, case.case.settings, mx.array(case.bounds.astype(np.float32)))
    case.compare(sample.bound_ref(*given, **case.case.optional))


@LATER
@pytest.mark.shader
def test_bound_of_flash() -> None:
    case = Bound(1, 129280)
    for made in shader_runs(case.run):
        case.compare(made)


@LATER
@pytest.mark.shader
@pytest.mark.parametrize(
    "change",
    [
        ("key >= found + (i << shift)", "key > found + (i << shift)"),
        ("if (key < least) continue;", ""),
        ("exp(x - highest)", "exp(x)"),
        ("shift >= 0; shift -= 2", "shift >= 2; shift -= 2"),
        ("sums[i] >= enough", "sums[i] > enough"),
        ("bounds[row * 2 + 1] * sums[0]", "bounds[row * 2 + 1]"),
        ("x = x / settings[row * 5];", ""),
        ("j < SAMPLE_THREADS / 32", "j < 1"),
        ("? key ^ 0x80000000u : ~key", "? key ^ 0x80000000u : key"),
    ],
)
def test_bound_planted(change: tuple[str, str]) -> None:
    cases = [Bound(40, 96, True), Bound(40, 600, ties=True)]
    cases[0].case.logits = cases[0].case.logits - 4
    cases[1].case.logits = cases[1].case.logits + 200

    def check(launcher: Launcher) -> None:
        for case in cases:
            case.compare(case.run(launcher))

    caught(check, {"sample_bound": change})
