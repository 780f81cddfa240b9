"""An enumerable problem as the base model and the target that kernels ask: everything is looked
up.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from dia_lightning.target import Terms
from dia_lightning.testing import TableLM
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


def listed_lm(problem: Enumerable) -> TableLM:
    """p as a language model of the package; where texts do not end, with an end that has a chance
    of 1e-30.
    """
    without_end, rows = problem.end_id is None, {}
    n_tokens = problem.V + without_end
    tables = (problem.first, problem.second, problem.later)
    for n in range(problem.T):
        for prefix in itertools.product(range(n_tokens), repeat=n):
            row = np.full(n_tokens, 1 / n_tokens)  # where the text has ended any will do
            if n_tokens - 1 not in prefix:
                known = tables[min(n, 2)][prefix[-2:]]
                row = np.append(known, 1e-30) if without_end else known
            rows[prefix] = row
    return TableLM(rows)


class ListedTarget:
    """π ∝ p exp(λ r) of an enumerable problem. calls: texts scored so far."""

    def __init__(self, problem: Enumerable, lam: float) -> None:
        self.problem, self.lam, self.lm, self.calls = problem, lam, ListedLM(problem), 0

    def terms(
        self, tokens: Tensor, prompt_mask: Tensor | None = None, log_base: Tensor | None = None
    ) -> Terms:
        self.calls += len(tokens)
        place: np.ndarray = self.problem.index(tokens)
        return Terms(
            torch.from_numpy(self.problem.log_p[place]),
            torch.from_numpy(self.problem.reward[place]),
        )

    def log_prob(self, tokens: Tensor) -> Tensor:
        log_base, reward = self.terms(tokens)
        return log_base + self.lam * reward
