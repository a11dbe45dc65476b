"""What the plots of the comparisons have in common."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any


def label_points(axes: Any, places: Mapping[str, tuple[float, float]]) -> None:
    """Names each point beside it, to the right or to the left and as near as no other name is in the way."""
    axes.figure.draw_without_rendering()
    taken: list[Any] = []
    for name, place in sorted(places.items(), key=lambda entry: entry[1]):
        choices = sorted(product((0, 11, -11, 22, -22), (6, -6)), key=lambda offset: abs(offset[0]))
        for height, side in choices:
            note = axes.annotate(
                name,
                place,
                xytext=(side, height),
                textcoords="offset points",
                fontsize=8,
                va="center",
                ha="left" if side > 0 else "right",
            )
            box = note.get_window_extent()
            if axes.bbox.contains(box.x0, box.y0) and not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        else:
            axes.add_artist(note)
        taken.append(box)
