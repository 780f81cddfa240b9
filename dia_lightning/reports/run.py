"""The report of one finished run of `lightning test`: the method beside p_θ itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from dia_lightning.reports.blocks import (
    P_THETA,
    View,
    cost_blocks,
    diagnostics_blocks,
    hacking_blocks,
    quality_table,
    sample_blocks,
)
from dia_lightning.reports.export import write_csv
from dia_lightning.reports.html import Block, Details, Heading, Prose, Section, Terms
from dia_lightning.reports.labels import label, number
from dia_lightning.reports.plots import Plot, histogram
from dia_lightning.reports.results import (
    Group,
    Result,
    aggregate,
    read_lines,
    read_metrics,
    relative_to_base,
)
from dia_lightning.reports.study import GLOSSARY, versions, write_page

_BASE = "zero_shot"


def write_run_report(folder: Path, config: Path) -> Path:
    """`report.html`, `results.csv`, `results.md` and `plots/` of the finished run in `folder`.

    Args:
        folder: of `metrics.json` and `predictions.jsonl`.
        config: the YAML of all settings; said to be missing where there is none.

    Raises:
        UserError: as `read_metrics`.
    """
    metrics = read_metrics(folder)
    method, base = str(metrics["method"]), metrics.get("base")
    seed = int((read_lines(folder / "predictions.jsonl", 1) or [{}])[0].get("seed", 0))
    own = Result("test", {"method": method}, seed, folder, metrics)
    results = [own, *([Result("test", {"method": P_THETA}, seed, folder, base)] if base else [])]
    results = relative_to_base(results)
    groups = [_with_spread_over_texts(group) for group in aggregate(results)]
    rows = View(
        groups[:1], "method", [method], [method], None,
        "± of the reward: 95 % interval over the run's texts, as if they were independent; of the rest none with one run.",
    )  # fmt: skip
    other = groups[1] if base else None
    figures = (quality_table(rows, other), _notes(results), _rewards(folder, method))
    sections = [
        Section("figures", "Figures", [block for block in figures if block]),
        *_sections(rows, other),
        _configuration(config, results),
    ]
    write_csv(folder / "results.csv", results)
    return write_page(folder, f"{method}: test report", [_lead(groups), Terms(GLOSSARY)], sections)


def _lead(groups: list[Group]) -> Prose:
    first = groups[0].figures
    said = f"{int(first['n'].mean)} texts"
    if len(groups) > 1:
        before, after = (g.figures["reward"].mean for g in (groups[1], groups[0]))
        spread = groups[1].figures.get("reward_std")
        said += f"; mean reward {number(before, 3)} for p_θ itself, {number(after, 3)} for the method"
        if spread is not None and spread.mean > 0:
            said += f", {number((after - before) / spread.mean, 2)} of p_θ's standard deviations over texts higher"
    return Prose(f"{said}.")


def _notes(results: list[Result]) -> Prose | None:
    """How texts were cut into words, and why figures are missing."""
    said = []
    if tokenizer := results[0].metrics.get("tokenizer"):
        said.append(f"Self-BLEU and distinct-n: sacrebleu's tokenizer {tokenizer}.")
    for result in results:
        missing = result.metrics.get("reasons") or {}
        listed = "; ".join(f"{label(name).text}: {reason}" for name, reason in missing.items())
        said += [f"Without a value for {result.setting['method']}: {listed}."] if listed else []
    return Prose(" ".join(said)) if said else None


def _with_spread_over_texts(group: Group) -> Group:
    """The reward's interval from its standard deviation over texts, since there is one run only."""
    reward, spread, n = (group.figures.get(key) for key in ("reward", "reward_std", "n"))
    if reward is None or spread is None or n is None:
        return group
    half = 1.96 * spread.mean / math.sqrt(n.mean)
    return replace(group, figures={**group.figures, "reward": reward._replace(half=half)})


def _rewards(folder: Path, method: str) -> Plot | None:
    files = {P_THETA: folder / "base_predictions.jsonl", method: folder / "predictions.jsonl"}
    runs = {name: [float(line["reward"]) for line in read_lines(path)] for name, path in files.items()}
    runs = {name: rewards for name, rewards in runs.items() if rewards}
    if not runs:
        return None
    caption = (
        "Grey: p_θ itself, outline: the method; vertical lines: means. The method should move the whole of the mass to "
        "the right, not a few texts to an extreme."
    )
    return Plot("rewards", "Rewards of the texts", caption, histogram(runs, "reward"))


def _sections(rows: View, base: Group | None) -> list[Section]:
    """What the run has of: texts, hacking, diagnostics, cost."""
    found: list[tuple[str, list[Block]]] = [
        ("texts", sample_blocks(rows, base)), ("hacking", hacking_blocks(rows, base, 10)),
        ("diagnostics", diagnostics_blocks(rows)), ("cost", cost_blocks(rows, base)),
    ]  # fmt: skip
    return [Section(name, blocks[0].text, blocks[1:]) for name, blocks in found if blocks and isinstance(blocks[0], Heading)]


def _configuration(config: Path, results: list[Result]) -> Section:
    text = config.read_text(encoding="utf-8") if config.is_file() else "No config.yaml was found."
    folder = Details("config.yaml: every setting of the run", text)
    return Section("configuration", "Configuration and versions", [Terms(versions(results)), folder])
