"""Suffix regeneration on a model small enough to enumerate."""

import itertools

import numpy as np
import torch
from torch import Tensor

from dia_lightning.sampling.suffix import SuffixRegeneration
from dia_lightning.target import Terms

V, T, END, LAM = 3, 4, 2, 1.5
RNG = np.random.default_rng(3)
ROWS = [
    row
    for row in itertools.product(range(V), repeat=T)
    if END not in row or all(x == END for x in row[row.index(END) :])
]  # fmt: skip
NEXT = {prefix: RNG.dirichlet(np.ones(V)) for n in range(T) for prefix in itertools.product(range(V), repeat=n)}
REWARD = RNG.normal(size=len(ROWS))


def log_p(row: tuple[int, ...]) -> float:
    n = row.index(END) + 1 if END in row else T
    return float(sum(np.log(NEXT[row[:i]][row[i]]) for i in range(n)))


LOG_P = np.array([log_p(row) for row in ROWS])


class TableLM:
    """p_θ of the table: draws the positions that are not kept."""

    end_id = END

    def generate(self, tokens: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
        out = tokens.clone()
        for row, keep in zip(out, kept, strict=True):
            for i in range(T):
                if not keep[i]:
                    ended = i > 0 and END in row[:i].tolist()
                    p = torch.tensor(NEXT[tuple(row[:i].tolist())]) if not ended else torch.eye(V)[END]
                    row[i] = torch.multinomial(p, 1, generator=generator)
        return out


class Target:
    lm, lam = TableLM(), LAM

    def terms(self, tokens: Tensor) -> Terms:
        code = [ROWS.index(tuple(row)) for row in tokens.tolist()]
        return Terms(torch.tensor(LOG_P[code]), torch.tensor(REWARD[code]))


def test_pi_is_left_invariant() -> None:
    """8,000 exact draws and one move: (x, x') as frequent as (x', x), and the counts still those of π; rate 1e-3 each."""
    assert abs(np.exp(LOG_P).sum() - 1) < 1e-12
    pi = np.exp(LOG_P + LAM * REWARD)
    pi /= pi.sum()
    n = 8000
    drawn = np.random.default_rng(0).choice(len(ROWS), n, p=pi)
    kernel = SuffixRegeneration(Target())  # type: ignore[arg-type]
    state, info = kernel.step(kernel.init(torch.tensor(ROWS)[drawn]), torch.Generator().manual_seed(0))
    after = np.array([ROWS.index(tuple(row)) for row in state.tokens.tolist()])
    assert 0.2 < info.accepted.double().mean() < 0.95
    pairs = np.zeros((len(ROWS), len(ROWS)))
    np.add.at(pairs, (drawn, after), 1)
    upper = np.triu((pairs + pairs.T) >= 10, 1)
    chi2, df = ((pairs - pairs.T)[upper] ** 2 / (pairs + pairs.T)[upper]).sum(), upper.sum()
    assert df > 10
    assert chi2 < df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3
    torch.testing.assert_close(state.log_prob, torch.tensor(LOG_P[after] + LAM * REWARD[after]))


def test_without_reward_only_the_length_matters() -> None:
    """At λ = 0 the ratio is n(x) / n(x'), the numbers of places to cut."""
    kernel = SuffixRegeneration(Target())  # type: ignore[arg-type]
    tokens = torch.tensor([[0, 1, END, END]]).repeat(400, 1)
    state = kernel.init(tokens, lam=torch.zeros(400, dtype=torch.float64))
    new, info = kernel.step(state, torch.Generator().manual_seed(1))
    n_new = torch.where((new.tokens == END).any(1), (new.tokens == END).int().argmax(1) + 1, T)
    moved = info.accepted
    torch.testing.assert_close(info.log_ratio[moved], (3 / n_new[moved].double()).log())
