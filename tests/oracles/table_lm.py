"""The table that most tests of samplers use, and its exact π in NumPy."""

import itertools

import numpy as np
import torch
from torch import Tensor

from dia_lightning.target import Terms
from dia_lightning.testing import TableLM

V, T, END, LAM = 3, 4, 2, 1.5
RNG = np.random.default_rng(3)
NEXT = {
    prefix: RNG.dirichlet(np.ones(V))
    for n in range(T)
    for prefix in itertools.product(range(V), repeat=n)
}
LM = TableLM(NEXT)
ROWS = [tuple(row) for row in LM.rows.tolist()]
REWARD = RNG.normal(size=len(ROWS))
LOG_P = LM.log_p


class TableTarget:
    """π ∝ p_θ exp(λ r) of the table."""

    lm = LM

    def __init__(self, lam: float = LAM) -> None:
        self.lam = lam

    def terms(
        self, tokens: Tensor, prompt_mask: Tensor | None = None, log_base: Tensor | None = None
    ) -> Terms:
        code = codes(tokens)
        return Terms(torch.from_numpy(LOG_P[code]), torch.from_numpy(REWARD[code]))


def pi(lam: float = LAM) -> np.ndarray:
    """The exact target over ROWS."""
    weight = np.exp(LOG_P + lam * REWARD)
    return weight / weight.sum()


def codes(tokens: Tensor) -> np.ndarray:
    """The number of each row (B, T)."""
    place = {row: i for i, row in enumerate(ROWS)}
    return np.array([place[tuple(row)] for row in tokens.tolist()])
