"""Bars for what is long within one batch, below Lightning's own: on a terminal, of the first
process, after two seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only

T = TypeVar("T")
_DELAY = 2.0  # seconds


def bar(what: str, total: float | None = None, of: Iterable[Any] | None = None) -> Any:
    """A tqdm bar called `what`; of what it goes through, or up to `total` by `update`."""
    from tqdm import tqdm

    shown = sys.stderr.isatty() and getattr(rank_zero_only, "rank", 0) == 0
    layout = None if of is not None else "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    return tqdm(of, what, total, leave=False, delay=_DELAY, disable=not shown, bar_format=layout)


def steps(of: Iterable[T], what: str) -> Iterable[T]:
    """`of`, with a bar that has their rate and the time left."""
    through: Iterable[T] = bar(what, of=of)
    return through
