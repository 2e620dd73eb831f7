"""The experts' shaders against plain arithmetic in float64."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np
import pytest

from ds4py.kernels import moe
from ds4py.kernels.build import Launcher
from ds4py.kernels.dense import Residual
from ds4py.kernels.formats import ExpertRecords, PackedMatrix, row_bytes
from ds4py.kernels.host import HostOps
from ds4py.kernels.ops import MlxOps, Ops, PackedWeight
from tests.kernels.near import bugs, compare, near, variants
from tests.kernels.packed import random_matrix, random_rows
from tests.kernels.shaders import LATER, caught, launcher

pytestmark = pytest.mark.shader

EXACT, MLX = cast(Ops, HostOps(np.float64)), cast(Ops, MlxOps())
FLOAT32, BFLOAT16 = 2e-6, 2**-7
LIMIT = 1.5
"""Low enough that a part of the gates and ups is cut."""


def normal(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def some_experts(n_slots: int, n_in: int, n_inner: int, up: str, down: str) -> ExpertRecords:
    """Random records with NaN between the maps: nothing may read it."""
    rng = np.random.default_rng(11)
    sizes = [n_inner * row_bytes(up, n_in)] * 2 + [n_in * row_bytes(down, n_inner)]
    starts, end = [], 0
    for size in sizes:
        starts.append(end + 64)
        end = starts[-1] + size
    data = np.full((n_slots, -(-end // 1024) * 1024), 0xFF, np.uint8)
    for slot in range(n_slots):
        for start, size, name in zip(starts, sizes, (up, up, down), strict=True):
            n = (n_inner, n_in)[name == down and start == starts[2]]
            width = n_in if start != starts[2] else n_inner
            data[slot, start : start + size] = random_rows(name, n, width, rng).ravel()
    w13 = tuple((slice(starts[i], starts[i] + sizes[i]), up) for i in (0, 1))
    w2 = ((slice(starts[2], starts[2] + sizes[2]), down),)
    return ExpertRecords.of(PackedWeight(data, w13, n_in), PackedWeight(data, w2, n_inner))


class Step(NamedTuple):
    """One step's experts."""

    rows: int
    n_in: int
    n_inner: int
    up: str
    down: str
    shared: str
    chosen: int = 2
    n_slots: int = 16

    @property
    def experts(self) -> ExpertRecords:
        return some_experts(self.n_slots, self.n_in, self.n_inner, self.up, self.down)

    @property
    def shared_maps(self) -> tuple[PackedMatrix, PackedMatrix, PackedMatrix]:
        rng = np.random.default_rng(12)
        gate, up = (random_matrix(self.shared, self.n_inner, self.n_in, rng) for _ in range(2))
        return gate, up, random_matrix(self.shared, self.n_in, self.n_inner, rng)

    @property
    def routing(self) -> tuple[Any, Any]:
        """Slots and weights; rows 1 and 2 share a slot with row 0 at another place."""
        rng = np.random.default_rng(13)
        slots = np.stack([rng.permutation(self.n_slots)[: self.chosen] for _ in range(self.rows)])
        for s in range(1, min(self.rows, 3)):
            others = [slot for slot in slots[s] if slot != slots[0, 0]]
            slots[s] = [*others, slots[0, 0]][-self.chosen :]
        weights = rng.uniform(0.1, 1, slots.shape).astype(np.float32)
        return slots.astype(np.int32), weights

    def residual(self, array: Any = mx.array) -> Residual:
        s, d = self.rows, self.n_in
        arrays = normal(s, 4, d, seed=4), normal(s, 20, seed=5), normal(24, 4 * d, seed=6) / 16
        return Residual(*map(array, arrays))


def activations(step: Step) -> Any:
    """Small enough that gates and ups, of about 1, are not differences of large products."""
    return normal(step.rows, step.n_in, seed=1) / 16


STEPS = {
    "two bits": Step(1, 256, 256, "IQ2_XXS", "Q2_K", "Q8_0"),
    "three rows": Step(3, 256, 256, "IQ2_XXS", "Q2_K", "Q8_0"),
    "four bits, eight rows": Step(8, 512, 256, "Q4_K", "Q4_K", "Q8_0"),
    "MXFP4": Step(2, 288, 96, "MXFP4", "MXFP4", "FP8"),
    "six of many": Step(1, 256, 40, "BF16", "F32", "BF16", chosen=6),
    "as wide as V4-Flash": Step(2, 4096, 32, "IQ2_XXS", "MXFP4", "Q8_0", n_slots=4),
    "as deep as V4-Flash": Step(1, 64, 2048, "MXFP4", "Q2_K", "Q8_0", n_slots=4),
}


@variants(STEPS, 1)
def test_gate_and_up(case: Step) -> None:
    step = case
    x, (slots, weights), experts = activations(step), step.routing, step.experts
    shared = step.shared_maps[:2]
    want = moe.gate_up_ref(EXACT, x, experts, slots, weights, shared, LIMIT)

    def launch(shaders: Launcher) -> Any:
        arrays = mx.array(slots), mx.array(weights)
        return [moe.gate_up(shaders, mx.array(x), experts, *arrays, shared, LIMIT)]

    near(launch, [want], FLOAT32)


