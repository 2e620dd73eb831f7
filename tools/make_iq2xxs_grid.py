"""Writes ds4py/formats/gguf_blocks/tables.py from the data of the `gguf` package.

    python tools/make_iq2xxs_grid.py > ds4py/formats/gguf_blocks/tables.py

The 256 points of IQ2_XXS are part of the format: they were found by their author's search and
follow from no formula, so they are taken from the package and never typed by hand.
"""

import numpy as np
from gguf.quants import IQ2_XXS

HEADER = '''"""The 256 points of IQ2_XXS. Made by tools/make_iq2xxs_grid.py; not edited by hand.

Source: ggml's format (MIT licence), through the data of the `gguf` package.
"""

import numpy as np

MAGNITUDES = {magnitudes}
"""What the codes 0, 1 and 2 of a coordinate stand for."""

# 16 bits a point, 2 bits a coordinate, the first coordinate lowest; little-endian.
_POINTS = bytes.fromhex(
{lines}
)

IQ2XXS_CODES = (np.frombuffer(_POINTS, "<u2")[:, None] >> np.arange(0, 16, 2)).astype(np.uint8) & 3
"""Coordinate codes of the points, [256, 8]."""
IQ2XXS_GRID = np.array(MAGNITUDES, np.float32)[IQ2XXS_CODES]
"""Coordinates of the points, [256, 8] float32."""
'''


def main() -> None:
    IQ2_XXS.init_grid()
    grid = np.asarray(IQ2_XXS.grid).reshape(256, 8)
    magnitudes = np.unique(grid)
    codes = np.searchsorted(magnitudes, grid).astype(np.uint32)
    points = (codes << np.arange(0, 16, 2)).sum(-1).astype("<u2").tobytes().hex()
    lines = "\n".join(f'    "{points[i : i + 64]}"' for i in range(0, len(points), 64))
    print(HEADER.format(magnitudes=tuple(int(m) for m in magnitudes), lines=lines), end="")


if __name__ == "__main__":
    main()
