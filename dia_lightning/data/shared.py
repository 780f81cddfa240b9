"""Work that processes share out among themselves and hand over in files."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from dia_lightning.errors import UserError

T = TypeVar("T")

SECONDS_TO_APPEAR = 60.0


class Together:
    """All `world` processes of a run. They wait for each other for days, where Lightning's own
    barriers give up after half an hour; made by all of them at the same time.
    """

    def __init__(self, world: int) -> None:
        self._group = (
            dist.new_group(backend="gloo", timeout=timedelta(days=30)) if world > 1 else None
        )

    def agree(self, value: T) -> T:
        """The first process's value, for all."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._group)
        return values[0]

    def total(self, n: int) -> int:
        """The sum of all processes' numbers, when all have come here."""
        total = torch.tensor(n)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        return int(total)


def wait_for_files(are_there: Callable[[], bool], argument: str, folder: Path) -> None:
    """Returns when they are: a network file system may show what another node wrote some seconds
    late.

    Raises:
        UserError: if they are not after `SECONDS_TO_APPEAR`.
    """
    end = time.monotonic() + SECONDS_TO_APPEAR
    while not are_there():
        if time.monotonic() > end:
            raise UserError(
                f"{argument}: {folder} lacks what other processes wrote; give a folder that all"
                " nodes share"
            )
        time.sleep(1)
