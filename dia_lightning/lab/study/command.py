"""`dia study`: run the cells of study files, what is finished left out, and make their report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from dia_lightning.errors import UserError
from dia_lightning.files import require_path
from dia_lightning.lab.study.grid import Cell, StudyGrid, read_study
from dia_lightning.lab.study.worker import Outcome, read_outcome, run_cell
from dia_lightning.settings.options import OptionParser
from dia_lightning.terminal import console, visible

# Of an unknown cell: 64 texts of the tiny kit's annealed population on one thread.
_SECONDS = 15.0
_START_SECONDS = 6.0
_HELP = """Run the cells of study files, each a setting at a seed, in folders
DIR/STUDY/SETTING/seed=K, and write their report to DIR/report.html. Finished cells are not run
again, stopped ones go on, failed ones are tried again. Exit code 1 if a cell failed."""


class Forecast(NamedTuple):
    """Seconds of a cell on one worker, and their source."""

    seconds: float
    basis: str


def forecast(study: StudyGrid, cell: Cell, outcomes: dict[str, Outcome]) -> Forecast:
    """From finished cells of the setting, else of the study, else the file, else a default."""
    done = [(c, outcomes[c.name]) for c in study.cells if c.name in outcomes]
    done = [(c, outcome) for c, outcome in done if not outcome.error]
    same = [outcome.seconds for c, outcome in done if c.setting == cell.setting]
    if same:
        return Forecast(fmean(same), "finished seeds")
    if done:
        seconds = fmean(outcome.seconds for _, outcome in done)
        return Forecast(seconds, "finished cells of the study")
    if study.seconds is not None:
        return Forecast(study.seconds, "the study file")
    return Forecast(_SECONDS, "default")


def check_options(studies: Sequence[StudyGrid], allow: Sequence[str] = ()) -> None:
    """Check that the config's classes have every option, and its type where first set.

    Raises:
        UserError: naming the cell and the option.
    """
    from dia_lightning.settings import parser

    seen = set()
    for cell in [cell for study in studies for cell in study.cells]:
        for run in (cell.fit, cell.run):
            if run is None or (kind := (run.command, run.config, *run.options)) in seen:
                continue
            seen.add(kind)
            arguments = run.arguments(cell.folder, cell.seed)
            try:
                parser.run(arguments, options_only=True, allow=allow)
            except UserError as error:
                raise UserError(f"study {cell.name.rpartition('/')[0]}: {error}") from error


def run_study(arguments: Sequence[str]) -> None:
    """`dia study` with these arguments; UserError for a mistake, SystemExit(1) if a cell failed."""
    options = study_options().parse_args(arguments)
    paths = [require_path(path, "study") for path in options.files]
    studies = [read_study(path, options.out, options.kit, options.seeds) for path in paths]
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        twice = max(names, key=names.count)
        raise UserError(f"study: two files are named {twice}.yaml; their cells would share folders")
    check_options(studies, options.allow)
    cells = [cell for study in studies for cell in study.cells]
    chosen = [cell for cell in cells if _is_chosen(cell, options.only)]
    if not chosen:
        patterns = " or ".join(options.only)
        raise UserError(f"--only: no cell of {', '.join(names)} is named {patterns}")
    outcomes = {cell.name: o for cell in cells if (o := read_outcome(cell)) is not None}
    waiting = [cell for cell in chosen if cell.name not in outcomes or outcomes[cell.name].error]
    jobs = options.jobs or _default_jobs()
    if options.dry_run:
        _print_plan(studies, {cell.name for cell in chosen}, outcomes, jobs)
        return
    failed = _run_all(waiting, len(chosen) - len(waiting), jobs, outcomes, options.allow)
    print(visible(f"Report: {_report(options.out, studies, outcomes)}"))
    if failed:
        sys.exit(1)


def _is_chosen(cell: Cell, only: Sequence[str]) -> bool:
    """Whether a pattern of `--only` matches the study, the setting's folder or both."""
    study, setting, _ = cell.name.split("/")
    names = (study, setting, f"{study}/{setting}")
    return not only or any(fnmatch(name, pattern) for pattern in only for name in names)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else _cores()


