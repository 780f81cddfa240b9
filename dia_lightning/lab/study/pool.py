"""Cells over several worker processes; one that dies takes only its current cell with it.

`ProcessPoolExecutor` fails as a whole when one process dies, and does not say how it died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from time import monotonic

from dia_lightning.distributed import death
from dia_lightning.lab.study.grid import Cell
from dia_lightning.lab.study.worker import Outcome, run_cell, work, write_outcome


class _Worker:
    """A process, the connection to it, and its current cell."""

    cell: Cell

    def __init__(self, threads: int, run: Callable[[Cell], Outcome]) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, threads, run)
        self.process: SpawnProcess = context.Process(target=work, args=arguments, daemon=True)
        self.process.start()
        # Else the end of the process would not end the connection.
        theirs.close()

    def give(self, cell: Cell) -> None:
        self.cell, self.since = cell, monotonic()
        self.connection.send(cell)

    def outcome(self) -> Outcome:
        """Of the current cell, once the connection is ready; a death is written down here."""
        try:
            found: Outcome = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            error = f"its process {death(self.process.exitcode or 0)}"
            found = Outcome(error, round(monotonic() - self.since, 3))
            write_outcome(self.cell, found)
        return found

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def run_cells(
    cells: Sequence[Cell], jobs: int, threads: int, run: Callable[[Cell], Outcome] = run_cell
) -> Iterator[tuple[Cell, Outcome]]:
    """Run all cells, about in order, and yield each with its outcome as it ends.

    Args:
        cells: to run.
        jobs: processes at once.
        threads: of torch in each process.
        run: the work on a cell.
    """
    waiting = deque(cells)
    workers: list[_Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                workers.append(_Worker(threads, run))
                workers[-1].give(waiting.popleft())
            ready: Sequence[object] = wait([worker.connection for worker in workers])
            for worker in [w for w in workers if w.connection in ready]:
                cell, outcome = worker.cell, worker.outcome()
                # Give the next cell before the caller's work, so that no process waits.
                if waiting and worker.process.is_alive():
                    worker.give(waiting.popleft())
                else:
                    workers.remove(worker)
                    worker.end()
                yield cell, outcome
    finally:
        for worker in workers:
            worker.end()
