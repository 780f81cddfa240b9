"""Rewards made of rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.resources import UserError
from dia_lightning.rewards.base import call_reward
from dia_lightning.types import Record, Reward

_OPTION = "--model.init_args.reward.init_args"


class WeightedSum(Reward):
    """Σ_k w_k r_k, with every part reported by its name.

    Args:
        rewards: the parts, with different names.
        weights: one for each; all 1 by default.
        name: label in outputs.

    Raises:
        UserError: if there is no part, two parts have one name, or the weights are not one finite number a part.
    """

    def __init__(self, rewards: list[Reward], weights: list[float] | None = None, name: str = "sum") -> None:
        names = [reward.name for reward in rewards]
        if not rewards or len(set(names)) < len(names):
            raise UserError(f"{_OPTION}.rewards: names {names} given, allowed: one reward or more, with different names")
        weights = [1.0] * len(rewards) if weights is None else weights
        if len(weights) != len(rewards) or not all(map(math.isfinite, weights)):
            raise UserError(f"{_OPTION}.weights: {weights} given, allowed: {len(rewards)} finite numbers, one a reward")
        self.rewards, self.weights, self.name = rewards, weights, name
        self.deterministic = all(reward.deterministic for reward in rewards)
        self.conditional = any(reward.conditional for reward in rewards)

    def parts(self, texts: Sequence[str], records: Sequence[Record] | None = None) -> dict[str, Tensor]:
        """The values of every part, (B,) each, unweighted."""
        return {reward.name: call_reward(reward, texts, records) for reward in self.rewards}

    def __call__(self, texts: Sequence[str], records: Sequence[Record] | None = None) -> Tensor:
        parts = torch.stack(list(self.parts(texts, records).values()))
        return (torch.tensor(self.weights, dtype=torch.float32)[:, None] * parts).sum(0)