def hidden(step: Step) -> Any:
    return normal(step.rows, step.chosen + 1, step.n_inner, seed=2)


def launch_down(step: Step, h: Any, shaders: Launcher) -> Any:
    slots = mx.array(step.routing[0])
    maps = step.experts, slots, step.shared_maps[2]
    return moe.down(shaders, mx.array(h), *maps, step.residual())


def want_down(step: Step, h: Any) -> Any:
    slots, shared = step.routing[0], step.shared_maps[2]
    return moe.down_ref(EXACT, h, step.experts, slots, shared, step.residual(np.array))


@variants(STEPS, 1)
def test_down(case: Step) -> None:
    step = case
    h = hidden(step)
    near(lambda shaders: launch_down(step, h, shaders), want_down(step, h), FLOAT32)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Rows that share a slot stage their activations in parts; sums keep each row's own order."""
    step, one = Step(5, 1280, 512, "IQ2_XXS", "Q2_K", "Q8_0"), 2
    shaders, shared, experts = launcher(), step.shared_maps, step.experts
    x = mx.array(activations(step)).astype(mx.bfloat16)
    slots, weights = map(mx.array, step.routing)
    whole = moe.gate_up(shaders, x, experts, slots, weights, shared[:2], LIMIT)
    a, b = slots[one : one + 1], weights[one : one + 1]
    part = moe.gate_up(shaders, x[one : one + 1], experts, a, b, shared[:2], LIMIT)
    compare([part], [whole[one : one + 1]], 0)
    after = step.residual()
    after = Residual(after.streams.astype(mx.bfloat16), after.gates, after.fn)
    alone = Residual(after.streams[one : one + 1], after.gates[one : one + 1], after.fn)
    both = moe.down(shaders, whole, experts, slots, shared[2], after)
    single = moe.down(shaders, part, experts, a, shared[2], alone)
    compare(single, [both[0][one : one + 1], both[1][:, one : one + 1]], 0)


@LATER
def test_experts_in_bfloat16() -> None:
    step = STEPS["three rows"]
    slots, weights = map(mx.array, step.routing)
    x = mx.array(activations(step)).astype(mx.bfloat16)
    gate, up, down = (PackedMatrix(m.format, mx.array(m.rows), m.n_in) for m in step.shared_maps)
    e = step.experts
    experts = ExpertRecords(mx.array(e.records), e.formats, e.starts, e.n_in, e.n_inner)
    want = moe.gate_up_ref(MLX, x, experts, slots, weights, (gate, up), LIMIT)
    args = x, experts, slots, weights, (gate, up), LIMIT
    near(lambda shaders: [moe.gate_up(shaders, *args)], [want], BFLOAT16)

    def prompt(shaders: Launcher) -> Any:
        grouping = moe.group(shaders, slots, step.n_slots)
        h = moe.matmul_gate_up(shaders, x, experts, grouping, *args[2:])
        return [h, moe.matmul_down(shaders, want, experts, grouping, slots, down)]

    near(prompt, [want, moe.matmul_down_ref(MLX, want, experts, slots, down)], BFLOAT16)
    after = step.residual()
    after = Residual(after.streams.astype(mx.bfloat16), after.gates, after.fn)
    sums = moe.down_ref(MLX, want, experts, slots, down, after)
    near(lambda shaders: moe.down(shaders, want, experts, slots, down, after), sums, BFLOAT16)


@bugs(
    "right wrong",
    [
        ("min(out[i], limit[0])", "out[i]"),
        ("clamp(out[together * width + i], -limit[0], limit[0])", "out[together * width + i]"),
        ("tile % TILES * TILE", "0"),
        ("exp(-gate)", "exp(gate)"),
        ("record + UP", "record + GATE"),
        ("chosen[e] == slot && (e == entry || e / KTOP > row)", "e == entry"),
        ("places[s] / PLACES * D", "s * D"),
    ],
    1,
)
def test_a_wrong_gate_or_up_is_noticed(right: str, wrong: str) -> None:
    step = STEPS["three rows"]
    x, (slots, weights), experts = activations(step), step.routing, step.experts
    shared = step.shared_maps[:2]
    want = moe.gate_up_ref(EXACT, x, experts, slots, weights, shared, LIMIT)
    arrays = mx.array(x), experts, mx.array(slots), mx.array(weights), shared, LIMIT
    caught(
        lambda shaders: compare([moe.gate_up(shaders, *arrays)], [want], FLOAT32),
        {"moe_gate_up": (right, wrong)},
    )


