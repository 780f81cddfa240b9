"""States with given rewards, and a kernel that does what it is told."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dia_lightning.sampling.state import Info, State
from dia_lightning.target import Terms

F64 = torch.float64


def chains(rewards: Sequence[float], tokens: Tensor | None = None, lam: float = 1.0) -> State:
    reward = torch.tensor(rewards, dtype=F64)
    tokens = torch.arange(len(reward))[:, None] if tokens is None else tokens
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    return State(tokens, mask, torch.zeros_like(reward), reward, torch.full_like(reward, lam))


class Scripted:
    """Makes of a state what it is told, `accepted` by the list given for each step; counts its
    steps.
    """

    def __init__(
        self,
        change: Any = lambda state: state,
        accepted: Sequence[Sequence[bool]] = (),
        log_ratio: float = 0.0,
    ) -> None:
        self.change, self.accepted, self.log_ratio, self.steps = change, accepted, log_ratio, 0
        self.target = self

    def step(self, state: State, generator: torch.Generator) -> tuple[State, Info]:
        n, given = len(state.tokens), self.accepted[self.steps] if self.accepted else None
        self.steps += 1
        accepted = torch.ones(n, dtype=torch.bool) if given is None else torch.tensor(given)
        return self.change(state), Info(accepted, torch.full((n,), self.log_ratio, dtype=F64))

    def terms(self, tokens: Tensor) -> Terms:
        return Terms(torch.zeros(len(tokens), dtype=F64), torch.zeros(len(tokens), dtype=F64))
