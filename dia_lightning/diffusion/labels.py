"""Labels of texts by their reward, on which a denoiser for classifier-free guidance is
conditioned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards.base import CachedReward, call_reward
from dia_lightning.types import Reward


class RewardLabels:
    """Label k of 1 … K for a text whose reward is in (edges[k − 2], edges[k − 1]], the outer
    classes being open; 0 = none.

    Args:
        reward: any that reads the text alone; called once a text.
        edges: K − 1 ≥ 1 rewards, rising, that part the labels.
        drop: share of texts that lose their label in training, so that one network learns p(x | z)
            beside p(x | z, y) (Ho and Salimans, arXiv:2207.12598, Algorithm 1).

    Raises:
        UserError: if one of them is not what it has to be.
    """

    def __init__(self, reward: Reward, edges: list[float], drop: float = 0.1) -> None:
        if (
            not edges
            or not all(map(math.isfinite, edges))
            or any(b <= a for a, b in pairwise(edges))
        ):
            raise UserError(f"edges: {edges} given, allowed: one or more rising numbers")
        if reward.conditional:
            raise UserError(
                f"reward: {reward.name!r} given, allowed: a reward of the text alone; this one"
                " compares with a record"
            )
        if not 0 < drop < 1:
            raise UserError(f"drop: {drop} given, allowed: between 0 and 1")
        self.reward, self.drop = CachedReward(reward), drop
        self.edges = [float(edge) for edge in edges]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B,) int64 labels, on the CPU."""
        return 1 + torch.bucketize(call_reward(self.reward, texts), torch.tensor(self.edges))

    def dropped(self, labels: Tensor, rows: Tensor, n_rows: int, seed: int) -> Tensor:
        """`labels` (B,) with a share `drop` of them 0, which `seed` picks.

        `rows` (B,) numbers them among the n_rows of all processes.
        """
        draw = torch.rand(n_rows, generator=torch.Generator().manual_seed(seed))
        return torch.where(draw[rows] < self.drop, 0, labels)

    def settings(self) -> dict[str, Any]:
        return {"n_labels": len(self.edges) + 1, "reward": self.reward.name, "edges": self.edges}