@bugs(
    "right wrong",
    [
        ("j <= KTOP", "j < KTOP"),
        ("terms[places[i / TILE] * TILE", "terms[i / TILE * TILE"),
        ("RECORD + DOWN", "RECORD"),
        ("values + places[s] * I", "values + s * I"),
        ("threadgroup_barrier(mem_flags::mem_threadgroup);\n  for (int i", "for (int i"),
    ],
    1,
)
def test_a_wrong_down_is_noticed(right: str, wrong: str) -> None:
    step = STEPS["two bits"]
    h = hidden(step)
    want = want_down(step, h)
    caught(
        lambda shaders: compare(launch_down(step, h, shaders), want, FLOAT32),
        {"moe_down": (right, wrong)},
    )


PROMPTS = {
    "two bits": Step(40, 256, 72, "IQ2_XXS", "F16", "BF16"),
    "one position": Step(1, 64, 32, "MXFP4", "MXFP4", "FP8", n_slots=40),
    "many for one": Step(45, 256, 256, "Q4_K", "Q2_K", "Q8_0", n_slots=3),
}


@pytest.mark.parametrize(
    ("s", "k", "n", "left_out"),
    [(1, 1, 1, 0), (1, 6, 256, 0), (5, 2, 3, 0.5), (700, 3, 300, 0), (40, 2, 16, 1)],
)
def test_grouping(s: int, k: int, n: int, left_out: float) -> None:
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(n)[: min(k, n)] for _ in range(s)]).astype(np.int32)
    ids = np.where(rng.random(ids.shape) < left_out, np.int32(-1), ids)

    def launch(shaders: Launcher) -> Any:
        made = moe.group(shaders, mx.array(ids), n)
        return [made.order, made.tiles]

    near(launch, moe.group_ref(ids, n), 0)


class Prompt(NamedTuple):
    """One launch of each of the two products."""

    step: Step

    @property
    def x(self) -> Any:
        return activations(self.step)

    def gate_up(self, shaders: Launcher, first: int = 0, last: int | None = None) -> Any:
        """Of positions first..last. An expert does not lie in the slot of its number."""
        slots, weights = (mx.array(a[first:last]) for a in self.step.routing)
        grouping = moe.group(shaders, self.step.n_slots - 1 - slots, self.step.n_slots)
        maps = self.step.experts, grouping, slots, weights, self.step.shared_maps[:2], LIMIT
        return moe.matmul_gate_up(shaders, mx.array(self.x[first:last]), *maps)

    def down(self, shaders: Launcher) -> Any:
        slots = mx.array(self.step.routing[0])
        grouping = moe.group(shaders, self.step.n_slots - 1 - slots, self.step.n_slots)
        maps = self.step.experts, grouping, slots, self.step.shared_maps[2]
        return moe.matmul_down(shaders, mx.array(hidden(self.step)), *maps)

    def want_gate_up(self) -> Any:
        shared = self.step.shared_maps[:2]
        return moe.gate_up_ref(EXACT, self.x, self.step.experts, *self.step.routing, shared, LIMIT)

    def want_down(self) -> Any:
        maps = self.step.experts, self.step.routing[0], self.step.shared_maps[2]
        return moe.matmul_down_ref(EXACT, hidden(self.step), *maps)


@variants(PROMPTS, 1)
def test_prompt(case: Step) -> None:
    prompt = Prompt(case)
    near(lambda shaders: [prompt.gate_up(shaders)], [prompt.want_gate_up()], FLOAT32)
    near(lambda shaders: [prompt.down(shaders)], [prompt.want_down()], FLOAT32)


def test_a_position_does_not_depend_on_the_prompt() -> None:
    prompt, shaders = Prompt(PROMPTS["two bits"]), launcher()
    whole = prompt.gate_up(shaders)
    compare([prompt.gate_up(shaders, 7, 30)], [whole[7:30]], 0)
    compare([prompt.gate_up(shaders, 39)], [whole[39:]], 0)


@bugs(
    "kernel right wrong",
    [
        ("moe_group", "(t - first_tiles[expert]) * BM", "0"),
        ("moe_group", "firsts[e + 1] += firsts[e];", ""),
        ("moe_matmul_gate_up", "record + UP", "record + GATE"),
        ("moe_matmul_gate_up", "HALF + c], -limit", "c], -limit"),
        ("moe_matmul_gate_up", "(begin + i) * PLACES + KTOP", "i * PLACES + KTOP"),
        ("moe_matmul_gate_up", "if (c >= n_rows) continue;", ""),
        ("moe_matmul_down", "terms[ulong(places[r])", "terms[ulong(r)"),
        ("moe_matmul_down", "slots[order[begin]]", "tiles[3 * tile]"),
    ],
    1,
)
def test_a_wrong_prompt_is_noticed(kernel: str, right: str, wrong: str) -> None:
    prompt = Prompt(PROMPTS["many for one" if kernel == "moe_group" else "two bits"])
    want_h, want_terms = prompt.want_gate_up(), prompt.want_down()

    def check(shaders: Launcher) -> None:
        if kernel != "moe_matmul_down":
            compare([prompt.gate_up(shaders)], [want_h], FLOAT32)
        else:
            compare([prompt.down(shaders)], [want_terms], FLOAT32)

    caught(check, {kernel: (right, wrong)})
