"""Tables and sample texts of a report, made from groups of runs."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dia_lightning.lab.report.labels import (
    caption,
    in_words,
    label,
    number,
    setting_name,
    value_name,
    written,
)
from dia_lightning.lab.report.page import PageBlock, Sample, Table
from dia_lightning.lab.report.results import (
    NATS_ABOVE_BASE,
    Group,
    estimates,
    flatten,
    read_lines,
    setting_key,
)

P_THETA = "p_θ itself"


@dataclass(frozen=True)
class View:
    """Groups as the rows of every table.

    head: above their names. long_names: clear without the head. default: position of the default
    setting. intervals: a remark on them.
    """

    groups: list[Group]
    head: str
    names: list[str]
    long_names: list[str]
    default: int | None
    intervals: str

    def of(self, keys: Sequence[str]) -> dict[str, list[Any]]:
        """The estimates of those figures that some group has."""
        found = {key: [group.figures.get(key) for group in self.groups] for key in keys}
        return {key: values for key, values in found.items() if any(values)}

    def figures(self) -> list[str]:
        """Flat names of all figures that some group has."""
        return list(dict.fromkeys(key for group in self.groups for key in group.figures))


def intervals_of(groups: Sequence[Group]) -> str:
    """The remark on intervals under a table or plot."""
    seeds = [len(group.results) for group in groups] or [1]
    return caption("intervals", fewest=min(seeds), most=max(seeds))


def view(groups: Sequence[Group], axes: Collection[str], baseline: Mapping[str, Any]) -> View:
    """Rows named by the values of what varies, in the order of the head."""
    named = [{a: group.setting[a] for a in axes if a in group.setting} for group in groups]
    long_names = [setting_name(n or g.setting) for n, g in zip(named, groups, strict=True)]
    names = [
        ", ".join(map(value_name, setting.values())) if setting.keys() == set(axes) and axes else n
        for setting, n in zip(named, long_names, strict=True)
    ]
    default = {axis: value for axis, value in baseline.items() if axis in axes}
    keys = [setting_key("", setting) for setting in named]
    key = setting_key("", default)
    place = keys.index(key) if default and key in keys else None
    head = ", ".join(axes) or "run"
    return View(list(groups), head, names, long_names, place, intervals_of(groups))


def base_group(groups: Sequence[Group]) -> Group | None:
    """p_θ itself: its own group, else the figures `base` of one run per seed, else None."""
    for group in groups:
        if all(result.metrics.get("method") == "zero_shot" for result in group.results):
            return group
    runs = [run for group in groups for run in group.results if run.metrics.get("base")]
    by_seed = {run.seed: run for run in reversed(runs)}
    if not by_seed:
        return None
    chosen = [by_seed[seed] for seed in dict.fromkeys(run.seed for run in runs)]
    figures = [{**flatten(run.metrics["base"]), NATS_ABOVE_BASE: 0.0} for run in chosen]
    return Group(chosen[0].study, {"method": P_THETA}, chosen, estimates(figures))


def figures_table(name: str, rows: View, base: Group | None = None) -> Table | None:
    """One of the tables of `words.yaml`: a row per group and one for p_θ; None if empty."""
    spec = in_words()["tables"][name]
    keys = [
        key
        for pattern in spec["figures"]
        for key in rows.figures()
        if re.fullmatch(pattern, key, re.VERBOSE)
    ]
    if sum(key.startswith("reward_") for key in keys) == 1:  # the reward itself
        keys = [key for key in keys if not key.startswith("reward_")]
    if "nonzero" in spec:
        used = {key for group in rows.groups for key, found in group.figures.items() if found.mean}
        keys = [key for key in keys if key in used]
    if not keys:
        return None
    groups = list(zip(rows.names, rows.groups, strict=True))
    if base is not None and base not in rows.groups:
        groups.append((P_THETA, base))
    if "sparse" in spec:
        groups = [(row, group) for row, group in groups if group.figures.keys() & set(keys)]
    default = None if rows.default is None else rows.groups[rows.default]
    # Where every row has one run there is nothing to count.
    counted = any(len(group.results) > 1 for _, group in groups)
    body = [
        [
            f"{row} (default)" if group is default else row,
            *(written(group.figures.get(key), label(key).digits) for key in keys),
            *([str(len(group.results))] if counted else []),
        ]
        for row, group in groups
    ]
    head = [rows.head, *(label(key).head for key in keys), *(["seeds"] if counted else [])]
    marked = frozenset(i for i, (_, group) in enumerate(groups) if group is default)
    return Table(caption(name, intervals=rows.intervals), head, body, default=marked)


def _section(title: str, *tables: Table | None) -> list[Table | PageBlock]:
    """The tables under a heading; nothing if all are None."""
    found = [table for table in tables if table is not None]
    return [PageBlock("h3", title), *found] if found else []


def cost_blocks(rows: View, base: Group | None) -> list[Table | PageBlock]:
    """Totals, the work of each network, and the training before the first text."""
    tables = (figures_table(name, rows, base) for name in ("cost", "network"))
    return _section("Cost", *tables, figures_table("training", rows))


def diagnostics_blocks(
    rows: View, prompts: Sequence[Mapping[str, Any]] = ()
) -> list[Table | PageBlock]:
    """Acceptance, effective sample size, R-hat, log Z; and by prompt where there are several."""
    by_prompt = prompts_table(prompts) if len(prompts) > 1 else None
    return _section("Acceptance, ESS and log Z", figures_table("diagnostics", rows), by_prompt)


def prompts_table(prompts: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each entry of `by_prompt` in metrics.json."""
    keys = [key for key in in_words()["tables"]["prompts"]["figures"] if key in prompts[0]]
    body = [
        [row["prompt"] or "–", *(_figure(row[key], label(key).digits) for key in ["n", *keys])]
        for row in prompts
    ]
    return Table(caption("prompts"), ["prompt", *(label(k).head for k in ["n", *keys])], body)


