"""Methods compared by people's choices: win rates, Bradley–Terry strengths, agreement."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]


class Comparison(NamedTuple):
    """One compared pair of texts: methods i < j, and i's score (1 won, ½ tie, 0 lost)."""

    i: int
    j: int
    score: float


def majority(votes: Sequence[float]) -> float:
    """1, 0 or ½ from the scores that people gave one pair; ½ for a balance."""
    mean = sum(votes) / len(votes)
    return 0.5 if mean == 0.5 else float(mean > 0.5)


def wins_of(outcomes: Sequence[Comparison], n_methods: int) -> _Floats:
    """(K, K) wins of the row over the column, a tie half a win for each."""
    wins = np.zeros((n_methods, n_methods))
    for i, j, score in outcomes:
        wins[i, j] += score
        wins[j, i] += 1 - score
    return wins


def resampled_wins(
    outcomes: Sequence[Comparison], n_methods: int, n: int, generator: np.random.Generator
) -> _Floats:
    """(n, K, K) wins of bootstrap samples over the pairs of texts of each two methods.

    Only the numbers of lost, tied and won pairs matter; they are multinomial.
    """
    wins = np.zeros((n, n_methods, n_methods))
    for i, j in combinations(range(n_methods), 2):
        scores = [score for *pair, score in outcomes if pair == [i, j]]
        if scores:
            shares = [scores.count(score) / len(scores) for score in (0.0, 0.5, 1.0)]
            drawn = generator.multinomial(len(scores), shares, size=n) @ np.array([0.0, 0.5, 1.0])
            wins[:, i, j], wins[:, j, i] = drawn, len(scores) - drawn
    return wins


def has_estimate(wins: _Floats) -> NDArray[np.bool_]:
    """(...) whether (..., K, K) wins determine all strengths.

    They do if and only if a chain of wins leads from each method to every other (Ford 1957).
    """
    reach = (wins > 0) | np.eye(wins.shape[-1], dtype=bool)
    for _ in range(wins.shape[-1]):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return np.asarray(reach.all((-2, -1)))


def bradley_terry(wins: _Floats, max_steps: int = 200) -> _Floats:
    """(..., K) log-strengths β, with mean 0, that maximise Σ_ij wins_ij log σ(β_i − β_j).

    P(i beats j) = exp(β_i) / (exp(β_i) + exp(β_j)) (Bradley and Terry 1952). Newton's method,
    steps of at most 1. Without a maximum (see `has_estimate`) each of every two methods gets half
    a win more.

    Args:
        wins: (..., K, K), K > 1, of the row over the column.
        max_steps: a bound; a few suffice.
    """
    k = wins.shape[-1]
    wins = wins + np.where(has_estimate(wins), 0.0, 0.5)[..., None, None] * (1 - np.eye(k))
    games = wins + wins.swapaxes(-1, -2)
    beta = np.zeros(wins.shape[:-1])
    for _ in range(max_steps):
        p = 1 / (1 + np.exp(beta[..., None, :] - beta[..., :, None]))
        gradient = (wins - games * p).sum(-1)
        weight = games * p * (1 - p)
        # The constant matrix settles the direction (1, …, 1), in which the likelihood is flat.
        hessian = weight.sum(-1)[..., None] * np.eye(k) - weight + 1 / k
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        beta = beta + step / np.maximum(1, np.abs(step).max(-1, keepdims=True))
        if np.abs(step).max() < 1e-10:
            break
    return beta - beta.mean(-1, keepdims=True)


def interval_95(values: _Floats) -> list[float]:
    """The 2.5 and the 97.5 % quantile along the first axis."""
    return [float(x) for x in np.quantile(values, [0.025, 0.975])]


def krippendorff_alpha(units: Sequence[Sequence[Any]]) -> float | None:
    """Krippendorff's α for nominal values: 1 = agreement, 0 = chance; None if undefined.

    Source: Krippendorff 2011, Computing Krippendorff's Alpha-Reliability. Undefined without units
    that two people judged, and with one value only.

    Args:
        units: for each unit the values that people gave it, without missing ones.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    values = sorted({value for unit in pairable for value in unit}, key=str)
    if len(values) < 2:
        return None
    rows = [[unit.count(value) for value in values] for unit in map(list, pairable)]
    counts = np.array(rows, dtype=float)
    size = counts.sum(1, keepdims=True)
    total = counts.sum(0)
    n = total.sum()
    observed = ((size * counts - counts**2) / (size - 1)).sum() / n
    expected = (n**2 - (total**2).sum()) / (n * (n - 1))
    return float(1 - observed / expected)


def compare(
    outcomes: Sequence[Comparison], methods: Sequence[str], n_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Win rates of every two methods and strengths of all, with 95 % bootstrap intervals.

    Returns:
        `win_rates`: for each two compared methods `method`, `other`, `n`, `ties`, `win_rate` of
        `method` (a tie is half a win) and `interval`; `bradley_terry`: by method `log_strength`
        (mean 0) and `interval`, and `regularised`, whether half a win per side was added.
    """
    k = len(methods)
    wins = wins_of(outcomes, k)
    drawn = resampled_wins(outcomes, k, n_bootstrap, np.random.default_rng(seed))
    rates = []
    for i, j in combinations(range(k), 2):
        n = int(wins[i, j] + wins[j, i])
        if n:
            ties = sum(outcome == Comparison(i, j, 0.5) for outcome in outcomes)
            found = {"method": methods[i], "other": methods[j], "n": n, "ties": ties}
            rate, interval = float(wins[i, j] / n), interval_95(drawn[:, i, j] / n)
            rates.append({**found, "win_rate": rate, "interval": interval})
    strength, spread = bradley_terry(wins), bradley_terry(drawn)
    strengths = {
        method: {"log_strength": float(strength[i]), "interval": interval_95(spread[:, i])}
        for i, method in enumerate(methods)
    }
    fitted = {"regularised": not bool(has_estimate(wins)), "methods": strengths}
    return {"win_rates": rates, "bradley_terry": fitted}