def _run_all(
    waiting: Sequence[Cell],
    n_finished: int,
    jobs: int,
    outcomes: dict[str, Outcome],
    allow: Sequence[str],
) -> int:
    """Run the cells, add their outcomes, show progress; return the number of failures."""
    from rich.progress import track

    from dia_lightning.lab.study.pool import run_cells

    if n_finished:
        print(f"{n_finished} cells are finished already.")
    screen, failed, n = console(), 0, len(waiting)
    threads = max(1, _cores() // jobs)
    ended = run_cells(waiting, jobs, threads, partial(run_cell, allow=allow))
    silent = not screen.is_terminal
    shown = track(ended, "cells", total=n, console=screen, disable=silent)
    for i, (cell, outcome) in enumerate(shown, 1):
        outcomes[cell.name] = outcome
        failed += bool(outcome.error)
        if silent or outcome.error:
            end = f"failed: {outcome.error}" if outcome.error else f"{outcome.seconds:.1f} s"
            screen.print(f"[{i}/{n}] {cell.name}  {end}", soft_wrap=True, highlight=False)
    if failed:
        advice = "their log.txt says more, the same command tries them again"
        print(f"{failed} of {n} cells failed; {advice}.")
    return failed


def _print_plan(
    studies: Sequence[StudyGrid], chosen: set[str], outcomes: dict[str, Outcome], jobs: int
) -> None:
    from rich.table import Table

    screen = console()
    table = Table("study", "setting", "seeds", "to run", "s per cell", "based on")
    total, left = 0.0, 0
    for study in studies:
        settings: dict[str, list[Cell]] = {}
        for cell in study.cells:
            if cell.name in chosen:
                settings.setdefault(cell.name.split("/")[1], []).append(cell)
        for name, cells in settings.items():
            guess = forecast(study, cells[0], outcomes)
            waiting = [c for c in cells if c.name not in outcomes or outcomes[c.name].error]
            n_failed = sum(c.name in outcomes for c in waiting)
            total, left = total + len(waiting) * guess.seconds, left + len(waiting)
            seeds = ",".join(str(c.seed) for c in cells)
            rest = f"{len(waiting)} ({n_failed} failed)" if n_failed else f"{len(waiting)}"
            table.add_row(study.name, name, seeds, rest, f"{guess.seconds:.1f}", guess.basis)
    screen.print(table)
    minutes = (total / jobs + (_START_SECONDS if left else 0)) / 60
    work = f"{total:.0f} s of work, about {minutes:.1f} min with --jobs {jobs}"
    line = f"{left} of {len(chosen)} cells to run: {work}. Nothing was run."
    screen.print(line, soft_wrap=True)


def _report(out: Path, studies: Sequence[StudyGrid], outcomes: dict[str, Outcome]) -> Path:
    """The report of every cell that was tried, in these studies."""
    from dia_lightning.lab.report.results import CellResult, read_metrics
    from dia_lightning.lab.report.study import write_report

    results = []
    for cell in [cell for study in studies for cell in study.cells if cell.name in outcomes]:
        error, seconds, _ = outcomes[cell.name]
        metrics = {} if error else read_metrics(cell.folder)
        known = (cell.study, cell.setting, cell.seed, cell.folder)
        results.append(CellResult(*known, metrics, error, seconds))
    title = out.name.replace("_", " ").capitalize()
    title = studies[0].title if len(studies) == 1 else title
    return write_report(out, title, studies, results)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def study_options() -> OptionParser:
    """Of `dia study`."""
    parser = OptionParser(prog="dia study", description=_HELP)
    add = parser.add_argument
    files = "study files, for example configs/ablations/lam.yaml"
    add("files", nargs="+", metavar="FILE", help=files)
    folder = "folder of the cells and the report"
    add("--out", required=True, type=Path, metavar="DIR", help=folder)
    add("--kit", default="tiny", help="value of {kit} in the files (default: tiny)")
    plan = "list the cells with their estimated times, run nothing"
    add("--dry-run", action="store_true", help=plan)
    jobs = "processes at once (default: one per core; with CUDA one)"
    add("--jobs", type=_positive, help=jobs)
    add("--seeds", type=_integers, metavar="K,K,…", help="in place of the files' seeds")
    parser.add_allow()
    only = "only these: STUDY, SETTING or STUDY/SETTING, * for any"
    add("--only", nargs="+", default=[], metavar="NAME", help=only)
    return parser
