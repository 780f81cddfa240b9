"""The plots of a study, chosen by what it varies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dia_lightning.lab.report.blocks import View
from dia_lightning.lab.report.labels import caption, label, setting_name
from dia_lightning.lab.report.plots import Panel, Plot, Series, curves, dots, scale_of
from dia_lightning.lab.report.results import (
    NATS_ABOVE_BASE,
    Estimate,
    Group,
    Study,
    is_number,
    setting_key,
)

_NONE = Estimate(math.nan, math.nan, 0)
_FIGURES = ("reward", "log_p_per_token", "distinct_2", "self_bleu", "accept_rate")


class Design:
    """What a study varies: the numeric axis of its curves, and which groups form one line.

    Attributes:
        x: label of that axis, "" for none.
        lines: of each line the name and the positions of its groups, by x.
    """

    def __init__(self, study: Study, groups: Sequence[Group]) -> None:
        values = {axis: [group.setting.get(axis) for group in groups] for axis in study.axes}
        varied = [a for a in study.axes if len({setting_key("", {"": v}) for v in values[a]}) > 1]
        numeric = [axis for axis in varied if all(map(is_number, values[axis]))]
        self.x = max(numeric, key=lambda axis: len(set(values[axis])), default="")
        found: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            rest = {a: group.setting[a] for a in varied if a != self.x and a in group.setting}
            found.setdefault(setting_name(rest) if rest else "", []).append(i)
        # Points that belong to no line cannot be read off curves.
        if not self.x or min(map(len, found.values())) < 2 or len(found) > 12:
            self.x, self.lines = "", {"": list(range(len(groups)))}
        else:
            self.lines = {
                name: sorted(places, key=lambda i: groups[i].setting[self.x])
                for name, places in found.items()
            }


def study_plots(study: Study, rows: View, base: Group | None) -> list[Plot]:
    """Curves or dots of every figure, the frontier, and reward against cost, where known."""
    design = Design(study, rows.groups)
    if design.x:
        first: Plot | None = _curves_plot(study, rows, base, design)
    else:
        first = _dots_plot(study, rows, base)
    plots = [first, _frontier(study, rows, base, design), _cost_plot(study, rows, base, design)]
    return [plot for plot in plots if plot is not None]


def _estimates(rows: View, key: str, places: Sequence[int]) -> list[Estimate]:
    return [rows.groups[i].figures.get(key, _NONE) for i in places]


def _keys(rows: View) -> list[str]:
    """Figures to draw: those of all texts, then acceptance, ESS and hacking where known."""
    ess = [key for key in rows.figures() if key == "ess" or key.startswith("ess_")][:1]
    return list(rows.of([*_FIGURES, *ess, "hacking_rate"]))


def _curves_plot(study: Study, rows: View, base: Group | None, design: Design) -> Plot:
    xs = [rows.groups[i].setting[design.x] for places in design.lines.values() for i in places]
    default = study.baseline.get(design.x)
    marked = float(default) if is_number(default) else None  # type: ignore[arg-type]
    panels = []
    for key in _keys(rows):
        series = []
        for name, places in design.lines.items():
            kept = [i for i in places if key in rows.groups[i].figures]
            x = [rows.groups[i].setting[design.x] for i in kept]
            found = _estimates(rows, key, kept)
            series.append(Series(name, x, [e.mean for e in found], [e.half for e in found]))
        level = None if base is None or key not in base.figures else base.figures[key].mean
        panels.append(Panel(design.x, label(key).text, series, scale_of(xs), marked, level=level))
    told = caption(
        "curves", x=design.x, marked=marked is not None, base=base, intervals=rows.intervals
    )
    return Plot(f"{study.name}-curves", f"Figures against {design.x}", told, curves(panels))


def _dots_plot(study: Study, rows: View, base: Group | None) -> Plot | None:
    keys = _keys(rows)[:5]
    if not keys:
        return None
    panels, own = [], []
    for key in keys:
        found = _estimates(rows, key, range(len(rows.groups)))
        panels.append((label(key).text, [e.mean for e in found], [e.half for e in found]))
        own.append(math.nan if base is None else base.figures.get(key, _NONE).mean)
    told = caption("dots", base=base, intervals=rows.intervals)
    svg = dots(rows.names, panels, own)
    return Plot(f"{study.name}-dots", f"Figures by {rows.head}", told, svg)


def _scatter(rows: View, design: Design, x: str, y: str = "reward") -> list[Series]:
    """A line per method along the numeric axis, labelled with its values; else a point each."""
    lines = design.lines if design.x else {name: [i] for i, name in enumerate(rows.long_names)}
    out = []
    for name, places in lines.items():
        kept = [i for i in places if {x, y} <= rows.groups[i].figures.keys()]
        if not kept:
            continue
        at, up = _estimates(rows, x, kept), _estimates(rows, y, kept)
        labels = [f"{rows.groups[i].setting[design.x]:g}" for i in kept] if design.x else None
        for end in {0, len(kept) - 1} if labels else ():
            labels[end] = f"{design.x} = {labels[end]}"  # type: ignore[index]
        means, halves = zip(*((e.mean, e.half) for e in up), strict=True)
        x_means, x_halves = zip(*((e.mean, e.half) for e in at), strict=True)
        out.append(Series(name, list(x_means), list(means), list(halves), list(x_halves), labels))
    return out


def _frontier(study: Study, rows: View, base: Group | None, design: Design) -> Plot | None:
    known = bool(rows.of([NATS_ABOVE_BASE]))
    x = NATS_ABOVE_BASE if known else "log_p_per_token"
    series = _scatter(rows, design, x)
    if sum(len(s.x) for s in series) < 2:
        return None
    origin = None
    if base is not None and base not in rows.groups and "reward" in base.figures:
        origin = (0.0, base.figures["reward"].mean)
    panel = Panel(label(x).text, "reward", series, base=origin)
    front = known and not design.x
    told = caption("frontier", known=known, star=origin, front=front, intervals=rows.intervals)
    svg = curves([panel], joined=bool(design.x), front=front)
    return Plot(f"{study.name}-frontier", "Reward against log p_θ", told, svg)


def _cost_plot(study: Study, rows: View, base: Group | None, design: Design) -> Plot | None:
    panels = []
    own = base.figures if base is not None and base not in rows.groups else {}
    for key in ("seconds_per_text", "flops_per_text"):
        series = [s for s in _scatter(rows, design, key) if min(s.x) > 0]
        xs = [x for s in series for x in s.x]
        if len(xs) > 1 and max(xs) > 1.2 * min(xs):
            at = None
            if {key, "reward"} <= own.keys() and own[key].mean > 0:
                at = (own[key].mean, own["reward"].mean)
            panels.append(Panel(label(key).text, "reward", series, "log", base=at))
    if not panels:
        return None
    told = caption("reward_cost", intervals=rows.intervals)
    svg = curves(panels, joined=bool(design.x), front=not design.x)
    return Plot(f"{study.name}-cost", "Reward against cost", told, svg)
