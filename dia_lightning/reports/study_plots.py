"""Which plots a study needs, from what it varies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dia_lightning.reports.blocks import View, is_number
from dia_lightning.reports.labels import label, setting_name
from dia_lightning.reports.plots import Panel, Plot, Series, curves, dots, scale_of
from dia_lightning.reports.results import NATS_ABOVE_BASE, Estimate, Group, Study, setting_key

_NONE = Estimate(math.nan, math.nan, 0)
_FIGURES = ("reward", "log_p_per_token", "distinct_2", "self_bleu", "accept_rate")


class Design:
    """What a study varies: the axis of numbers that curves run along, and which groups make one line.

    Attributes:
        x: label of that axis, "" where there is none. lines: of each line its name and the places of its groups, by x.
    """

    def __init__(self, study: Study, groups: Sequence[Group]) -> None:
        values = {axis: [group.setting.get(axis) for group in groups] for axis in study.axes}
        varied = [axis for axis in study.axes if len({setting_key("", {"": v}) for v in values[axis]}) > 1]
        numeric = [axis for axis in varied if all(map(is_number, values[axis]))]
        self.x = max(numeric, key=lambda axis: len(set(values[axis])), default="")
        self.others = [axis for axis in varied if axis != self.x]
        found: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            rest = {axis: group.setting[axis] for axis in self.others if axis in group.setting}
            found.setdefault(setting_name(rest) if rest else "", []).append(i)
        # Points that belong to no line cannot be read off curves.
        if not self.x or min(map(len, found.values())) < 2 or len(found) > 12:
            self.x, self.lines = "", {"": list(range(len(groups)))}
        else:
            self.lines = {n: sorted(places, key=lambda i: groups[i].setting[self.x]) for n, places in found.items()}


def study_plots(study: Study, rows: View, base: Group | None) -> list[Plot]:
    """Curves or dots of every figure, the frontier, and reward against cost, as far as the figures are there."""
    design = Design(study, rows.groups)
    first = _curves_plot(study, rows, base, design) if design.x else _dots_plot(study, rows, base)
    plots = [first, _frontier(study, rows, base, design), _cost_plot(study, rows, base, design)]
    return [plot for plot in plots if plot is not None]


def _estimates(rows: View, key: str, places: Sequence[int]) -> list[Estimate]:
    return [rows.groups[i].figures.get(key, _NONE) for i in places]


def _keys(rows: View) -> list[str]:
    """Figures to be drawn: those that all texts have, then acceptance, ESS and hacking where some run has them."""
    ess = [key for key in rows.figures() if key == "ess" or key.startswith("ess_")][:1]
    return list(rows.of([*_FIGURES, *ess, "hacking_rate"]))


def _curves_plot(study: Study, rows: View, base: Group | None, design: Design) -> Plot:
    xs = [rows.groups[i].setting[design.x] for places in design.lines.values() for i in places]
    marked = study.baseline.get(design.x)
    panels = []
    for key in _keys(rows):
        series = []
        for name, places in design.lines.items():
            points = [(rows.groups[i].setting[design.x], e) for i, e in zip(places, _estimates(rows, key, places), strict=True)]
            points = [(x, e) for x, e in points if e.n]
            series.append(Series(name, [x for x, _ in points], [e.mean for _, e in points], [e.half for _, e in points]))
        level = None if base is None or key not in base.figures else base.figures[key].mean
        panels.append(
            Panel(design.x, label(key).text, series, scale_of(xs), marked if is_number(marked) else None, level=level)
        )
    notes = [f"What {design.x} changes, figure by figure. Look for where the reward stops rising while log p_θ or "
             "diversity still falls: beyond it there is only cost."]  # fmt: skip
    notes += ["The grey band marks the default."] if is_number(marked) else []
    notes += ["Dotted: p_θ itself."] if base is not None else []
    return Plot(f"{study.name}-curves", f"Figures against {design.x}", " ".join([*notes, rows.intervals]), curves(panels))


def _dots_plot(study: Study, rows: View, base: Group | None) -> Plot | None:
    keys = _keys(rows)[:5]
    if not keys:
        return None
    panels, own = [], []
    for key in keys:
        found = _estimates(rows, key, range(len(rows.groups)))
        panels.append((label(key).text, [e.mean for e in found], [e.half for e in found]))
        own.append(math.nan if base is None else base.figures.get(key, _NONE).mean)
    caption = "Each row is one setting. Where two bars overlap widely the difference may be chance."
    caption += " Dotted: p_θ itself." if base is not None else ""
    return Plot(f"{study.name}-dots", f"Figures by {rows.head}", f"{caption} {rows.intervals}", dots(rows.names, panels, own))


def _scatter(rows: View, design: Design, x: str, y: str = "reward") -> list[Series]:
    """A line a method over what is numeric, its points labelled by that; else a labelled point a group."""
    lines = design.lines if design.x else {name: [i] for i, name in enumerate(rows.long_names)}
    out = []
    for name, places in lines.items():
        kept = [i for i in places if {x, y} <= rows.groups[i].figures.keys()]
        at, up = _estimates(rows, x, kept), _estimates(rows, y, kept)
        values = [f"{rows.groups[i].setting[design.x]:g}" if design.x else name for i in kept]
        if values and design.x:
            values[-1] = f"{design.x} = {values[-1]}"
            values[0] = f"{design.x} = {values[0]}" if len(values) > 1 else values[0]
        out.append(Series(name, [e.mean for e in at], [e.mean for e in up], [e.half for e in up], [e.half for e in at], values))
    return [series for series in out if series.x]


def _frontier(study: Study, rows: View, base: Group | None, design: Design) -> Plot | None:
    known = bool(rows.of([NATS_ABOVE_BASE]))
    x = NATS_ABOVE_BASE if known else "log_p_per_token"
    series = _scatter(rows, design, x)
    if sum(len(s.x) for s in series) < 2:
        return None
    origin = None
    if base is not None and base not in rows.groups and "reward" in base.figures:
        origin = (0.0, base.figures["reward"].mean)
    svg = curves([Panel(label(x).text, "reward", series, base=origin)], joined=bool(design.x), front=known and not design.x)
    caption = (
        f"Upper {'left' if known else 'right'} is better: more reward for less departure from what p_θ finds likely. "
        "Not the whole KL divergence from p_θ, which also counts lost diversity: a method that repeats one likely text looks "
        "close to p_θ; see distinct-2 too. "
    )
    caption += "Star: p_θ itself. " if origin else ""
    caption += "" if design.x or not known else "Stepped line: settings that no other one beats in both. "
    return Plot(f"{study.name}-frontier", "Reward against log p_θ", caption + rows.intervals, svg)


def _cost_plot(study: Study, rows: View, base: Group | None, design: Design) -> Plot | None:
    panels = []
    for key in ("seconds_per_text", "flops_per_text"):
        series = [s for s in _scatter(rows, design, key) if min(s.x) > 0]
        xs = [x for s in series for x in s.x]
        if len(xs) > 1 and max(xs) > 1.2 * min(xs):
            own = base.figures if base is not None and base not in rows.groups else {}
            at = (own[key].mean, own["reward"].mean) if {key, "reward"} <= own.keys() and own[key].mean > 0 else None
            panels.append(Panel(label(key).text, "reward", series, "log", base=at))
    if not panels:
        return None
    caption = (
        "Upper left is better: more reward for less work a text. Seconds are of the machine that ran this; FLOPs are of the "
        "networks alone and do not depend on it. Training that a method needs is not in them: see the table. " + rows.intervals
    )
    svg = curves(panels, joined=bool(design.x), front=not design.x)
    return Plot(f"{study.name}-cost", "Reward against cost", caption, svg)
