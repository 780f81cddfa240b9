"""How a reward is called, cached and checked; the protocol itself is `dia_lightning.types.Reward`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dia_lightning.resources import UserError
from dia_lightning.types import Reward


class RewardError(UserError):
    """A reward broke its protocol: which law, and on which text."""


def call_reward(reward: Reward, texts: Sequence[str]) -> Tensor:
    """`reward(texts)`, (B,) float32, after a look at its type, shape and values.

    Raises:
        RewardError: if it is no float32 tensor of shape (B,) or holds a value that is not finite.
    """
    values = reward(texts)
    if not isinstance(values, Tensor) or values.dtype != torch.float32 or values.shape != (len(texts),):
        got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise RewardError(f"reward {reward.name!r}: must return float32 of shape ({len(texts)},), returned {got}")
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        worst = int((~finite).nonzero()[0, 0])
        raise RewardError(f"reward {reward.name!r}: {values[worst].item()} is not finite, on the text {texts[worst]!r:.100}")
    return values


class CachedReward:
    """Asks `reward` for each text once in a run."""

    def __init__(self, reward: Reward) -> None:
        self.reward, self.name = reward, reward.name
        self._known: dict[str, float] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            self._known.update(zip(new, call_reward(self.reward, new).tolist(), strict=True))
        return torch.tensor([self._known[text] for text in texts], dtype=torch.float32)


_TEXTS = ("The food was lovely.", "The food was terrible!", "", "Cheap Italian food near the river.", "ΩMEGA, 1 + 1 = 2")


def check_reward(reward: Reward, texts: Sequence[str] = _TEXTS) -> None:
    """Run `reward` through the laws that samplers rely on; returns if all hold.

    The laws: (B,) float32 and finite; an empty batch gives shape (0,); the list is not changed; the same twice; a batch
    is its texts one by one (to 1e-5), so that order and company do not matter. A reward with `deterministic = False` is
    excused from the last two.

    Raises:
        RewardError: naming the law and the first text that breaks it.
    """
    given = list(texts)
    values = call_reward(reward, given)
    if given != list(texts):
        raise RewardError(f"reward {reward.name!r}: changed the list of texts it was given")
    call_reward(reward, [])
    if not getattr(reward, "deterministic", True):
        return
    singles = torch.cat([call_reward(reward, [text]) for text in texts])
    for law, other in (("the same twice", call_reward(reward, list(texts))), ("batch = one by one", singles)):
        wrong = ((values - other).abs() > 1e-5).nonzero()
        if len(wrong):
            i = int(wrong[0, 0])
            raise RewardError(
                f"reward {reward.name!r}: not {law}: {values[i].item():g} and {other[i].item():g} on {texts[i]!r:.100}"
            )
