"""A process that runs one cell after another: torch and lightning are imported once."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

from dia_lightning.errors import UserError, root_user_error
from dia_lightning.lab.study.grid import Cell


class Outcome(NamedTuple):
    """How a cell ended.

    error: one line, "" for success. seconds: of this try, without the start of Python. peak_mib:
    largest resident memory of the process so far, with its earlier cells.
    """

    error: str
    seconds: float
    peak_mib: int = 0


def read_outcome(cell: Cell) -> Outcome | None:
    """Of the cell's last try, from `cell.json`; None if not tried, stopped, or of another cell."""
    found = _read_json(cell.folder / "cell.json")
    if found.get("key") != cell.key:
        return None
    outcome = Outcome(found["error"], found["seconds"], found["peak_mib"])
    complete = _read_json(cell.folder / "metrics.json").get("complete") is True
    return outcome if outcome.error or complete else None


def write_outcome(cell: Cell, outcome: Outcome) -> None:
    """Write `cell.json`, the last file of a cell."""
    from dia_lightning.callbacks.run_files import write_atomically

    cell.folder.mkdir(parents=True, exist_ok=True)
    known = {"schema": 1, "key": cell.key, "setting": cell.setting, "seed": cell.seed}
    text = json.dumps({**known, **outcome._asdict()}, ensure_ascii=False, indent=2)
    write_atomically(cell.folder / "cell.json", f"{text}\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def work(connection: Connection, threads: int, run: Callable[[Cell], Outcome]) -> None:
    """Take cells from `connection`, send their outcomes; until it closes or the parent dies."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Before torch is imported.
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    while True:
        try:
            cell = connection.recv()
        except EOFError:
            os._exit(0)
        connection.send(run(cell))


def _end_with_parent() -> None:
    """A worker that outlived a killed parent would write beside the next one's."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_cell(cell: Cell, allow: Sequence[str] = ()) -> Outcome:
    """Train, if the cell does, and sample; continue a stopped try. All output goes to `log.txt`.

    Args:
        cell: to run.
        allow: as `parser.run`.
    """
    (cell.folder / "cell.json").unlink(missing_ok=True)
    cell.folder.mkdir(parents=True, exist_ok=True)
    error = ""
    with _output_to(cell.folder / "log.txt"):
        from dia_lightning.settings import parser

        start = time.monotonic()
        try:
            if cell.fit is not None:
                _train(cell, allow)
            parser.run(cell.run.arguments(cell.folder, cell.seed), allow=allow)
            if _read_json(cell.folder / "metrics.json").get("complete") is not True:
                raise UserError("stopped before its last batch")
        except BaseException as raised:
            traceback.print_exc()
            error = _one_line(raised)
    gc.collect()
    outcome = Outcome(error, round(time.monotonic() - start, 3), _peak_mib())
    write_outcome(cell, outcome)
    return outcome


def _train(cell: Cell, allow: Sequence[str]) -> None:
    """Run the cell's `fit`, from its last checkpoint if stopped; nothing if finished."""
    from dia_lightning.callbacks.run_files import write_atomically
    from dia_lightning.settings import parser

    assert cell.fit is not None
    folder, key = cell.folder / "fit", cell.fit.key(cell.seed)
    mark, last = folder / "fit.json", folder / "checkpoints" / "last.ckpt"
    state = _read_json(mark)
    if state == {"key": key, "finished": True}:
        return
    if state.get("key") != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(mark, json.dumps({"key": key, "finished": False}))
    begin = [f"--ckpt_path={last}"] if is_zipfile(last) else []
    parser.run([*cell.fit.arguments(cell.folder, cell.seed), *begin], allow=allow)
    write_atomically(mark, json.dumps({"key": key, "finished": True}))


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Redirect everything that this process prints, also from C, to `path`."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("w", encoding="utf-8") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def _one_line(error: BaseException) -> str:
    mistake = root_user_error(error)
    if mistake is not None:
        return " ".join(str(mistake).split())
    reason = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {reason}"


def _peak_mib() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1024 * 1024 if sys.platform == "darwin" else 1024)
