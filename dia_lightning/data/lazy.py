"""Sequences of a run's texts and batches that take no memory for each: a run may have 10^10."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import TypeVar, overload

T = TypeVar("T")


class _Computed(Sequence[T]):
    """A sequence of `n` items that are computed."""

    def __init__(self, n: int) -> None:
        self.n = n

    def _item(self, index: int) -> T:
        raise NotImplementedError

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self.n))]
        if not -self.n <= index < self.n:
            raise IndexError(index)
        return self._item(index % self.n)


class Repeated(_Computed[T]):
    """Each of `items` `times` times, one after the other."""

    def __init__(self, items: Sequence[T], times: int) -> None:
        super().__init__(len(items) * times)
        self.items, self.times = items, times

    def _item(self, index: int) -> T:
        return self.items[index // self.times]


class Missing(_Computed[int]):
    """The numbers below `n` that are not `done`, in order."""

    def __init__(self, n: int, done: Collection[int]) -> None:
        known = sorted(number for number in done if number < n)
        super().__init__(n - len(known))
        # How many are missing below each that is done.
        self._below = [number - i for i, number in enumerate(known)]

    def _item(self, index: int) -> int:
        return index + bisect_right(self._below, index)
