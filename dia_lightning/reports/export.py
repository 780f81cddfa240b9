"""The results of studies for other programs: one CSV row a run, and TensorBoard's hparams."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from dia_lightning.files import no_formula
from dia_lightning.reports.results import Result, flatten


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """One row a run: `study`, what is varied, `seed`, `error`, `seconds`, `folder` and every figure.

    An empty cell: there is none. A text that a spreadsheet would run as a formula, such as an error
    that begins with "--", has an apostrophe in front.
    """
    varied = list(dict.fromkeys(axis for result in results for axis in result.setting))
    figures = [flatten(result.metrics) for result in results]
    names = list(dict.fromkeys(name for found in figures for name in found))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        settings = [f"setting/{axis}" for axis in varied]
        header = ["study", *settings, "seed", "error", "seconds", "folder", *names]
        rows.writerow(map(no_formula, header))
        for result, found in zip(results, figures, strict=True):
            setting = [result.setting.get(axis, "") for axis in varied]
            rest = [result.seed, result.error, f"{result.seconds:.1f}", result.folder.as_posix()]
            cells = [result.study, *setting, *rest, *(found.get(name, "") for name in names)]
            rows.writerow(map(no_formula, cells))


def write_hparams(folder: Path, results: Sequence[Result]) -> None:
    """One TensorBoard run a finished run; `folder` is emptied first."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    with SummaryWriter(str(folder)) as writer:
        for i, result in enumerate(results):
            figures = flatten(result.metrics)
            if result.error or not figures:
                continue
            setting = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in result.setting.items()}
            name = re.sub(r"[^\w.=,-]+", "_", ",".join([result.study, *(f"{k}={v}" for k, v in setting.items())]))[:80]
            options = {"study": result.study, "seed": result.seed, **setting}
            writer.add_hparams(options, figures, run_name=f"{i:04d}-{name}-seed={result.seed}")
