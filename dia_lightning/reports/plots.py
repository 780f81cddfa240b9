"""Plots as SVG, told apart without colour: markers, dashes and luminance; matplotlib is imported when the first is drawn."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dia_lightning.reports.labels import number
from dia_lightning.reports.placement import label_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RC: dict[Any, Any] = {
    "svg.hashsalt": "dia-lightning", "svg.fonttype": "none", "font.size": 9.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "text.parse_math": False,
}  # fmt: skip
_COLORS = ["#000000", "#1f5fa8", "#c2571a", "#6a6a6a"]
_MARKERS = "osD^vPX*<>hp"
_DASHES = ["-", "--", ":", "-."]


@dataclass(frozen=True)
class Plot:
    """name: of its file. title: what it is, for those who cannot see it too. caption: what to look for. svg."""

    name: str
    title: str
    caption: str
    svg: str


class Series(NamedTuple):
    """Points of one line with the half-widths of their intervals (NaN: none). labels: beside the points, "" for none."""

    name: str
    x: list[float]
    y: list[float]
    y_half: list[float]
    x_half: list[float] | None = None
    labels: list[str] | None = None


class Panel(NamedTuple):
    """Axes of a plot. mark: an x to be marked as the default. base: the point that is p_θ itself. level: p_θ's own y."""

    x_label: str
    y_label: str
    series: list[Series]
    x_scale: str = "linear"
    mark: float | None = None
    base: tuple[float, float] | None = None
    level: float | None = None


