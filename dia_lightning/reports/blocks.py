"""Tables and sample texts of a report, from groups of runs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dia_lightning.reports.html import Block, Heading, Sample, Samples, Table
from dia_lightning.reports.labels import label, number, setting_name, value_name, written
from dia_lightning.reports.results import (
    NATS_ABOVE_BASE,
    Group,
    estimate,
    flatten,
    read_lines,
    setting_key,
)

_QUALITY = ("reward", "log_p_per_token", "perplexity", "distinct_2", "self_bleu")
_COST = ("flops_per_text", "seconds_per_text", "latency_s_per_100_tokens", "peak_memory_mib")
_DIAGNOSTICS = ("accept_", "ess", "rhat_", "autocorrelation_", "log_z", "temperatures", "roots", "resampled")
_OTHER = {"n", NATS_ABOVE_BASE, "reward_std", "distinct_1", "distinct_3", "distinct_4", "hacking_rate", *_QUALITY, *_COST}
P_THETA = "p_θ itself"


@dataclass(frozen=True)
class View:
    """Groups as the rows of every table.

    head: above their names. long_names: names that are clear without the head. default: place of the default setting.
    intervals: what to say of them.
    """

    groups: list[Group]
    head: str
    names: list[str]
    long_names: list[str]
    default: int | None
    intervals: str

    def of(self, keys: Sequence[str]) -> dict[str, list[Any]]:
        """The estimates of some figures, those alone that some group has."""
        found = {key: [group.figures.get(key) for group in self.groups] for key in keys}
        return {key: values for key, values in found.items() if any(values)}

    def figures(self) -> list[str]:
        """Flat names of all figures that some group has."""
        return list(dict.fromkeys(key for group in self.groups for key in group.figures))


def intervals_of(groups: Sequence[Group]) -> str:
    """What to say of the intervals under a table or plot."""
    seeds = sorted({len(group.results) for group in groups})
    if seeds[-1:] == [1] or not seeds:
        return "One seed a row: no intervals."
    text = (
        f"± and bars: 95 % intervals over {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds (Student's t), "
    )
    text += "where the seeds differ"
    return f"{text}; none where there is one seed." if seeds[0] == 1 else f"{text}."


def view(groups: Sequence[Group], axes: Sequence[str], baseline: Mapping[str, Any]) -> View:
    """Rows named by the values of what is varied, in the order of the head."""
    named = [{axis: group.setting[axis] for axis in axes if axis in group.setting} for group in groups]
    names = [
        ", ".join(map(value_name, n.values())) if n and len(n) == len(axes) else setting_name(n or group.setting)
        for n, group in zip(named, groups, strict=True)
    ]
    default = {k: v for k, v in baseline.items() if k in axes}
    keys = [setting_key("", n) for n in named]
    place = keys.index(setting_key("", default)) if default and setting_key("", default) in keys else None
    long_names = [setting_name(n or group.setting) for n, group in zip(named, groups, strict=True)]
    return View(list(groups), ", ".join(axes) or "run", names, long_names, place, intervals_of(groups))


def base_group(groups: Sequence[Group]) -> Group | None:
    """p_θ itself: its group where it is among the methods, else from the figures `base` of one run a seed, else None."""
    for group in groups:
        if all(result.metrics.get("method") == "zero_shot" for result in group.results):
            return group
    results = [result for group in groups for result in group.results]
    by_seed: dict[int, dict[str, float]] = {}
    for result in results:
        if base := result.metrics.get("base"):
            by_seed.setdefault(result.seed, {**flatten(base), NATS_ABOVE_BASE: 0.0})
    if not by_seed:
        return None
    keys = dict.fromkeys(key for figures in by_seed.values() for key in figures)
    figures = {key: estimate([found[key] for found in by_seed.values() if key in found]) for key in keys}
    return Group(results[0].study, {"method": P_THETA}, [r for r in results if r.metrics.get("base")][: len(by_seed)], figures)


def _figures_table(
    rows: View, keys: Sequence[str], caption: str, base: Group | None = None, sparse: bool = False
) -> Table | None:  # fmt: skip
    """One row a group, and one for p_θ; `sparse`: those alone that have a figure."""
    found = rows.of(keys)
    if not found:
        return None
    head = [rows.head, *(label(key).head for key in found), "seeds"]
    more = [] if base is None or base in rows.groups else [(P_THETA, base)]
    groups = [
        (n, g) for n, g in [*zip(rows.names, rows.groups, strict=True), *more] if not sparse or set(found) & set(g.figures)
    ]
    default = None if rows.default is None else rows.groups[rows.default]
    body = [
        [
            f"{name} (default)" if group is default else name,
            *(written(group.figures.get(key), label(key).digits) for key in found),
            str(len(group.results)),
        ]
        for name, group in groups
    ]
    # Where every row has one run there is nothing to count.
    if all(row[-1] == "1" for row in body):
        head, body = head[:-1], [row[:-1] for row in body]
    return Table(caption, head, body, default=frozenset(i for i, (_, group) in enumerate(groups) if group is default))


def quality_table(rows: View, base: Group | None) -> Table | None:
    """Reward, likelihood, diversity and the task's judges."""
    judges = [key for key in rows.figures() if _is_judge(key)]
    components = [key for key in rows.figures() if key.startswith("reward_") and key != "reward_std"]
    keys = [*_QUALITY[:1], *(components if len(components) > 1 else []), *judges, *_QUALITY[1:], "hacking_rate"]
    caption = "Figures of the texts. ↑: larger is better, ↓: smaller is better, all else equal. " + rows.intervals
    return _figures_table(rows, keys, caption, base)