def _figure(value: float | None, digits: int) -> str:
    return number(math.nan if value is None else value, digits)


def hacking_blocks(rows: View, base: Group | None, n_shown: int = 2) -> list[Table | PageBlock]:
    """The number of flagged texts, the reasons, and some of the texts."""
    if not rows.of(["hacking_rate"]):
        return []
    flagged = []
    for name, group in zip(rows.names, rows.groups, strict=True):
        for line in read_lines(group.results[0].folder / "hacking.jsonl", n_shown):
            reward, reasons = number(line["reward"], 3), ", ".join(line["reasons"])
            flagged.append([name, line.get("prompt") or "–", line["text"], reward, reasons])
    head = [rows.head, "prompt", "text", "reward", "reasons"]
    shown = Table(caption("flagged"), head, flagged, frozenset({1, 2, 4}))
    table = figures_table("hacking", rows, base)
    return _section("Reward hacking", table, shown if flagged else None)


def sample_blocks(
    rows: View, base: Group | None, n_shown: int = 5, folded: bool = False
) -> list[Table | PageBlock]:
    """Texts of every setting's first seed, and p_θ's where known, for the same prompts."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for name, group in zip(rows.long_names, rows.groups, strict=True):
        folder = group.results[0].folder
        runs[name] = {line["id"]: line for line in read_lines(folder / "predictions.jsonl")}
        if P_THETA not in runs and base not in rows.groups:
            lines = read_lines(folder / "base_predictions.jsonl")
            runs = ({P_THETA: {line["id"]: line for line in lines}} if lines else {}) | runs
    runs = {name: lines for name, lines in runs.items() if lines}
    if not runs:
        return []
    shown = {}
    for i in _spread_over_prompts(next(iter(runs.values())), n_shown):
        texts = {name: lines[i] for name, lines in runs.items() if i in lines}
        first = next(iter(texts.values()))
        about = " ".join(f"{k} “{first[k]}”" for k in ("prompt", "source") if first.get(k))
        shown[f"Text {i}, {about or 'no prompt'}"] = [
            Sample(name, line["text"], f"reward {number(line['reward'], 2)}")
            for name, line in texts.items()
        ]
    title = "Show the texts" if folded else ""
    return [PageBlock("h3", "Sample texts"), PageBlock("samples", shown, title)]


def _spread_over_prompts(lines: Mapping[int, dict[str, Any]], n: int) -> list[int]:
    """The first id of each of the first n prompts; with fewer prompts also further ones."""
    first: dict[str, int] = {}
    for i, line in lines.items():
        first.setdefault(line["prompt"] or line.get("source", ""), i)
    chosen = list(first.values())[:n]
    return sorted([*chosen, *[i for i in lines if i not in chosen][: n - len(chosen)]])


def best_of(rows: View) -> str:
    """Where each figure is best, in one sentence; "" with one row."""
    said = []
    for key, text, sign in (
        ("reward", "Highest reward", 1),
        (NATS_ABOVE_BASE, "closest to p_θ's own likelihood", -1),
        ("distinct_2", "most diverse (distinct-2)", 1),
        ("flops_per_text", "fewest FLOPs per text", -1),
    ):
        named = zip(rows.long_names, rows.groups, strict=True)
        found = {name: g.figures[key] for name, g in named if key in g.figures}
        if len(found) > 1:
            sizes = {name: sign * estimate.mean for name, estimate in found.items()}
            if key == NATS_ABOVE_BASE:
                sizes = {name: -abs(size) for name, size in sizes.items()}
            best = max(sizes, key=sizes.__getitem__)
            said.append(f"{text}: {best} ({written(found[best], label(key).digits)})")
    return "; ".join(said) + "." if said else ""
