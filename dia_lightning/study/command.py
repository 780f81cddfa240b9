"""`dia study`: run the cells of study files, what is finished left out, and make their report."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dia_lightning.errors import UserError
from dia_lightning.files import require_path
from dia_lightning.settings.options import OptionParser
from dia_lightning.study.grid import Cell, StudyGrid, read_study
from dia_lightning.study.worker import Outcome, read_outcome, run_cell
from dia_lightning.terminal import console, visible

# Of a cell that nothing is known of: 64 texts of the tiny kit's annealed population on one thread.
_SECONDS = 15.0
_START_SECONDS = 6.0
_HELP = """Run the cells of study files, each a setting at a seed, in folders DIR/STUDY/SETTING/seed=K, and write their report
to DIR/report.html. What is finished is not run again, what was stopped goes on, what failed is tried again. Exit code 1 if a
cell failed."""


class Estimate(NamedTuple):
    """Seconds of a cell on one worker, and what they are based on."""

    seconds: float
    basis: str


def estimate(study: StudyGrid, cell: Cell, outcomes: dict[str, Outcome]) -> Estimate:
    """From finished cells of the same setting, else of the same study, else the study file, else a default."""
    done = [(c, o.seconds) for c in study.cells if (o := outcomes.get(c.name)) is not None and not o.error]
    same = [seconds for c, seconds in done if c.setting == cell.setting]
    if same:
        return Estimate(sum(same) / len(same), "finished seeds")
    if done:
        return Estimate(sum(seconds for _, seconds in done) / len(done), "finished cells of the study")
    if study.seconds is not None:
        return Estimate(study.seconds, "the study file")
    return Estimate(_SECONDS, "default")


def check_options(studies: Sequence[StudyGrid], allow: Sequence[str] = ()) -> None:
    """That every option is one that the config's classes have, and of its type in the first cell that sets it.

    Raises:
        UserError: naming the cell and the option.
    """
    from dia_lightning.settings import parser

    seen = set()
    for cell in [cell for study in studies for cell in study.cells]:
        for run in (cell.fit, cell.run):
            kind = None if run is None else (run.command, run.config, *run.options)
            if run is not None and kind not in seen:
                seen.add(kind)
                try:
                    parser.run(run.arguments(cell.folder, cell.seed), options_only=True, allow=allow)
                except UserError as error:
                    raise UserError(f"study {cell.name.rpartition('/')[0]}: {error}") from error


def run(arguments: Sequence[str]) -> None:
    """`dia study` with these arguments; UserError for a mistake, SystemExit(1) if a cell failed."""
    options = options_parser().parse_args(arguments)
    paths = [require_path(path, "study") for path in options.files]
    studies = [read_study(path, options.out, options.kit, options.seeds) for path in paths]
    names = [study.name for study in studies]
    if len(set(names)) < len(names):
        raise UserError(f"study: two files are named {max(names, key=names.count)}.yaml; their cells would share folders")
    check_options(studies, options.allow)
    chosen = [cell for study in studies for cell in study.cells if _is_chosen(cell, options.only)]
    if not chosen:
        raise UserError(f"--only: no cell of {', '.join(names)} is named {' or '.join(options.only)}")
    outcomes = {c.name: o for study in studies for c in study.cells if (o := read_outcome(c)) is not None}
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
    return not only or any(fnmatch(name, pattern) for pattern in only for name in (study, setting, f"{study}/{setting}"))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _default_jobs() -> int:
    import torch

    return 1 if torch.cuda.is_available() else _cores()


def _run_all(waiting: Sequence[Cell], n_finished: int, jobs: int, outcomes: dict[str, Outcome], allow: Sequence[str]) -> int:
    """Run what waits, note how it ended in `outcomes`, show progress; how many failed."""
    from dia_lightning.study.pool import run_cells

    if n_finished:
        print(f"{n_finished} cells are finished already.")
    failed = 0
    ended = run_cells(waiting, min(jobs, max(len(waiting), 1)), max(1, _cores() // jobs), partial(run_cell, allow=allow))
    for cell, outcome in _shown(ended, len(waiting)):
        outcomes[cell.name] = outcome
        failed += bool(outcome.error)
    if failed:
        print(f"{failed} of {len(waiting)} cells failed; their log.txt says more, the same command tries them again.")
    return failed


def _shown(ended: Iterator[tuple[Cell, Outcome]], n: int) -> Iterator[tuple[Cell, Outcome]]:
    """The same, with a bar on a terminal, else a line a cell."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    screen = console()
    rate = TextColumn("{task.fields[rate]}")
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        rate,
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as progress:
        task = progress.add_task("", total=n, rate="")
        for i, (cell, outcome) in enumerate(ended, 1):
            if not screen.is_terminal or outcome.error:
                end = f"failed: {outcome.error}" if outcome.error else f"{outcome.seconds:.1f} s"
                progress.console.print(f"[{i}/{n}] {cell.name}  {end}", soft_wrap=True, highlight=False)
            spent = progress.tasks[0].elapsed or 0.0
            progress.update(task, advance=1, rate=f"{60 * i / spent:.1f} cells/min" if spent else "")
            yield cell, outcome


