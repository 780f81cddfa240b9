"""A language model small enough to enumerate: every prefix has a next-token distribution of its
own. NumPy only.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

from dia_lightning.target import Terms

V, T, END, LAM = 3, 4, 2, 1.5
RNG = np.random.default_rng(3)
ROWS = [
    row
    for row in itertools.product(range(V), repeat=T)
    if END not in row or all(x == END for x in row[row.index(END) :])
]  # fmt: skip
NEXT = {
    prefix: RNG.dirichlet(np.ones(V))
    for n in range(T)
    for prefix in itertools.product(range(V), repeat=n)
}
REWARD = RNG.normal(size=len(ROWS))


def log_p(row: tuple[int, ...]) -> float:
    n = row.index(END) + 1 if END in row else T
    return float(sum(np.log(NEXT[row[:i]][row[i]]) for i in range(n)))


LOG_P = np.array([log_p(row) for row in ROWS])


class TableLM:
    """p_θ of the table: draws the positions that are not kept."""

    end_id = END

    def generate(self, tokens: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
        out, code = tokens.clone(), torch.zeros(len(tokens), dtype=torch.int64)
        ended = torch.zeros(len(tokens), dtype=torch.bool)
        for i in range(T):
            table = torch.tensor(
                np.array([NEXT[prefix] for prefix in itertools.product(range(V), repeat=i)])
            )
            drawn = torch.multinomial(table[code], 1, generator=generator)[:, 0]
            out[:, i] = torch.where(kept[:, i], tokens[:, i], torch.where(ended, END, drawn))
            ended |= out[:, i] == END
            code = code * V + out[:, i]
        return out


class TableTarget:
    """π ∝ p_θ exp(λ r) of the table."""

    lm = TableLM()

    def __init__(self, lam: float = LAM) -> None:
        self.lam = lam

    def terms(self, tokens: Tensor) -> Terms:
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
