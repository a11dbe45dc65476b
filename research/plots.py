"""What the plots of the comparisons have in common."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

POINT = 4  # pixels from the middle of a point that its neighbours' names keep away


def label_points(axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Names each point beside it, to the right or to the left, as near as the name can be without lying over another
    name, over another point or over the frame.

    Args:
        axes: of matplotlib, with all points drawn and with their final limits.
        points: name, x and y of each.
    """
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()
    places = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - POINT, y - POINT, 2 * POINT, 2 * POINT) for x, y in places]
    for name, *place in sorted(points, key=lambda point: point[1:]):
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
            inside = all(axes.bbox.contains(*corner) for corner in ((box.x0, box.y0), (box.x1, box.y1)))
            if inside and not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        else:
            axes.add_artist(note)
        taken.append(box)
