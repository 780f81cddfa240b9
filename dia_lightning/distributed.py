"""The processes of one run: when one is killed the others end, and one line says which it was."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NoReturn

from filelock import FileLock, Timeout

from dia_lightning.errors import INTERRUPTS, UserError

if TYPE_CHECKING:
    import lightning as L

# Between a lost connection, which the trainer notices first, and the news that a process is gone.
_GRACE_S = 2.5


def death(code: int) -> str:
    """How a process ended, by its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"


def refuse_lone(trainer: L.Trainer) -> None:
    """Refuse a launcher's processes that do not know of each other, since each would do the whole
    work.

    Raises:
        UserError: in the first process; the others end without a word, with the same exit code.
    """
    rank, n = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if trainer.world_size > 1 or not (rank.isdecimal() and n.isdecimal()) or int(n) < 2:
        return
    if int(rank):
        time.sleep(_GRACE_S)  # torchrun kills the others when one ends
        raise SystemExit(2)
    here = os.environ.get("LOCAL_WORLD_SIZE", n)
    nodes = f" trainer.num_nodes {int(n) // int(here)}" if here != n else ""
    raise UserError(
        f"trainer.devices: {n} processes were started (by torchrun, say) and the trainer knows of"
        f" one; give trainer.devices {here}{nodes} trainer.strategy ddp"
    )


@contextmanager
def one_fit(trainer: L.Trainer, command: str) -> Iterator[None]:
    """While a `fit` lasts, its folder takes no other; the system takes the lock back, in
    whatever way it ends.
    """
    if command != "fit" or not trainer.is_global_zero or "://" in str(trainer.default_root_dir):
        yield
        return
    folder = Path(trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".fit.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(
            f"trainer.default_root_dir: another fit is writing to {folder}; wait, or give another"
            " folder"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_for_all(trainer: L.Trainer) -> Iterator[None]:
    """While it lasts, the end of one process of the run by a signal ends the others with exit code
    1.

    Lightning's own observer looks every five seconds, and then kills without a word; that the first
    process was killed, it does not notice. What a process says before it ends by itself is said
    once, and its exit code is that of the run.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment

    launcher: Any = trainer.strategy.launcher
    # Others, as torchrun and SLURM, look after their processes themselves.
    if trainer.world_size == 1 or not isinstance(
        getattr(launcher, "cluster_environment", None), LightningEnvironment
    ):
        yield
        return
    ending = Event()
    first = trainer.local_rank == 0
    Thread(
        target=_watch_others if first else _watch_first, args=(trainer, ending), daemon=True
    ).start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError):  # as by a lost connection; who watches knows why
            time.sleep(_GRACE_S)
        ending.set()
        for process in launcher.procs:  # they would wait for this one
            process.kill()
        raise
    finally:
        ending.set()


def _watch_others(trainer: L.Trainer, ending: Event) -> None:
    """In the first process, which has started the others of this machine, or will."""
    launcher: Any = trainer.strategy.launcher
    while not launcher.procs:
        if ending.wait(0.1):
            return
    for i, process in enumerate(launcher.procs, 1):
        Thread(
            target=_await,
            args=(process, trainer.global_rank + i, launcher.procs, ending),
            daemon=True,
        ).start()


def _await(process: Popen[bytes], rank: int, processes: list[Popen[bytes]], ending: Event) -> None:
    code = process.wait()
    if INTERRUPTS.pressed or (code > 0 and ending.wait(_GRACE_S)):
        return  # this one has the same reason to end, and is about to say it
    if code and not ending.is_set():
        ending.set()
        for other in processes:
            other.kill()
        _leave(f"the process of rank {rank} {death(code)}" if code < 0 else "", max(code, 1))


def _watch_first(trainer: L.Trainer, ending: Event) -> None:
    """In another process, which was started by the first one."""
    parent = os.getppid()
    while not ending.wait(1.0):
        if os.getppid() != parent:
            rank = trainer.global_rank - trainer.local_rank
            _leave(f"the process of rank {rank} is gone" if trainer.local_rank == 1 else "", 1)


def _leave(reason: str, code: int) -> NoReturn:
    if reason:
        line = (
            f"error: {reason}, so the whole run ends; what is finished is kept, the same command"
            " goes on from there"
        )
        print(line, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