def _is_judge(key: str) -> bool:
    """Whether a figure is of a task: none of those that every run or every sampler has."""
    known = key in _OTHER or "/" in key or key.startswith((*_DIAGNOSTICS, "reward_"))
    return not known


def cost_blocks(rows: View, base: Group | None) -> list[Block]:
    """Totals, what each network did, and what had to be trained first."""
    keys = rows.figures()
    network = [key for kind in ("nfe/", "tokens/", "flops/") for key in keys if key.startswith(kind)]
    # A reward is asked for rows, and no network of its own may be behind it.
    network = [key for key in network if any(group.figures[key].mean for group in rows.groups if key in group.figures)]
    training = [key for key in keys if re.fullmatch("training/[^/]+/(flops|seconds|peak_memory_mib)", key)]
    tables = [
        _figures_table(rows, _COST, "Cost of one text, by everything that it takes to draw it (candidates that are thrown away "
                       "included), and the run's peak memory.", base),
        _figures_table(rows, network, "Network evaluations of one text: rows (sequences) and positions (tokens) that each "
                       "network computed, and its FLOPs.", base),
        _figures_table(rows, training, "What had to be trained before the first text, once for any number of texts.",
                       sparse=True),
    ]  # fmt: skip
    found: list[Block] = [table for table in tables if table is not None]
    return [Heading("Cost"), *found] if found else []


def diagnostics_blocks(rows: View) -> list[Block]:
    """Acceptance, effective sample size, R-hat, log Z."""
    keys = [key for key in rows.figures() if key.startswith(_DIAGNOSTICS)]
    caption = (
        "How well the samplers mixed. Acceptance: share of proposed moves taken, near 0 the chain stands still. ESS as a share "
        "of particles: near 0 one particle carries all the weight. R̂ above 1.01: chains disagree. log Z: estimate of "
        "log E[exp(λ r)] under p_θ; where a lower and an upper estimate differ much, samples are not yet those of the target."
    )
    table = _figures_table(rows, keys, caption, sparse=True)
    return [] if table is None else [Heading("Acceptance, ESS and log Z"), table]