def style(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the i-th line."""
    return {
        "color": _COLORS[i % len(_COLORS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "linestyle": _DASHES[i % len(_DASHES)],
        "markersize": 5.5,
        "linewidth": 1.3,
        "markerfacecolor": "white" if i % 2 else _COLORS[i % len(_COLORS)],
    }


def scale_of(values: Sequence[float]) -> str:
    """Logarithmic where positive values span more than a decade; beside a zero, linear near it."""
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) / min(positive) <= 10:
        return "linear"
    return "log" if len(positive) == len(values) else "symlog"


def curves(panels: Sequence[Panel], joined: bool = True, front: bool = False) -> str:
    """Panels of lines with error bars, two a row, under one legend where there are several lines.

    joined: whether points are joined to lines, which a legend names. front: draw the step line of points than which no other
    one has less x and more y.
    """
    names = list(dict.fromkeys(series.name for panel in panels for series in panel.series))

    def draw(figure: Figure) -> None:
        columns = min(2, len(panels))
        axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel().tolist()
        for ax, panel in zip(axes, panels, strict=False):
            _draw_panel(ax, panel, names, joined)
            if front:
                _draw_front(ax, panel)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        if len(names) > 1 and joined:
            handles = {h.get_label(): h for ax in figure.axes for h in ax.get_legend_handles_labels()[0]}
            figure.legend(
                [handles[name] for name in names], names, loc="outside upper center", ncols=min(4, len(names)), frameon=False
            )
        _place_labels(figure, panels)

    rows = math.ceil(len(panels) / 2)
    legend = 0.25 * math.ceil(len(names) / 4) if len(names) > 1 and joined else 0
    return _svg(draw, (8.2 if len(panels) > 1 else 6.4, (3.0 if len(panels) > 1 else 4.4) * rows + legend))


def _draw_panel(ax: Axes, panel: Panel, names: Sequence[str], joined: bool) -> None:
    for series in panel.series:
        look = style(names.index(series.name))
        if not joined:
            look["linestyle"] = "none"
        x_half = None if series.x_half is None else [0.0 if math.isnan(h) else h for h in series.x_half]
        y_half = [0.0 if math.isnan(h) else h for h in series.y_half]
        ax.errorbar(series.x, series.y, y_half, x_half, label=series.name, capsize=2.5, elinewidth=0.9, **look)
    if panel.x_scale != "linear":
        xs = sorted({x for series in panel.series for x in series.x if x > 0})
        ax.set_xscale(panel.x_scale, **({"linthresh": xs[0]} if panel.x_scale == "symlog" else {}))
    if panel.mark is not None:
        ax.axvline(panel.mark, color="#888888", linewidth=4, alpha=0.3, zorder=0)
    if panel.base is not None:
        ax.axvline(panel.base[0], color="#888888", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.axhline(panel.base[1], color="#888888", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.plot(*panel.base, marker="*", color="black", markerfacecolor="white", markersize=11, linestyle="none")
    if panel.level is not None:
        ax.axhline(panel.level, color="#888888", linewidth=1.2, linestyle=(0, (1, 2)))
    _label_ticks(ax, panel)
    ax.margins(0.09, 0.12)
    ax.set_xlabel(panel.x_label)
    ax.set_ylabel(textwrap.fill(panel.y_label, 30))


def _unlabelled(panel: Panel) -> bool:
    return all(series.labels is None for series in panel.series)


def _draw_front(ax: Axes, panel: Panel) -> None:
    points = sorted((x, -y) for series in panel.series for x, y in zip(series.x, series.y, strict=True))
    best: list[tuple[float, float]] = []
    for x, y in points:
        if not best or -y > best[-1][1]:
            best.append((x, -y))
    ax.step([x for x, _ in best], [y for _, y in best], where="post", color="#999999", linewidth=1.0, zorder=0.5)


def _label_ticks(ax: Axes, panel: Panel) -> None:
    """The values that were run, where they are few; a curve is read at them."""
    xs = sorted({x for series in panel.series for x in series.x})
    if panel.x_scale == "symlog" or (panel.x_scale == "log" and len(xs) <= 9 and _unlabelled(panel)):
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.set_xticks([], minor=True)
    elif panel.x_scale == "log":
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        xs += [panel.base[0]] if panel.base else []
        decades = math.log10(max(xs) / min(xs))
        subs = (1.0,) if decades > 3 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
        ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x, -1)))
        ax.xaxis.set_minor_formatter(NullFormatter())


def dots(names: Sequence[str], panels: Sequence[tuple[str, Sequence[float], Sequence[float]]], base: Sequence[float]) -> str:
    """One row a name and one column a figure: (label, values, half-widths), NaN for none.

    `base` has for each figure p_θ's own value, a dotted line (NaN: none).
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        rows = list(range(len(names)))[::-1]
        for ax, (text, values, halves), own in zip(axes, panels, base, strict=True):
            half = [0.0 if math.isnan(h) else h for h in halves]
            ax.errorbar(values, rows, xerr=half, fmt="o", color="black", markersize=5, capsize=3, elinewidth=1.1)
            if not math.isnan(own):
                ax.axvline(own, color="#888888", linewidth=1.2, linestyle=(0, (1, 2)))
            ax.set_xlabel(textwrap.fill(text, 16))
            ax.margins(0.15, 0.0)
            ax.set_ylim(-0.6, len(names) - 0.4)
            ax.locator_params(axis="x", nbins=3)
        axes[0].set_yticks(rows, names)

    return _svg(draw, (8.2, 1.1 + 0.32 * len(names)))


def histogram(runs: dict[str, list[float]], x_label: str) -> str:
    """Share of texts over a score, outlined, one line style a run."""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        values = [value for run in runs.values() for value in run]
        low, high = min(values), max(values)
        edges = [low + (high - low or abs(low) or 1.0) * i / 24 for i in range(25)]
        for i, (name, run) in enumerate(runs.items()):
            weights = [1 / len(run)] * len(run)
            look: dict[str, Any] = {"color": _COLORS[0], "alpha": 0.25, "label": name} if i == 0 else {
                "histtype": "step", "color": _COLORS[0], "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 1.4, "label": name
            }  # fmt: skip
            ax.hist(run, bins=edges, weights=weights, **look)
            ax.axvline(math.fsum(run) / len(run), color=_COLORS[0], linestyle=_DASHES[i % 4], linewidth=1.0, ymax=0.95)
        ax.set_xlabel(x_label)
        ax.set_ylabel("share of texts")
        ax.legend(frameon=False)

    return _svg(draw, (6.4, 3.2))


def _place_labels(figure: Figure, panels: Sequence[Panel]) -> None:
    if all(map(_unlabelled, panels)) and not any(panel.base for panel in panels):
        return
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for ax, panel in zip(figure.axes, panels, strict=False):
        points = [point for s in panel.series for point in zip(s.x, s.y, s.labels or [""] * len(s.x), strict=True)]
        bars = [bar for s in panel.series for bar in _bars(s)]
        label_points(ax, [*points, *([(*panel.base, "p_θ")] if panel.base else [])], bars, renderer)


def _bars(series: Series) -> list[tuple[float, float, float, float]]:
    """Where its error bars are."""
    found = []
    for x, y, dx, dy in zip(series.x, series.y, series.x_half or [0.0] * len(series.x), series.y_half, strict=True):
        found += [(x, x, y - dy, y + dy)] if dy > 0 else []
        found += [(x - dx, x + dx, y, y)] if dx > 0 else []
    return found


def _svg(draw: Callable[[Figure], None], size: tuple[float, float]) -> str:
    """Without declaration and metadata, so that it can stand in a page; the same drawing gives the same text."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    return re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
