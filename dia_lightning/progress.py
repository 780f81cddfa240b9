"""Bars for what is long within one batch, below Lightning's own: of the first process, after two
seconds.

On a terminal, unless `SHOWN` says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only

T = TypeVar("T")
_DELAY = 2.0  # seconds
SHOWN: ContextVar[bool | None] = ContextVar("SHOWN", default=None)


def bar(what: str, total: float | None = None, of: Iterable[Any] | None = None) -> Any:
    """A tqdm bar called `what`; of what it goes through, or up to `total` by `update`."""
    from tqdm.auto import tqdm

    shown = sys.stderr.isatty() if (chosen := SHOWN.get()) is None else chosen
    shown = shown and getattr(rank_zero_only, "rank", 0) == 0
    layout = None if of is not None else "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    return tqdm(of, what, total, leave=False, delay=_DELAY, disable=not shown, bar_format=layout)


def steps(of: Iterable[T], what: str) -> Iterable[T]:
    """`of`, with a bar that has their rate and the time left."""
    through: Iterable[T] = bar(what, of=of)
    return through
