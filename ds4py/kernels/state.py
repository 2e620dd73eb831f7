"""Stacking of what a step's layers add to the state."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from ds4py.kernels.build import SMALL, Launcher
from ds4py.kernels.ops import Array, Ops

MOST_ARRAYS = 24
"""Layers of one launch: Metal binds at most 31 arrays."""
WORDS = ((8, mx.uint64), (4, mx.uint32), (2, mx.uint16), (1, mx.uint8))


def stack(
    launcher: Launcher,
    layers: Sequence[Array],
    n_taken: int,
    n_kept: int,
    old: Array | None = None,
    n_unread: Array | None = None,
) -> Array:
    """The last `n_kept` rows of each layer's old ones and the first `n_taken` of its new ones.

    layers: [n, width] each, n >= n_taken, of one type; old [len(layers), n_old, width]. With
    n_kept == n_taken and no old rows: a plain stack. -> [len(layers), n_kept, width].

    n_unread int32 [1]: how many of a layer's kept rows nobody will read, from the first on; they
    become zeros.
    """
    first = layers[0]
    n_old = 0 if old is None else old.shape[1]
    assert n_kept <= n_old + n_taken and first.size >= SMALL
    row_bytes = first.shape[1] * first.dtype.size
    size, word = next((n, word) for n, word in WORDS if row_bytes % n == 0)
    template = (("U", word), ("WORDS", row_bytes // size), ("OLD", n_old))
    unread = mx.array([0]) if n_unread is None else n_unread
    made = []
    for at in range(0, len(layers), MOST_ARRAYS):
        group = list(layers[at : at + MOST_ARRAYS])
        unused = [first] * (MOST_ARRAYS - len(group))
        place = mx.array([at, n_taken])
        inputs = (place, unread, first if old is None else old, *group, *unused)
        shape = (len(group), n_kept, first.shape[1])
        made += launcher.launch(
            "state_stack",
            inputs,
            template,
            (row_bytes // size, n_kept, len(group)),
            (min(row_bytes // size, 256), 1, 1),
            [(shape, first.dtype)],
        )
    return made[0] if len(made) == 1 else mx.concatenate(made)


def stack_ref(
    ops: Ops,
    layers: Sequence[Array],
    n_taken: int,
    n_kept: int,
    old: Array | None = None,
    n_read: int | None = None,
) -> Array:
    """What `stack` computes. n_read: how many rows, the last, will be read; here all are kept."""
    rows = ops.stack([layer[:n_taken] for layer in layers])
    if old is not None:
        rows = ops.concatenate([old, rows], axis=1)
    return rows[:, rows.shape[1] - n_kept :]
