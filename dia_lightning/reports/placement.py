"""Labels beside the points of a plot, where they cover nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEAR = 13  # points; a label farther away has a line to its point
_OFFSETS = [
    (round(r * math.cos(math.radians(a)), 1), round(r * math.sin(math.radians(a)), 1))
    for r in (7, 12, 20, 30, 42, 56) for a in (0, 180, 90, 270, 45, 135, 315, 225)
]  # fmt: skip


Bar = tuple[float, float, float, float]


class Box(NamedTuple):
    """A rectangle in pixels, from the lower left."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, width) * max(0.0, height)


def label_points(ax: Axes, points: Iterable[tuple[float, float, str]], bars: Iterable[Bar], renderer: Any) -> None:
    """Write the text of each point (x, y, text) at the nearest place with least overlap; "" only keeps its point free.

    bars: (x, x, y, y) of lines that should stay free too. The axes must have their final limits and place.
    """
    points = list(points)
    at = [tuple(ax.transData.transform((x, y))) for x, y, _ in points]
    taken = [Box(x - 4, y - 4, 8, 8) for x, y in at]
    for x0, x1, y0, y1 in bars:
        (left, low), (right, high) = ax.transData.transform([(x0, y0), (x1, y1)])
        taken.append(Box(left - 1, low - 1, right - left + 2, high - low + 2))
    inside = Box(*ax.bbox.bounds)
    for (x, y, text), place in zip(points, at, strict=True):
        if not text:
            continue
        note = ax.annotate(text, (x, y), (0, 0), textcoords="offset points", fontsize=8.5, annotation_clip=False)
        note.set_in_layout(False)
        size = note.get_window_extent(renderer)
        scale = ax.figure.dpi / 72
        (dx, dy), box = _best(_boxes(place, size.width, size.height, scale), taken, inside)
        note.remove()
        _write(ax, (x, y), text, (dx, dy))
        taken.append(box)


def _boxes(
    at: tuple[float, ...], width: float, height: float, scale: float
) -> Iterator[tuple[tuple[float, float], Box]]:  # fmt: skip
    for dx, dy in _OFFSETS:
        left, low = _side(dx), _side(dy)
        yield (dx, dy), Box(at[0] + scale * dx - left * width, at[1] + scale * dy - low * height, width, height)


def _side(offset: float) -> float:
    """Which share of the text lies before its anchor."""
    return 0.5 if abs(offset) < 3 else 0.0 if offset > 0 else 1.0


def _best(
    places: Iterable[tuple[tuple[float, float], Box]], taken: Sequence[Box], inside: Box
) -> tuple[tuple[float, float], Box]:  # fmt: skip
    """The first place that covers nothing, else the least; what lies outside the axes counts more."""
    best, least = None, math.inf
    for offset, box in places:
        cost = sum(map(box.overlap, taken)) + 3 * (box.width * box.height - box.overlap(inside))
        if cost < least - 1e-6:
            best, least = (offset, box), cost
        if cost < 1e-6:
            break
    assert best is not None
    return best


def _write(ax: Axes, point: tuple[float, float], text: str, offset: tuple[float, float]) -> None:
    names = {0.0: ("left", "bottom"), 0.5: ("center", "center"), 1.0: ("right", "top")}
    line = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
    note = ax.annotate(
        text, point, offset, textcoords="offset points", fontsize=8.5, annotation_clip=False,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
        ha=names[_side(offset[0])][0], va=names[_side(offset[1])][1],
        arrowprops=line if math.hypot(*offset) > _NEAR else None,
    )  # fmt: skip
    note.set_in_layout(False)
