"""A text model small enough to list every text: π, log Z and total variation are known exactly. No
code of the package.

The base model p is a random order-2 Markov chain over tokens; the reward is a random function of
token pairs at any distance, so that neither p nor π ∝ p exp(λ r) is a product over positions.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
LIMIT = 100_000


class Enumerable:
    """All texts of T tokens out of V, their probability under p and their reward.

    Attributes:
        first (V,), second (V, V), later (V, V, V): p(x_1), p(x_2 | x_1), p(x_i | x_{i-2}, x_{i-1});
            rows sum to 1.
        sequences: (N, T) int64, every text, in the order of `itertools.product`.
        log_p: (N,) log-probabilities under p, nats. reward: (N,), mean 0 and variance 1 under p.
        end_id: V - 1 with `end`, else None. Everything after the first end token is the end token,
            texts that differ only behind it are one text, and N is smaller than V^T.
    """

    def __init__(self, V: int, T: int, seed: int, end: bool = False) -> None:
        if V**T > LIMIT:
            raise ValueError(f"V^T: {V}^{T} = {V**T}, allowed: up to {LIMIT}")
        rng = np.random.default_rng(seed)
        self.V, self.T, self.end_id = V, T, V - 1 if end else None
        self.first, self.second, self.later = (_rows(rng, V, order) for order in range(3))
        if self.end_id is not None:
            for table in (self.second, self.later):
                table[..., self.end_id, :] = np.eye(V)[self.end_id]
        every = np.array(list(itertools.product(range(V), repeat=T)), dtype=np.int64)
        with np.errstate(divide="ignore"):
            log_p = self._log_p(every)
        kept = np.isfinite(log_p)
        self._place = np.where(kept, np.cumsum(kept) - 1, -1)
        self.sequences, self.log_p = every[kept], log_p[kept]
        self.reward = self._reward(rng)

    def _log_p(self, x: Ints) -> Floats:
        out = np.log(self.first)[x[:, 0]]
        if self.T > 1:
            out = out + np.log(self.second)[x[:, 0], x[:, 1]]
        for i in range(2, self.T):
            out = out + np.log(self.later)[x[:, i - 2], x[:, i - 1], x[:, i]]
        return out

    def _reward(self, rng: np.random.Generator) -> Floats:
        x, total = self.sequences, np.zeros(len(self.sequences))
        for i in range(self.T):
            for j in range(i, self.T):
                total += rng.normal(size=(self.V, self.V))[x[:, i], x[:, j]]
        p = np.exp(self.log_p)
        total -= p @ total
        return total / np.sqrt(p @ total**2)

    def log_z(self, lam: float) -> float:
        """Log Z = log Σ_x p(x) exp(λ r(x))."""
        terms = self.log_p + lam * self.reward
        top = float(terms.max())
        return top + float(np.log(np.exp(terms - top).sum()))

    def log_pi(self, lam: float) -> Floats:
        """(N,) normalised log π."""
        return self.log_p + lam * self.reward - self.log_z(lam)

    def index(self, tokens: object) -> Ints:
        """(B,) place in `sequences` of each row of tokens (B, T), an array or a tensor on the CPU.

        Raises:
            ValueError: for a row that is no text: wrong length, unknown token, or another token
                after an end token.
        """
        x = np.asarray(tokens, dtype=np.int64)
        if x.ndim != 2 or x.shape[1] != self.T or (x < 0).any() or (x >= self.V).any():
            raise ValueError(
                f"tokens: (B, {self.T}) with values from 0 to {self.V - 1} needed, got shape"
                f" {x.shape}"
            )
        place = self._place[x @ self.V ** np.arange(self.T - 1, -1, -1)]
        if (place < 0).any():
            raise ValueError(
                f"tokens: {x[place < 0][0].tolist()} goes on after its end token {self.end_id}"
            )
        return place

    def draw(self, n: int, lam: float, rng: np.random.Generator) -> Ints:
        """(n, T) independent exact draws of π."""
        return self.sequences[rng.choice(len(self.sequences), n, p=np.exp(self.log_pi(lam)))]

    def frequencies(self, tokens: object, weights: Floats | None = None) -> Floats:
        """(N,) share of each text among `tokens` (B, T), or of its weight; weights (B,) need not
        sum to 1.
        """
        counts = np.bincount(self.index(tokens), weights, len(self.sequences))
        return counts / counts.sum()

    def total_variation(self, tokens: object, lam: float, weights: Floats | None = None) -> float:
        """½ Σ_x |share of x among `tokens` − π(x)|, between 0 and 1."""
        return float(np.abs(self.frequencies(tokens, weights) - np.exp(self.log_pi(lam))).sum() / 2)

    def floor(self, n: int, lam: float, rng: np.random.Generator, repeats: int = 20) -> float:
        """The total variation that n exact draws of π have on average: what a perfect sampler
        would show.
        """
        p = np.exp(self.log_pi(lam))
        counts = rng.multinomial(n, p / p.sum(), size=repeats)
        return float(np.abs(counts / n - p).sum(1).mean() / 2)


def _rows(rng: np.random.Generator, V: int, order: int) -> Floats:
    """A random table of conditional distributions, (V,) * (order + 1), far from uniform and
    without zeros.
    """
    rows = np.asarray(rng.dirichlet(np.full(V, 0.7), size=(V,) * order))
    return 0.95 * rows + 0.05 / V
