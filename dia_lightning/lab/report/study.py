"""The report of studies: one HTML file, and its tables as CSV, Markdown and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dia_lightning.lab.report import blocks as make
from dia_lightning.lab.report.export import write_csv, write_hparams
from dia_lightning.lab.report.labels import caption, setting_name, value_name
from dia_lightning.lab.report.page import PageBlock, Section, Table, write_page
from dia_lightning.lab.report.plots import Plot
from dia_lightning.lab.report.results import CellResult, Group, Study, aggregate, relative_to_base
from dia_lightning.lab.report.study_plots import study_plots


def write_report(
    folder: Path, title: str, studies: Sequence[Study], results: Sequence[CellResult]
) -> Path:
    """Write `report.html`, `results.csv`, `results.md`, `plots/*.svg` and `tensorboard/`.

    Args:
        folder: where to; made if it is missing.
        title: of the page.
        studies: one section each, in this order.
        results: of all studies; failed ones too, which are listed.

    Returns:
        The HTML file, which needs nothing beside it.
    """
    results = relative_to_base(results)
    groups = aggregate(results)
    sections = [
        study_section(study, [g for g in groups if g.study == study.name]) for study in studies
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "results.csv", results)
    write_hparams(folder / "tensorboard", results)
    sections.append(_configuration(studies, results))
    return write_page(folder, title, _lead(studies, results), sections)


def study_section(study: Study, groups: Sequence[Group]) -> Section:
    """Question, tables, plots and texts of one study."""
    blocks: list[Table | Plot | PageBlock] = [PageBlock("p", study.question, "question")]
    if not groups:
        return Section(study.name, study.title, [*blocks, PageBlock("p", caption("unfinished"))])
    rows = make.view(groups, study.axes, study.baseline)
    base = make.base_group(groups)
    table = make.figures_table("quality", rows, base)
    blocks += [PageBlock("p", make.best_of(rows)), *([table] if table else [])]
    blocks += study_plots(study, rows, base)
    blocks += make.hacking_blocks(rows, base) + make.diagnostics_blocks(rows)
    blocks += make.cost_blocks(rows, base)
    blocks += make.sample_blocks(rows, base, folded="method" not in study.axes)
    return Section(study.name, study.title, blocks)


def _lead(studies: Sequence[Study], results: Sequence[CellResult]) -> list[Table | PageBlock]:
    failed = [result for result in results if result.error]
    texts = sorted({int(result.metrics["n"]) for result in results if "n" in result.metrics})
    seconds = sum(result.seconds for result in results)
    size, unit = next((u for u in ((3600, "h"), (60, "min")) if seconds >= u[0]), (1, "s"))
    told = caption(
        "study_lead",
        n_studies=len(studies),
        n=len(results),
        failed=len(failed),
        texts=[*texts[:1], *texts[-1:]],
        seconds=seconds,
        duration=f"{seconds / size:.1f} {unit}",
    )
    head = ["study", "setting", "seed", "error"]
    rows = [[r.study, setting_name(r.setting), str(r.seed), r.error] for r in failed]
    table = Table(caption("failed"), head, rows, frozenset({1, 3}), failed=True)
    return [PageBlock("p", told), *([table] if failed else []), _overview(studies, results)]


def _overview(studies: Sequence[Study], results: Sequence[CellResult]) -> Table:
    rows = []
    for study in studies:
        own = [result for result in results if result.study == study.name]
        varied = {
            axis: dict.fromkeys(value_name(r.setting[axis]) for r in own if axis in r.setting)
            for axis in study.axes
        }
        rows.append(
            [
                study.title,
                "; ".join(f"{axis}: {', '.join(values)}" for axis, values in varied.items()),
                str(len({setting_name(result.setting) for result in own})),
                str(len({result.seed for result in own})),
                f"{sum(not result.error for result in own)} of {len(own)}",
            ]
        )
    head = ["study", "varied", "settings", "seeds", "runs finished"]
    return Table(caption("all_runs"), head, rows, frozenset({1}))


def _configuration(studies: Sequence[Study], results: Sequence[CellResult]) -> Section:
    blocks = [
        PageBlock("h3", "Versions"),
        version_lines(results),
        PageBlock("p", caption("folders")),
    ]
    for study in studies:
        default = f" (default: {setting_name(study.baseline)})" if study.baseline else ""
        config = study.config or "No configuration was handed in."
        blocks.append(PageBlock("details", config, f"{study.title}{default}"))
    return Section("configuration", "Configuration and versions", blocks)


def version_lines(results: Sequence[CellResult]) -> PageBlock:
    """Each program with its version, or all of them where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for name, version in (result.metrics.get("versions") or {}).items():
            found.setdefault(name, {})[str(version)] = None
    rows = {name: ", ".join(all_of) for name, all_of in found.items()}
    return PageBlock("dl", rows or {"versions": "none known"})