def _print_plan(studies: Sequence[StudyGrid], chosen: set[str], outcomes: dict[str, Outcome], jobs: int) -> None:
    from rich.table import Table

    screen = console()
    table = Table("study", "setting", "seeds", "to run", "s a cell", "based on")
    total, left = 0.0, 0
    for study in studies:
        settings: dict[str, list[Cell]] = {}
        for cell in study.cells:
            if cell.name in chosen:
                settings.setdefault(cell.name.split("/")[1], []).append(cell)
        for name, cells in settings.items():
            guess = estimate(study, cells[0], outcomes)
            waiting = [c for c in cells if c.name not in outcomes or outcomes[c.name].error]
            n_failed = sum(c.name in outcomes for c in waiting)
            total, left = total + len(waiting) * guess.seconds, left + len(waiting)
            seeds = ",".join(str(c.seed) for c in cells)
            rest = f"{len(waiting)} ({n_failed} failed)" if n_failed else f"{len(waiting)}"
            table.add_row(study.name, name, seeds, rest, f"{guess.seconds:.1f}", guess.basis)
    screen.print(table)
    minutes = (total / jobs + (_START_SECONDS if left else 0)) / 60
    screen.print(
        f"{left} of {len(chosen)} cells to run: {total:.0f} s of work, about {minutes:.1f} min with --jobs {jobs}. "
        "Nothing was run.",
        soft_wrap=True,
    )


def _report(out: Path, studies: Sequence[StudyGrid], outcomes: dict[str, Outcome]) -> Path:
    """The report of every cell that was tried, in these studies."""
    from dia_lightning.reports.results import Result, Study, read_result
    from dia_lightning.reports.study import write_report

    results = []
    for cell in [cell for study in studies for cell in study.cells if cell.name in outcomes]:
        outcome = outcomes[cell.name]
        if outcome.error:
            known = (cell.study, cell.setting, cell.seed, cell.folder)
            results.append(Result(*known, error=outcome.error, seconds=outcome.seconds))
        else:
            results.append(read_result(cell.folder, cell.study, cell.setting, cell.seed, outcome.seconds))
    described = [Study(s.name, s.title, s.question, list(s.axes), s.baseline, s.text) for s in studies]
    title = described[0].title if len(described) == 1 else out.name.replace("_", " ").capitalize()
    return write_report(out, title, described, results)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def options_parser() -> OptionParser:
    """Of `dia study`."""
    parser = OptionParser(prog="dia study", description=_HELP)
    parser.add_argument("files", nargs="+", metavar="FILE", help="study files, for example configs/ablations/lam.yaml")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the cells and the report")
    parser.add_argument("--kit", default="tiny", help="what {kit} stands for in the files (default: tiny)")
    parser.add_argument("--dry-run", action="store_true", help="list the cells with the time they may take, run nothing")
    parser.add_argument("--jobs", type=_positive, help="processes at once (default: one a core; with CUDA one)")
    parser.add_argument("--seeds", type=_integers, metavar="K,K,…", help="in place of the files' seeds")
    parser.add_allow()
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="only these: STUDY, SETTING or STUDY/SETTING, * for any"
    )
    return parser
