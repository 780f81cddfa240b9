"""Plots as SVG, told apart without colour; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from dia_lightning.lab.report.labels import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RC: dict[Any, Any] = {
    "svg.hashsalt": "dia-lightning",
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "text.parse_math": False,
}
_COLORS = ["#000000", "#1f5fa8", "#c2571a", "#6a6a6a"]
_MARKERS = "osD^vPX*<>hp"
_DASHES = ["-", "--", ":", "-."]
_BESIDE: dict[str, Any] = {
    "xytext": (5, 4),
    "textcoords": "offset points",
    "fontsize": 8.5,
    "bbox": {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.6},
}
_REFERENCE: dict[str, Any] = {"color": "#888888", "linestyle": (0, (1, 2))}


@dataclass(frozen=True)
class Plot:
    """name: of its file. title: also its description for those who cannot see it."""

    name: str
    title: str
    caption: str
    svg: str
    kind: ClassVar[str] = "figure"


class Series(NamedTuple):
    """Points with half-widths of their intervals (NaN: none), and labels beside them."""

    name: str
    x: list[float]
    y: list[float]
    y_half: list[float]
    x_half: list[float] | None = None
    labels: list[str] | None = None


class Panel(NamedTuple):
    """Axes of a plot. mark: the default's x. base: the point of p_θ itself. level: p_θ's own y."""

    x_label: str
    y_label: str
    series: list[Series]
    x_scale: str = "linear"
    mark: float | None = None
    base: tuple[float, float] | None = None
    level: float | None = None


def style(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the i-th line; 24 differ without colour."""
    color = _COLORS[i % len(_COLORS)]
    return {
        "color": color,
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _DASHES[i % len(_DASHES)],
        "markersize": 5.5,
        "linewidth": 1.3,
        "markerfacecolor": "white" if (i + i // len(_MARKERS)) % 2 else color,
    }


def scale_of(values: Sequence[float]) -> str:
    """Logarithmic where positive values span over a decade; beside a zero, linear near it."""
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) / min(positive) <= 10:
        return "linear"
    return "log" if len(positive) == len(values) else "symlog"


def curves(panels: Sequence[Panel], joined: bool = True, front: bool = False) -> str:
    """Panels of points with error bars, two in a row, under one legend.

    Args:
        panels: the axes.
        joined: whether to join the points of a series by a line.
        front: draw the steps of the points that no other one beats in both x (less) and y (more).
    """
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))
    size = [8.2, 3.0] if len(panels) > 1 else [6.4, 4.4]
    columns = max(1, min(4, len(names), int(12 * size[0] / (max(map(len, names)) + 7))))
    size[1] *= math.ceil(len(panels) / 2)
    size[1] += 0.22 * math.ceil(len(names) / columns) if len(names) > 1 else 0

    def draw(figure: Figure) -> None:
        wide = min(2, len(panels))
        axes = figure.subplots(math.ceil(len(panels) / wide), wide, squeeze=False).ravel().tolist()
        for ax, panel in zip(axes, panels, strict=False):
            _draw_panel(ax, panel, names, joined)
            if front:
                _draw_front(ax, panel)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        if len(names) > 1:
            legends = [ax.get_legend_handles_labels() for ax in figure.axes]
            found = {n: h for drawn, own in legends for h, n in zip(drawn, own, strict=True)}
            handles = [found[name] for name in names]
            figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False)

    return _svg(draw, (size[0], size[1]))


