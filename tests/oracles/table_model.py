"""The table as base model, reward and value of prefixes; draws of it."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dia_lightning import testing
from dia_lightning.testing import TableLM
from dia_lightning.types import Batch
from tests.oracles.table_lm import END, LAM, LM, LOG_P, NEXT, REWARD, ROWS, T, codes

Floats = np.ndarray[Any, np.dtype[np.float64]]


class TableReward(testing.TableReward):
    """The table's reward of each text."""

    def __init__(self) -> None:
        super().__init__(LM, REWARD)


def table_lm() -> TableLM:
    return TableLM(NEXT)


def free(n: int) -> Batch:
    """A batch of n texts without prompts."""
    tokens = torch.full((n, T), END)
    return Batch(0, list(range(n)), [""] * n, tokens, torch.zeros_like(tokens, dtype=torch.bool))


P = np.exp(LOG_P)


def soft_values(lam: float = LAM) -> dict[tuple[int, ...], float]:
    """log E[exp(λ r) | prefix] / λ of every beginning of every text, whole texts too."""
    sums: dict[tuple[int, ...], np.ndarray] = {}
    for row, p, r in zip(ROWS, P, REWARD, strict=True):
        for n in range(T + 1):
            sums[row[:n]] = sums.get(row[:n], np.zeros(2)) + p * np.array([math.exp(lam * r), 1.0])
    return {prefix: math.log(top / bottom) / lam for prefix, (top, bottom) in sums.items()}


class TableValue:
    """A value of prefixes looked up by the tokens that are settled; `asked` counts."""

    def __init__(self, values: dict[tuple[int, ...], float]) -> None:
        self.values, self.asked = values, 0

    def __call__(self, tokens: Tensor, known: Tensor, rows: Tensor | None = None) -> Tensor:
        self.asked += len(tokens)
        prefixes = [
            tuple(row[: int(n)]) for row, n in zip(tokens.tolist(), known.sum(1), strict=True)
        ]
        return torch.tensor([self.values[prefix] for prefix in prefixes])


def chi_square_ok(tokens: Tensor, p: Floats) -> bool:
    """Whether rows of the table are draws of p (N,): χ² at false-alarm rate 10⁻³
    (Wilson–Hilferty), rare rows pooled.
    """
    want = p * len(tokens)
    got = np.bincount(codes(tokens), minlength=len(p))
    common = want >= 5
    cells = [*((got - want)[common] ** 2 / want[common])]
    if want[~common].sum() > 0:
        cells.append((got - want)[~common].sum() ** 2 / want[~common].sum())
    df = len(cells) - 1
    return bool(sum(cells) < df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3)
