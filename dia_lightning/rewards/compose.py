"""Rewards made of rewards."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dia_lightning.errors import UserError
from dia_lightning.rewards.base import RewardError, call_reward
from dia_lightning.types import Record, Reward

# Rounding in float32 may carry a probability above 1.
_ROUNDING = 1e-5


class Composed(Reward):
    """A reward made of `rewards`, which have different names; a subclass says how their values
    combine.
    """

    def __init__(self, rewards: list[Reward], name: str) -> None:
        self.rewards, self.name = rewards, name
        self.deterministic = all(reward.deterministic for reward in rewards)
        self.conditional = any(reward.conditional for reward in rewards)
        if self.on_prefix is None:
            known = {reward.on_prefix for reward in rewards}
            self.on_prefix = False if False in known else None if None in known else True

    @abstractmethod
    def combine(self, values: Tensor, texts: Sequence[str]) -> Tensor:
        """(K, B) values of the K parts → (B,); `texts` are for error messages."""

    def __call__(self, texts: Sequence[str], records: Sequence[Record] | None = None) -> Tensor:
        return self.combine(
            torch.stack([call_reward(reward, texts, records) for reward in self.rewards]), texts
        )

    def part_names(self) -> list[str]:
        """The names of what `parts` returns."""
        names: list[str] = []
        for reward in self.rewards:
            own: Any = getattr(reward, "part_names", list)
            names += [reward.name, *(f"{reward.name}/{name}" for name in own())]
        return names

    def parts(
        self, texts: Sequence[str], records: Sequence[Record] | None = None
    ) -> dict[str, Tensor]:
        """The values of every part, (B,) each and as the part returns them; a part's own parts
        are named "part/own".
        """
        values: dict[str, Tensor] = {}
        for reward in self.rewards:
            values[reward.name] = call_reward(reward, texts, records)
            own: Any = getattr(reward, "parts", None)
            values |= {
                f"{reward.name}/{name}": part
                for name, part in (own(texts, records) if own else {}).items()
            }
        return values


class WeightedSum(Composed):
    """Σ_k w_k r_k, with every part reported by its name.

    Args:
        rewards: Parts, with different names.
        weights: Weights, one for each part; all 1 by default.
        name: Label in outputs.

    Raises:
        UserError: if there is no part, two parts have one name, or the weights are not one finite
            number a part.
    """

    def __init__(
        self, rewards: list[Reward], weights: list[float] | None = None, name: str = "sum"
    ) -> None:
        super().__init__(_different(rewards), name)
        self.weights = _one_each(weights, rewards)

    def combine(self, values: Tensor, texts: Sequence[str]) -> Tensor:
        return _weighted(self.weights, values)


class ProductOfExperts(Composed):
    """Σ_k w_k log r_k of parts that are probabilities: exp(λ r) is then the product of the experts
    r_k to the power λ w_k.

    No expert can be outvoted: a text that one of them finds impossible gets w_k log(floor),
        whatever the others say.
    Source: Hinton, Neural Computation 2002.

    Args:
        rewards: Parts, with different names and values in [0, 1].
        weights: Weights, one for each part; all 1 by default.
        floor: Smallest value that a part counts as, between 0 and 1, for a finite
            logarithm.
        name: Label in outputs.

    Raises:
        UserError: as `WeightedSum`, or if `floor` is not between 0 and 1.
        RewardError: in a call, if a part's value is outside [0, 1].
    """

    def __init__(
        self,
        rewards: list[Reward],
        weights: list[float] | None = None,
        floor: float = 1e-6,
        name: str = "product",
    ) -> None:
        super().__init__(_different(rewards), name)
        if not 0 < floor < 1:
            raise UserError(f"floor: {floor} given, allowed: a number above 0 and below 1")
        self.weights, self.floor = _one_each(weights, rewards), floor

    def combine(self, values: Tensor, texts: Sequence[str]) -> Tensor:
        for k, i in ((values < 0) | (values > 1 + _ROUNDING)).nonzero()[:1].tolist():
            raise RewardError(
                f"reward {self.name!r}: its part {self.rewards[k].name!r} gave"
                f" {values[k, i].item():g} for the text {texts[i]!r:.100}, allowed: a probability,"
                " from 0 to 1"
            )
        return _weighted(self.weights, values.clamp(self.floor, 1.0).log())


class Hinge(Composed):
    """min(r − threshold, 0): 0 for every text that reaches the threshold, so that a constraint asks
    for no more than it says.

    Args:
        reward: Reward r to cut off.
        threshold: Value from which r is good enough.
        name: Label in outputs.

    Raises:
        UserError: if `threshold` is not finite.
    """

    def __init__(self, reward: Reward, threshold: float, name: str = "hinge") -> None:
        super().__init__([reward], name)
        if not math.isfinite(threshold):
            raise UserError(f"threshold: {threshold} given, allowed: a finite number")
        self.reward, self.threshold = reward, threshold

    def combine(self, values: Tensor, texts: Sequence[str]) -> Tensor:
        return (values[0] - self.threshold).clamp_max(0.0)


def _different(rewards: list[Reward]) -> list[Reward]:
    names = [reward.name for reward in rewards]
    if not rewards or len(set(names)) < len(names):
        raise UserError(
            f"rewards: names {names} given, allowed: one reward or more, with different names"
        )
    return rewards


def _one_each(weights: list[float] | None, rewards: list[Reward]) -> list[float]:
    weights = [1.0] * len(rewards) if weights is None else weights
    if len(weights) != len(rewards) or not all(map(math.isfinite, weights)):
        raise UserError(
            f"weights: {weights} given, allowed: {len(rewards)} finite numbers, one a reward"
        )
    return weights


def _weighted(weights: list[float], values: Tensor) -> Tensor:
    return (torch.tensor(weights, dtype=torch.float32)[:, None] * values).sum(0)
