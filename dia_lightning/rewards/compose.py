"""Rewards made of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.resources import UserError
from dia_lightning.rewards.base import call_reward
from dia_lightning.types import Reward


class WeightedSum:
    """Σ_k w_k r_k, with every part reported by its name.

    Args:
        rewards: the parts, with different names. weights: one for each; all 1 by default.
        name: label in outputs.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None, name: str = "sum") -> None:
        names = [reward.name for reward in rewards]
        if not rewards or len(set(names)) < len(names):
            raise UserError(f"--model.init_args.reward.init_args.rewards: names {names} given, must be different, at least one")
        if weights is not None and len(weights) != len(rewards):
            raise UserError(
                f"--model.init_args.reward.init_args.weights: {len(weights)} given for {len(rewards)} rewards, one each is needed"
            )
        self.rewards, self.weights, self.name = rewards, weights or [1.0] * len(rewards), name

    def parts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The values of every part, (B,) each, unweighted."""
        return {reward.name: call_reward(reward, texts) for reward in self.rewards}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        parts = torch.stack(list(self.parts(texts).values()))
        return (torch.tensor(self.weights)[:, None] * parts).sum(0)
