"""Draws the pictures of docs/attention.md, docs/images/visibility-*.png, and prints their numbers.

Each picture is a mask: rows are queries, columns keys; dark is seen, lines are the borders of the steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from arimg.layout import RULES, Layout, Visibility, pack

SMALL = Layout.scales([1, 2, 3, 4])
PREFIX = 6
CELL = 6
SEEN, UNSEEN, PREFIX_SEEN, LINE = (38, 70, 120), (240, 240, 236), (196, 106, 50), (190, 190, 186)


def draw(seen: Visibility, borders: list[int], special: int = 0) -> Image.Image:
    """special: the first keys, in another colour."""
    mask = seen.mask().numpy()
    cells = np.where(mask[..., None], SEEN, UNSEEN).astype(np.uint8)
    cells[:, :special][mask[:, :special]] = PREFIX_SEEN
    image = cells.repeat(CELL, 0).repeat(CELL, 1)
    for border in borders[:-1]:
        image[border * CELL] = LINE
        image[:, border * CELL] = LINE
    return Image.fromarray(image).quantize(8)


def main() -> None:
    folder = Path(__file__).parent / "images"
    ends = [end for _, end in SMALL.segments]
    for rule in RULES:
        draw(SMALL.visibility(rule), ends).save(folder / f"visibility-{rule}.png", optimize=True)
    prefixed = [PREFIX, *(PREFIX + end for end in ends)]
    draw(SMALL.visibility("level-causal", prefix=PREFIX), prefixed, PREFIX).save(
        folder / "visibility-prefix.png", optimize=True
    )
    draw(SMALL.visibility("level-diagonal", sinks=1), ends, 1).save(
        folder / "visibility-sinks.png", optimize=True
    )
    diagonals = Layout.diagonals(5, 6)
    draw(diagonals.visibility("level-causal"), [end for _, end in diagonals.segments]).save(
        folder / "visibility-diagonals.png", optimize=True
    )
    parts = [Layout.groups([p] + [1] * r).visibility("level-causal") for p, r in ((9, 6), (6, 3), (4, 2))]
    borders = np.cumsum([part.length for part in parts]).tolist()
    draw(pack(parts), borders).save(folder / "visibility-packed.png", optimize=True)

    scales = {
        680: Layout.scales([1, 2, 3, 4, 5, 6, 8, 10, 13, 16]),
        2240: Layout.scales([1, 2, 3, 4, 6, 9, 13, 18, 24, 32]),
        9451: Layout.scales([1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64]),
    }
    print("| rule | " + " | ".join(f"L = {n}" for n in scales) + " |\n|---|" + "--:|" * len(scales))
    for rule in RULES:
        columns = []
        for layout in scales.values():
            seen = layout.visibility(rule)
            visited, squares = seen.tiles_visited()
            columns.append(f"{seen.density:.1%} ({visited} of {squares}, {visited / squares:.1%})")
        print(f"| {rule} | " + " | ".join(columns) + " |")


if __name__ == "__main__":
    main()
