"""Parallel tempering over λ: chains at weaker rewards roam and hand what they find to the chain
at λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dia_lightning.sampling.state import Info, Kernel, State, start, take
from dia_lightning.target import Target, TargetDensity


class Tempering:
    """Exchange Monte Carlo (Geyer 1991; Hukushima and Nemoto 1996) between λ_1 < … < λ_K = λ.

    The K chains of a group lie side by side, the last one at λ. A step moves every chain by each
    kernel at its own λ, then proposes to swap the texts of neighbours, pairs (1, 2), (3, 4), … or
    (2, 3), (4, 5), … at random for each group, and swaps with probability min(1, exp((λ_i −
    λ_j)(r_j − r_i))). So Π_k π_{λ_k} stays invariant, and each chain's marginal is π at its λ.

    Args:
        target: π. kernels: moves that leave it invariant at every `state.lam`.
        ladder: λ_1 < … < λ_K, ≥ 0.

    Raises:
        ValueError: if `ladder` does not rise.
    """

    def __init__(
        self, target: Target | TargetDensity, kernels: Sequence[Kernel], ladder: Sequence[float]
    ) -> None:
        if not ladder or ladder[0] < 0 or any(b <= a for a, b in pairwise(ladder)):
            raise ValueError(f"ladder must rise from 0 or more, got {list(ladder)}")
        self.target, self.kernels, self.ladder = target, list(kernels), list(ladder)

    def init(self, tokens: Tensor, prompt_mask: Tensor | None = None) -> State:
        """Chains at `tokens` (G · K, T), the K of one group (of one prompt) side by side."""
        if len(tokens) % len(self.ladder):
            raise ValueError(
                f"tokens: {len(tokens)} rows given, not a multiple of the {len(self.ladder)} rungs"
            )
        lam = torch.tensor(self.ladder, dtype=torch.float64, device=tokens.device)
        return start(self.target, tokens, prompt_mask, lam.repeat(len(tokens) // len(self.ladder)))

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        """`accepted`: moved or swapped; `log_ratio`: of the swap, −inf for a chain without a
        partner in this step.
        """
        moved = torch.zeros(len(state.tokens), dtype=torch.bool, device=state.tokens.device)
        undefined = moved.clone()
        for kernel in self.kernels:
            state, info = kernel.step(state, generator)
            moved |= info.accepted
            undefined |= False if info.undefined is None else info.undefined
        state, swap = swap_neighbours(state, len(self.ladder), generator)
        return state, Info(moved | swap.accepted, swap.log_ratio, undefined)


def swap_neighbours(state: State, n_rungs: int, generator: torch.Generator) -> tuple[State, Info]:
    """One round of swaps within groups of `n_rungs` chains side by side; every chain keeps its
    λ.
    """
    device = state.tokens.device
    lam, reward = state.lam.unflatten(0, (-1, n_rungs)), state.reward.unflatten(0, (-1, n_rungs))
    rung = torch.arange(n_rungs, device=device)
    odd = torch.randint(2, (len(lam), 1), generator=generator, device=device)
    partner = rung + 1 - 2 * ((rung + odd) % 2)
    alone = (partner < 0) | (partner >= n_rungs)
    partner = torch.where(alone, rung, partner)
    log_ratio = (lam - lam.gather(1, partner)) * (reward.gather(1, partner) - reward)
    # A NaN is a rejection; partners share one draw.
    log_ratio = torch.where(alone | log_ratio.isnan(), -torch.inf, log_ratio)
    u = torch.rand(lam.shape, generator=generator, device=device, dtype=torch.float64)
    swapped = u.gather(1, torch.minimum(rung, partner)).log() < log_ratio
    source = (
        torch.where(swapped, partner, rung)
        + n_rungs * torch.arange(len(lam), device=device)[:, None]
    )
    return take(state, source.flatten())._replace(lam=state.lam), Info(
        swapped.flatten(), log_ratio.flatten()
    )
