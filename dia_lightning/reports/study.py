"""The report of studies: one HTML file, and the same tables as CSV, Markdown and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dia_lightning.reports.blocks import (
    base_group,
    best_of,
    cost_blocks,
    diagnostics_blocks,
    hacking_blocks,
    quality_table,
    sample_blocks,
    view,
)
from dia_lightning.reports.export import write_csv, write_hparams
from dia_lightning.reports.html import (
    Block,
    Details,
    Heading,
    Prose,
    Section,
    Table,
    Terms,
    page,
    to_markdown,
)
from dia_lightning.reports.labels import setting_name, value_name
from dia_lightning.reports.plots import Plot
from dia_lightning.reports.results import Group, Result, Study, aggregate, relative_to_base
from dia_lightning.reports.study_plots import study_plots

GLOSSARY = [
    ("p_θ, λ, r", "The frozen language model, the strength of steering and the reward. Every method aims at "
     "π(x) ∝ p_θ(x) exp(λ r(x)); λ = 0 is p_θ itself."),
    ("reward", "Mean of r over the texts: what was optimised. High reward alone is no success: see the rows below."),
    ("log p_θ per token", "How likely the texts are under p_θ, in nats, the end token included. Far below p_θ's own value: "
     "texts that p_θ would hardly write. Far above: dull or repetitive ones."),
    ("distinct-2", "Share of different word pairs among all of the texts; larger = more diverse. Comparable only for equal "
     "numbers of texts."),
    ("self-BLEU", "How much of a text is found in the other ones, 0 – 100; smaller = more diverse."),
    ("acceptance, ESS", "Diagnostics of the samplers: share of moves that were taken, and how many independent draws the "
     "particles or chains are worth."),
    ("FLOPs, rows, positions", "Work of one text, counted on the networks: multiplications and additions, sequences computed, "
     "tokens computed."),
]  # fmt: skip


def write_report(folder: Path, title: str, studies: Sequence[Study], results: Sequence[Result]) -> Path:
    """Write `report.html`, which needs nothing beside it; `results.csv`, `results.md`, `plots/*.svg` and `tensorboard/` too.

    Args:
        folder: where to; made if it is not there.
        title: of the page.
        studies: a section each, in this order.
        results: of all studies; failed ones too, which are listed.

    Returns:
        The HTML file.
    """
    results = relative_to_base(results)
    groups = aggregate(results)
    sections = [study_section(study, [g for g in groups if g.study == study.name]) for study in studies]
    lead = _lead(studies, results)
    everything = [*sections, _configuration(studies, results)]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "results.csv", results)
    write_hparams(folder / "tensorboard", results)
    return write_page(folder, title, lead, everything)


def write_page(folder: Path, title: str, lead: Sequence[Block], sections: Sequence[Section]) -> Path:
    """`report.html`, `results.md` and the plots of both; an earlier report's plots go."""
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    for old in plots.glob("*.svg"):
        old.unlink()
    for block in (block for section in sections for block in section.blocks):
        if isinstance(block, Plot):
            (plots / f"{block.name}.svg").write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{block.svg}', encoding="utf-8")
    (folder / "results.md").write_text(
        to_markdown([Section("summary", "Summary", list(lead)), *sections], title), encoding="utf-8"
    )
    path = folder / "report.html"
    path.write_text(page(title, lead, sections), encoding="utf-8")
    return path


def study_section(study: Study, groups: Sequence[Group]) -> Section:
    """Question, tables, plots and texts of one study; what failed alone where nothing else is there."""
    blocks: list[Block] = [Prose(study.question, "question")]
    if not groups:
        return Section(study.name, study.title, [*blocks, Prose("No run of this study has finished.")])
    rows = view(groups, study.axes, study.baseline)
    base = base_group(groups)
    table = quality_table(rows, base)
    blocks += [Prose(best_of(rows)), *([table] if table else []), *study_plots(study, rows, base)]
    blocks += [*hacking_blocks(rows, base), *diagnostics_blocks(rows), *cost_blocks(rows, base)]
    return Section(study.name, study.title, [*blocks, *sample_blocks(rows, base, folded="method" not in study.axes)])


def _lead(studies: Sequence[Study], results: Sequence[Result]) -> list[Block]:
    failed = [result for result in results if result.error]
    texts = sorted({int(result.metrics["n"]) for result in results if "n" in result.metrics})
    time = sum(result.seconds for result in results)
    said = [
        f"{len(studies)} {'study' if len(studies) == 1 else 'studies'}, {len(results)} runs, "
        f"{len(results) - len(failed)} finished, {len(failed)} failed.",
        f"{' to '.join(map(str, dict.fromkeys((texts[0], texts[-1]))))} texts a run." if texts else "",
        f"{_duration(time)} of computing in all." if time > 0 else "",
    ]
    blocks: list[Block] = [Prose(" ".join(part for part in said if part))]
    if failed:
        rows = [[r.study, setting_name(r.setting), str(r.seed), r.error] for r in failed]
        caption = "Failed runs: they are in no mean below."
        blocks.append(Table(caption, ["study", "setting", "seed", "error"], rows, frozenset({1, 3}), failed=True))
    blocks.append(_overview(studies, results))
    return [*blocks, Heading("How to read this"), Terms(GLOSSARY), Heading("Contents")]


def _overview(studies: Sequence[Study], results: Sequence[Result]) -> Table:
    rows = []
    for study in studies:
        own = [result for result in results if result.study == study.name]
        settings = len({setting_name(result.setting) for result in own})
        done = sum(not result.error for result in own)
        seeds = len({result.seed for result in own})
        varied = "; ".join(f"{axis}: {_values(axis, own)}" for axis in study.axes)
        rows.append([study.title, varied, str(settings), str(seeds), f"{done} of {len(own)}"])
    return Table("What was run.", ["study", "varied", "settings", "seeds", "runs finished"], rows, frozenset({1}))


def _values(axis: str, results: Sequence[Result]) -> str:
    return ", ".join(dict.fromkeys(value_name(result.setting[axis]) for result in results if axis in result.setting))


def _duration(seconds: float) -> str:
    for size, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"


def _configuration(studies: Sequence[Study], results: Sequence[Result]) -> Section:
    blocks: list[Block] = [Heading("Versions"), Terms(versions(results))]
    blocks += [
        Prose("Every run's own config.yaml, metrics.json and predictions.jsonl lie in its folder, named in results.csv.")
    ]
    for study in studies:
        default = f" (default: {setting_name(study.baseline)})" if study.baseline else ""
        blocks.append(Details(f"{study.title}{default}", study.config or "No configuration was handed in."))
    return Section("configuration", "Configuration and versions", blocks)


def versions(results: Sequence[Result]) -> list[tuple[str, str]]:
    """Each program with its version, or all of them where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for name, version in (result.metrics.get("versions") or {}).items():
            found.setdefault(name, {})[str(version)] = None
    return [(name, ", ".join(all_of)) for name, all_of in found.items()] or [("versions", "none known")]
