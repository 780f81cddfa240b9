"""The report of one finished run of `lightning test`: the method beside p_θ itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from dia_lightning.lab.report import blocks as make
from dia_lightning.lab.report.export import write_csv
from dia_lightning.lab.report.labels import caption, label, number
from dia_lightning.lab.report.page import PageBlock, Section, Table, write_page
from dia_lightning.lab.report.plots import Plot, histogram
from dia_lightning.lab.report.results import (
    CellResult,
    Group,
    aggregate,
    read_lines,
    read_metrics,
    relative_to_base,
)
from dia_lightning.lab.report.study import version_lines


def write_run_report(folder: Path, config: Path) -> Path:
    """Write `report.html`, `results.csv`, `results.md` and `plots/` of a finished run.

    Args:
        folder: of `metrics.json` and `predictions.jsonl`.
        config: the YAML of all settings; may be missing.

    Raises:
        UserError: as `read_metrics`.
    """
    metrics = read_metrics(folder)
    method, base = str(metrics["method"]), metrics.get("base")
    seed = int((read_lines(folder / "predictions.jsonl", 1) or [{}])[0].get("seed", 0))
    results = [CellResult("test", {"method": method}, seed, folder, metrics)]
    if base:
        results.append(CellResult("test", {"method": make.P_THETA}, seed, folder, base))
    results = relative_to_base(results)
    groups = [_with_spread_over_texts(group) for group in aggregate(results)]
    intervals = caption("run_intervals")
    rows = make.View(groups[:1], "method", [method], [method], None, intervals)
    other = groups[1] if base else None
    figures = (
        make.figures_table("quality", rows, other),
        _notes(results),
        _rewards(folder, method),
    )
    text = config.read_text(encoding="utf-8") if config.is_file() else "No config.yaml was found."
    settings = PageBlock("details", text, "config.yaml: every setting of the run")
    last = [version_lines(results), settings]
    sections = [
        Section("figures", "Figures", [block for block in figures if block]),
        *_sections(rows, other),
        Section("configuration", "Configuration and versions", last),
    ]
    write_csv(folder / "results.csv", results)
    return write_page(folder, f"{method}: test report", [_lead(groups)], sections)


def _lead(groups: list[Group]) -> PageBlock:
    first, *base = (group.figures for group in groups)
    values: dict[str, Any] = {"n": int(first["n"].mean), "before": "", "after": "", "more": ""}
    if base:
        before, after = base[0]["reward"].mean, first["reward"].mean
        values |= {"before": number(before, 3), "after": number(after, 3)}
        spread = base[0].get("reward_std")
        if spread is not None and spread.mean > 0:
            values["more"] = number((after - before) / spread.mean, 2)
    return PageBlock("p", caption("run_lead", **values))


def _notes(results: list[CellResult]) -> PageBlock | None:
    """The tokenizer of the diversity figures, and why figures are missing."""
    said = []
    if tokenizer := results[0].metrics.get("tokenizer"):
        said.append(caption("tokenizer", tokenizer=tokenizer))
    for result in results:
        missing = result.metrics.get("reasons") or {}
        listed = "; ".join(f"{label(name).text}: {reason}" for name, reason in missing.items())
        if listed:
            said.append(caption("no_value", method=result.setting["method"], reasons=listed))
    return PageBlock("p", " ".join(said)) if said else None


def _with_spread_over_texts(group: Group) -> Group:
    """The reward's interval from its standard deviation over texts: there is only one run."""
    reward, spread, n = (group.figures.get(key) for key in ("reward", "reward_std", "n"))
    if reward is None or spread is None or n is None:
        return group
    half = 1.96 * spread.mean / math.sqrt(n.mean)
    return replace(group, figures={**group.figures, "reward": reward._replace(half=half)})


def _rewards(folder: Path, method: str) -> Plot | None:
    files = {make.P_THETA: "base_predictions.jsonl", method: "predictions.jsonl"}
    runs = {
        name: [float(line["reward"]) for line in read_lines(folder / file)]
        for name, file in files.items()
    }
    runs = {name: rewards for name, rewards in runs.items() if rewards}
    if not runs:
        return None
    svg = histogram(runs, "reward")
    return Plot("rewards", "Rewards of the texts", caption("rewards"), svg)


def _sections(rows: make.View, base: Group | None) -> list[Section]:
    """Texts, hacking, diagnostics and cost, as far as the run has them."""
    prompts = rows.groups[0].results[0].metrics.get("by_prompt", [])
    found: dict[str, list[Table | PageBlock]] = {
        "texts": make.sample_blocks(rows, base),
        "hacking": make.hacking_blocks(rows, base, 10),
        "diagnostics": make.diagnostics_blocks(rows, prompts),
        "cost": make.cost_blocks(rows, base),
    }
    return [
        Section(name, blocks[0].content, blocks[1:])
        for name, blocks in found.items()
        if blocks and isinstance(blocks[0], PageBlock)
    ]
