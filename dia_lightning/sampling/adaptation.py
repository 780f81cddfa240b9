"""Moves as bold as they can be and still be accepted: chosen during burn-in, then frozen."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dia_lightning.sampling.state import Info, Kernel, State


class Adapted:
    """A ladder of kernels, of which burn-in picks the one that is accepted about as often as
    wanted.

    The place on the ladder follows i ← i + g_n (rate − target), g_n = 2 n^−0.6 (stochastic
    approximation, Robbins and Monro; Andrieu and Thoms 2008, algorithm 4), the rate being that of
    all chains in a step. While it moves, the steps are no Markov chain and what they visit is not
    distributed as π. After `burn_in` steps the place is frozen for good at its average over the
    second half of burn-in, and from there on this is one kernel of the ladder, as exact as that
    one.

    Args:
        ladder: kernels from the easiest to the hardest move.
        burn_in: steps that adapt. Each waits for the device once; later ones do not.
        rate: share of moves to be accepted.

    Attributes:
        place: where on the ladder the kernel stands, from 0 to len(ladder) − 1.

    Raises:
        ValueError: for an empty ladder, a rate that is no share, or a negative burn-in.
    """

    def __init__(self, ladder: Sequence[Kernel], burn_in: int, rate: float = 0.35) -> None:
        if not ladder or burn_in < 0 or not 0 < rate < 1:
            raise ValueError(
                f"ladder {len(ladder)}, burn_in {burn_in}, rate {rate}: allowed are 1 or more, 0 or"
                " more, (0, 1)"
            )
        self.ladder, self.burn_in, self.rate = list(ladder), burn_in, rate
        self.place, self._steps, self._visited = 0.5 * (len(ladder) - 1), 0, 0.0

    @property
    def current(self) -> Kernel:
        return self.ladder[round(self.place)]

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        state, info = self.current.step(state, generator)
        if self._steps < self.burn_in:
            self._adapt(float(info.accepted.double().mean()))
        return state, info

    def _adapt(self, accepted: float) -> None:
        self._steps += 1
        moved = self.place + 2 * self._steps**-0.6 * (accepted - self.rate)
        self.place = min(max(moved, 0.0), len(self.ladder) - 1.0)
        first = self.burn_in // 2
        if self._steps > first:
            self._visited += self.place / (self.burn_in - first)
        if self._steps == self.burn_in:
            self.place = self._visited
