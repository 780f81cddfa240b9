"""An enumerable problem as the base model and the target that kernels ask: everything is looked
up.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dia_lightning.target import Terms
from tests.oracles.enumerable import Enumerable


class ListedLM:
    """p of an enumerable problem: draws the positions that are not kept."""

    def __init__(self, problem: Enumerable) -> None:
        self.problem, self.end_id = problem, problem.end_id
        self.tables = [
            torch.from_numpy(table) for table in (problem.first, problem.second, problem.later)
        ]

    def generate(self, tokens: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
        out = tokens.clone()
        for i in range(self.problem.T):
            rows = self.tables[min(i, 2)][tuple(out[:, j] for j in range(max(0, i - 2), i))]
            drawn = torch.multinomial(rows.expand(len(out), -1), 1, generator=generator)[:, 0]
            out[:, i] = torch.where(kept[:, i], tokens[:, i], drawn)
        return out


class ListedTarget:
    """π ∝ p exp(λ r) of an enumerable problem. calls: texts scored so far."""

    def __init__(self, problem: Enumerable, lam: float) -> None:
        self.problem, self.lam, self.lm, self.calls = problem, lam, ListedLM(problem), 0

    def terms(self, tokens: Tensor) -> Terms:
        self.calls += len(tokens)
        place: np.ndarray = self.problem.index(tokens)
        return Terms(
            torch.from_numpy(self.problem.log_p[place]),
            torch.from_numpy(self.problem.reward[place]),
        )

    def log_prob(self, tokens: Tensor) -> Tensor:
        log_base, reward = self.terms(tokens)
        return log_base + self.lam * reward