def hacking_blocks(rows: View, base: Group | None, n_shown: int = 2) -> list[Block]:
    """How many texts are flagged, why, and some of them."""
    keys = [key for key in rows.figures() if key.startswith("hacking_reasons/")]
    if not rows.of(["hacking_rate"]):
        return []
    caption = (
        "Texts that please the reward and little else, by the task's checks. p_θ's own rate is the level of false alarms: only "
        "what lies above it is hacking. A text may have several reasons."
    )
    table = _figures_table(rows, ["hacking_rate", *keys], caption, base)
    flagged = [
        [name, line.get("prompt") or "–", line["text"], number(line["reward"], 3), ", ".join(line["reasons"])]
        for name, group in zip(rows.names, rows.groups, strict=True)
        for line in read_lines(group.results[0].folder / "hacking.jsonl", n_shown)
    ]
    shown = Table("Some of the flagged texts, of the first seed.", [rows.head, "prompt", "text", "reward", "reasons"], flagged,
                  frozenset({1, 2, 4}))  # fmt: skip
    blocks: list[Block] = [Heading("Reward hacking")]
    return [*blocks, *([table] if table else []), *([shown] if flagged else [])]


def sample_blocks(rows: View, base: Group | None, n_shown: int = 5, folded: bool = False) -> list[Block]:
    """Texts of every setting's first seed, and p_θ's where a run has them, for the same prompts."""
    runs = {}
    for name, group in zip(rows.long_names, rows.groups, strict=True):
        folder = group.results[0].folder
        runs[name] = {line["id"]: line for line in read_lines(folder / "predictions.jsonl")}
        if P_THETA not in runs and base not in rows.groups and (lines := read_lines(folder / "base_predictions.jsonl")):
            runs = {P_THETA: {line["id"]: line for line in lines}, **runs}
    runs = {name: lines for name, lines in runs.items() if lines}
    if not runs:
        return []
    ids = _spread_over_prompts(next(iter(runs.values())), n_shown)
    shown = [(_heading(i, runs), [Sample(n, lines[i]["text"], f"reward {number(lines[i]['reward'], 2)}")
              for n, lines in runs.items() if i in lines]) for i in ids]  # fmt: skip
    return [Heading("Sample texts"), Samples(shown, folded)]


def _spread_over_prompts(lines: Mapping[int, dict[str, Any]], n: int) -> list[int]:
    """The first id of each of the first n prompts; with fewer prompts also further ones."""
    first: dict[str, int] = {}
    for i, line in lines.items():
        first.setdefault(line["prompt"] or line.get("source", ""), i)
    chosen = list(first.values())[:n]
    return sorted([*chosen, *[i for i in lines if i not in chosen][: n - len(chosen)]])


def _heading(i: int, runs: Mapping[str, Mapping[int, dict[str, Any]]]) -> str:
    line = next((lines[i] for lines in runs.values() if i in lines), {})
    about = " ".join(f"{key} “{line[key]}”" for key in ("prompt", "source") if line.get(key))
    return f"Text {i}, {about or 'no prompt'}"


def best_of(rows: View) -> str:
    """One sentence a figure: where it is best. Empty with one row."""
    said = []
    for key, text, sign in (
        ("reward", "Highest reward", 1), (NATS_ABOVE_BASE, "closest to p_θ's own likelihood", -1),
        ("distinct_2", "most diverse (distinct-2)", 1), ("flops_per_text", "fewest FLOPs a text", -1),
    ):  # fmt: skip
        found = [(g.figures[key], name) for g, name in zip(rows.groups, rows.long_names, strict=True) if key in g.figures]
        if len(found) > 1:
            size = (lambda e: abs(e[0].mean)) if key == NATS_ABOVE_BASE else (lambda e: e[0].mean)
            best, name = max(found, key=lambda e, size=size, sign=sign: sign * size(e))  # type: ignore[misc]
            said.append(f"{text}: {name} ({written(best, label(key).digits)})")
    return "; ".join(said) + "." if said else ""


def is_number(value: Any) -> bool:
    """Whether a value of what is varied can stand on an axis."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
