"""The race detector against a definition: random programs, every pair of accesses compared.

A program gives each of 96 threads in each phase an access to one of eight elements, or none, and
after each phase nothing, a simdgroup_barrier or a threadgroup_barrier for all.
"""

from itertools import combinations, product

import numpy as np
import pytest

pytest.importorskip("ziglang")

from tools.metal_cpu import Kernel, ShaderError

pytestmark = pytest.mark.shader

THREADS, CELLS = 96, 8
NOTHING, SIMDGROUP, THREADGROUP, OTHER_MEMORY = range(4)
READ, WRITE = 1, 9

SHARED = Kernel(
    "shared_cells",
    ["program", "barriers"],
    ["o"],
    """
    threadgroup int s[8];
    const uint t = thread_position_in_threadgroup.x;
    if (t < 8) s[t] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    int x = 0;
    for (int p = 0; p < barriers_shape[0]; p++) {
      const int op = program[p * 96 + t];
      if (op > 8) s[op - 9] = t;
      else if (op > 0) x += s[op - 1];
      if (barriers[p] == 1) simdgroup_barrier(mem_flags::mem_threadgroup);
      if (barriers[p] == 2) threadgroup_barrier(mem_flags::mem_threadgroup);
      if (barriers[p] == 3) threadgroup_barrier(mem_flags::mem_device);
    }
    o[t] = x;
    """,
)
DEVICE = Kernel(
    "device_cells",
    ["program", "barriers"],
    ["o", "s"],
    SHARED.source.replace("threadgroup int s[8];", "")
    .replace("if (t < 8) s[t] = 0;", "")
    .replace("mem_device", "mem_none")
    .replace("mem_threadgroup", "mem_device"),
)


def program(threads: tuple, accesses: tuple, barriers: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Ops [phases, threads] (0: none, 1-8: read, 9-16: write) and the barriers after each phase."""
    ops = np.zeros((len(threads), THREADS), np.int32)
    ops[np.arange(len(threads)), threads] = accesses
    return ops, np.array([*barriers, NOTHING], np.int32)


def races(ops: np.ndarray, barriers: np.ndarray) -> set[int]:
    """Elements on which two threads' accesses, one of them a write, have no order."""
    found = set()
    accesses = [(p, t, int(ops[p, t])) for p, t in zip(*np.nonzero(ops), strict=True)]
    for (p, t, op), (q, u, other) in combinations(accesses, 2):
        cell = (op - 1) % CELLS
        between = barriers[p:q]
        ordered = THREADGROUP in between or (t // 32 == u // 32 and SIMDGROUP in between)
        if cell == (other - 1) % CELLS and t != u and max(op, other) > CELLS and not ordered:
            found.add(cell)
    return found


def reported(kernel: Kernel, ops: np.ndarray, barriers: np.ndarray, seed: int) -> set[int]:
    shapes = [(THREADS,), (CELLS,)][: len(kernel.output_names)]
    try:
        kernel(
            inputs=[ops, barriers],
            grid=(THREADS, 1, 1),
            threadgroup=(THREADS, 1, 1),
            output_shapes=shapes,
            output_dtypes=["int32"] * len(shapes),
            init_value=0,
            mode="check",
            seed=seed,
        )
    except ShaderError as error:
        assert {r.kind for r in error.reports} == {"race"}
        assert {r.buffer for r in error.reports} == {"s"}
        return {int(str(r).split("on byte ")[1].split()[0]) // 4 for r in error.reports}
    return set()


@pytest.mark.parametrize("kernel", [SHARED, DEVICE], ids=lambda k: k.name)
def test_three_accesses_in_every_way(kernel: Kernel) -> None:
    """Whether there is a race does not depend on the order; where one is named, there is one."""
    ways = product(
        product([0, 1, 33], repeat=3), product([READ, WRITE], repeat=3), product(range(3), repeat=2)
    )
    for number, way in enumerate(ways):
        ops, barriers = program(*way)
        assert reported(kernel, ops, barriers, number % 4) == races(ops, barriers), way


@pytest.mark.parametrize("kernel", [SHARED, DEVICE], ids=lambda k: k.name)
def test_more_accesses_at_random(kernel: Kernel) -> None:
    rng = np.random.default_rng(3)
    for _ in range(500):
        threads, accesses = rng.choice([0, 1, 2, 33, 34, 65], 6), rng.choice([1, 2, 9, 10], 6)
        ops, barriers = program(threads, accesses, rng.choice(4, 5, p=[0.2, 0.3, 0.3, 0.2]))
        wanted, found = races(ops, barriers), reported(kernel, ops, barriers, int(rng.integers(4)))
        assert found <= wanted, (threads, accesses, barriers)  # one report for each place only
        assert bool(found) == bool(wanted), (threads, accesses, barriers)
