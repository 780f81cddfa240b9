"""Results for other programs: a CSV file with one row per run, and TensorBoard's hparams."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from dia_lightning.files import no_formula
from dia_lightning.lab.report.results import CellResult, flatten


def write_csv(path: Path, results: Sequence[CellResult]) -> None:
    """One row per run: study, setting, seed, error, seconds, folder and every figure.

    A text that a spreadsheet would run as a formula, such as an error that begins with "--", has
    an apostrophe in front.
    """
    rows = [
        {
            "study": result.study,
            **{f"setting/{axis}": value for axis, value in result.setting.items()},
            "seed": result.seed,
            "error": result.error,
            "seconds": f"{result.seconds:.1f}",
            "folder": result.folder.as_posix(),
            **flatten(result.metrics),
        }
        for result in results
    ]
    names = sorted(
        dict.fromkeys(name for row in rows for name in row),
        key=lambda name: (name != "study", not name.startswith("setting/")),
    )
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        for row in ({name: name for name in names}, *rows):
            writer.writerow({name: no_formula(cell) for name, cell in row.items()})


def write_hparams(folder: Path, results: Sequence[CellResult]) -> None:
    """One TensorBoard run per finished run; `folder` is emptied first."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for i, result in enumerate(results):
            figures = flatten(result.metrics)
            if result.error or not figures:
                continue
            setting = {
                key: value if isinstance(value, bool | int | float | str) else str(value)
                for key, value in result.setting.items()
            }
            told = ",".join([result.study, *(f"{k}={v}" for k, v in setting.items())])
            told = re.sub(r"[^\w.=,-]+", "_", told)[:80]
            name = f"{i:04d}-{told}-seed={result.seed}"
            options = {"study": result.study, "seed": result.seed, **setting}
            writer.add_hparams(options, figures, run_name=name)
