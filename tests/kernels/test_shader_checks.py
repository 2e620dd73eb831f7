"""Check mode sees what results on a CPU may not show: a missing barrier, a place past the end."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from tests.kernels import test_attend, test_heads, test_hyper, test_index, test_sample, test_state
from tests.kernels.shaders import LATER, Run, caught, run_only
from tests.kernels.test_heads import TINY, layer

pytestmark = [pytest.mark.shader, LATER]
UNROLLED = "\n  MLX_MTL_PRAGMA_UNROLL\n  "
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def pre() -> Run:
    return test_hyper.Pre(1, 256, 3, 9, mx.float32).run


def embed() -> Run:
    return test_hyper.Embed(9, 96, 24, mx.float32, "F32").run


def embed_points() -> Run:
    return test_hyper.Embed(2, 256, 24, mx.float32, "IQ2_XXS").run


def prepare() -> Run:
    return test_heads.Step(layer(TINY, "indexed"), 3, 30, mx.float32).prepare


def rows() -> Run:
    return test_heads.Step(layer(TINY, "indexed"), 3, 30, mx.float32).rows


def attend() -> Run:
    return test_attend.Case(TINY, 2, 300, 24).run


def search() -> Run:
    case = test_index.exact(test_index.Case(TINY, 1, 4 * 1024, 32), "rising")
    return lambda launcher: case.run(launcher, 2)


def search_in_parts() -> Run:
    """More candidates than one round takes."""
    case = test_index.Case(TINY, 1, 4 * 1024, 32)
    return lambda launcher: case.run(launcher, 16)


def token() -> Run:
    return test_sample.Case(2, 700).run


def stack() -> Run:
    return test_state.Case(3, 3, 3, 5, 4, 66, mx.uint8).run


@pytest.mark.parametrize(
    ("run", "kernel", "before", "after"),
    [
        (pre, "hyper_pre", "", "\n\nfloat squares"),
        (pre, "hyper_pre", "square_sums[group] = mine;\n", ""),
        (embed, "hyper_embed", "", "\nfor (uint r = group"),
        (embed_points, "hyper_embed", "", "\n}"),
        (rows, "compress_rows", "", ""),
        (attend, "attend_split", "\n  ", UNROLLED + "for (uint i = 0; i < ENTRIES"),
        (attend, "attend_split", "", UNROLLED + "for (uint h = 0; h < HEADS / 8; h++) {\n    co"),
        (search, "index_candidates", "", "\n\nconst uint n_rows"),
        (search, "index_candidates", "", "\n  const uint id = first"),
        (search, "index_candidates", "", "\n  uint at ="),
        (search_in_parts, "index_merge", "", "\n  return list"),
        (search, "index_candidates", "", "\n    }\n  }\n}"),
        (search, "index_merge", "", "\n// Ascending row numbers"),
        (search, "index_merge", "", "\nsort_pairs"),
        (token, "sample_token", "", "\n  Best best"),
        (token, "sample_token", "", "\n  return best"),
    ],
)
def test_every_barrier_is_needed(
    run: Callable[[], Run], kernel: str, before: str, after: str
) -> None:
    change = (before + BARRIER + after, before + after)
    caught(run_only(run()), {kernel: change}, mode="check")


@pytest.mark.parametrize(
    ("run", "kernel", "change"),
    [
        (pre, "hyper_pre", ("(size_t(row) * H + h)", "(size_t(row + 1) * H + h)")),
        (embed, "hyper_embed", ("< n_rows && channel < D", "<= n_rows && channel < D")),
        (prepare, "heads_prepare", ("< INDEX_JOBS + INDEX_HEADS", "<= INDEX_JOBS + INDEX_HEADS")),
        (rows, "compress_rows", ("token - s.start + kept", "token - s.start + 9 * kept")),
        (attend, "attend_split", ("at < W - 1 ?", "at <= W + 5 ?")),
        (attend, "attend_merge", ("lane < n_parts) {", "lane <= n_parts) {")),
        (search, "index_candidates", ("size_t(place[1])", "size_t(place[1] + 1)")),
        (token, "sample_token", ("id < V; id +=", "id <= V; id +=")),
        (stack, "state_stack", ("size_t(row - OLD) * WORDS", "size_t(row) * WORDS")),
    ],
)  # fmt: skip
def test_reads_past_the_end_are_reported(
    run: Callable[[], Any], kernel: str, change: tuple[str, str]
) -> None:
    caught(run_only(run()), {kernel: change}, mode="check")