def _draw_panel(ax: Axes, panel: Panel, names: Sequence[str], joined: bool) -> None:
    for series in panel.series:
        look = style(names.index(series.name)) | ({} if joined else {"linestyle": "none"})
        x_half = None if series.x_half is None else _bars(series.x_half)
        look |= {"label": series.name, "capsize": 2.5, "elinewidth": 0.9}
        ax.errorbar(series.x, series.y, _bars(series.y_half), x_half, **look)
        points = zip(series.x, series.y, series.labels or [], strict=False)
        for i, (x, y, text) in enumerate(points):  # neighbours on different sides
            ax.annotate(text, (x, y), **_BESIDE | {"xytext": (5, -11 if i % 2 else 4)})
    xs = sorted({x for series in panel.series for x in series.x})
    if panel.x_scale != "linear":
        near = {"linthresh": min(x for x in xs if x > 0)}
        ax.set_xscale(panel.x_scale, **(near if panel.x_scale == "symlog" else {}))
    if panel.mark is not None:
        ax.axvline(panel.mark, color="#888888", linewidth=4, alpha=0.3, zorder=0)
    if panel.base is not None:
        ax.axvline(panel.base[0], linewidth=0.8, **_REFERENCE)
        ax.axhline(panel.base[1], linewidth=0.8, **_REFERENCE)
        ax.plot(*panel.base, "*", color="black", markerfacecolor="white", markersize=11)
        ax.annotate("p_θ", panel.base, **_BESIDE)
    if panel.level is not None:
        ax.axhline(panel.level, linewidth=1.2, **_REFERENCE)
    _label_ticks(ax, panel, xs)
    ax.margins(0.09, 0.12)
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(textwrap.fill(panel.y_label, 30))


def _bars(halves: Sequence[float]) -> list[float]:
    return [0.0 if math.isnan(half) else half for half in halves]


def _draw_front(ax: Axes, panel: Panel) -> None:
    best: list[tuple[float, float]] = []
    pairs = [(x, -y) for s in panel.series for x, y in zip(s.x, s.y, strict=True)]
    for x, y in sorted(pairs):
        if not best or -y > best[-1][1]:
            best.append((x, -y))
    xs, ys = zip(*best, strict=True)
    ax.step(xs, ys, where="post", color="#999999", linewidth=1.0, zorder=0.5)


def _label_ticks(ax: Axes, panel: Panel, xs: list[float]) -> None:
    """On a logarithmic axis: a few settings by their values, measured values with prefixes."""
    exact = all(series.x_half is None for series in panel.series)
    if panel.x_scale == "symlog" or (panel.x_scale == "log" and exact and len(xs) <= 9):
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.set_xticks([], minor=True)
    elif panel.x_scale == "log":
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        xs = [*xs, *([panel.base[0]] if panel.base else [])]
        decades = math.log10(max(xs) / min(xs))
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x, -1)))
        ax.xaxis.set_minor_formatter(NullFormatter())


def dots(
    names: Sequence[str],
    panels: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    base: Sequence[float],
) -> str:
    """One row per name, one column per figure: (label, values, half-widths), NaN for none.

    `base` holds p_θ's own value of each figure, a dotted line (NaN: none).
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        rows = list(range(len(names)))[::-1]
        for ax, (text, values, halves), own in zip(axes, panels, base, strict=True):
            look: dict[str, Any] = {"color": "black", "markersize": 5, "elinewidth": 1.1}
            ax.errorbar(values, rows, xerr=_bars(halves), fmt="o", capsize=3, **look)
            if not math.isnan(own):
                ax.axvline(own, linewidth=1.2, **_REFERENCE)
            ax.set_xlabel(textwrap.fill(text, 16))
            ax.margins(0.15, 0.0)
            ax.set_ylim(-0.6, len(names) - 0.4)
            ax.locator_params(axis="x", nbins=3)
        axes[0].set_yticks(rows, names)

    return _svg(draw, (8.2, 1.1 + 0.32 * len(names)))


def histogram(runs: dict[str, list[float]], x_label: str) -> str:
    """Share of texts over a score, one outline per run, the first one filled."""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        values = [value for run in runs.values() for value in run]
        low, high = min(values), max(values)
        edges = [low + (high - low or abs(low) or 1.0) * i / 24 for i in range(25)]
        for i, (name, run) in enumerate(runs.items()):
            line: dict[str, Any] = {"linestyle": _DASHES[i % len(_DASHES)], "color": _COLORS[0]}
            look = {"histtype": "step", "linewidth": 1.4, **line}
            look = look if i else {"color": _COLORS[0], "alpha": 0.25}
            ax.hist(run, bins=edges, weights=[1 / len(run)] * len(run), label=name, **look)
            ax.axvline(math.fsum(run) / len(run), linewidth=1.0, ymax=0.95, **line)
        ax.set_xlabel(x_label)
        ax.set_ylabel("share of texts")
        ax.legend(frameon=False)

    return _svg(draw, (6.4, 3.2))


def _svg(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    """Without declaration and metadata, to stand in a page; the same drawing, the same text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    return re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
