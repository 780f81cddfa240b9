"""Denoise-and-accept on problems small enough to list every text: it gets to π from far away, and
stays there.

The proposal is poor on purpose: a fixed distribution for each position, all but blind to the
context and to the noised tokens themselves. The noise levels are two, one of which leaves a trace
of the signal, so that every part of the ratio counts.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dia_lightning.diffusion.embedding import TokenEmbedding
from dia_lightning.diffusion.schedule import make_schedule
from dia_lightning.sampling.denoise_accept import DenoiserDrafts
from dia_lightning.sampling.ensemble import EnsembleKernel
from dia_lightning.sampling.positions import Positions, RandomTokens, Spans
from dia_lightning.sampling.state import State
from tests.oracles.enumerable import Enumerable
from tests.oracles.listed import ListedTarget

N = 20_000
DIM = 8
# V, T, seed, with an end token.
PROBLEMS = {
    "7776 texts": (6, 5, 0, False),
    "16384 texts": (4, 7, 1, False),
    "end token": (5, 6, 2, True),
}
# A factorised draw seldom is a text where the end token is in play: spans of three need six times
# the steps in one round.
MOVES: dict[str, tuple[Positions, int]] = {
    "7776 texts": (RandomTokens(3), 1),
    "16384 texts": (RandomTokens(3), 1),
    "end token": (Spans(4), 4),
}
CASES = [(name, lam) for name in PROBLEMS for lam in (0.5, 1.0, 3.0)]
# Enough to forget the first text; at λ = 3 nine of ten proposals are refused.
STEPS = {0.5: 200, 1.0: 200, 3.0: 500}


def kernel(name: str, lam: float) -> EnsembleKernel:
    problem = Enumerable(*PROBLEMS[name])
    rng = np.random.default_rng(7)
    bias = torch.from_numpy(rng.normal(size=(problem.T, problem.V))).float() * 0.5
    embedding = TokenEmbedding(torch.from_numpy(rng.normal(size=(problem.V, DIM))).float())

    def proposal(z: Tensor, t: Tensor) -> Tensor:
        return bias + 0.05 * (z @ embedding.weight.T)

    target, schedule = ListedTarget(problem, lam), make_schedule("cosine")
    positions, rounds = MOVES[name]
    drafts = DenoiserDrafts(
        proposal, embedding, schedule, positions, (0.7, 1.0), rounds, problem.end_id
    )
    return EnsembleKernel(target, drafts)


def run(step: EnsembleKernel, tokens: np.ndarray, steps: int, seed: int) -> State:
    state, generator = step.init(torch.from_numpy(tokens)), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        state, _ = step.step(state, generator)
    return state


def chi2_of_pools(problem: Enumerable, tokens: Tensor, lam: float) -> tuple[float, int]:
    """χ² of the counts against π and its degrees of freedom; likely texts alone, rare ones
    pooled until they expect ≥ 5.
    """
    expected = len(tokens) * np.exp(problem.log_pi(lam))
    counts = len(tokens) * problem.frequencies(tokens)
    order = np.argsort(expected)
    pool = np.floor(np.cumsum(expected[order]) / 10).astype(
        int
    )  # of 10 to 20 each, for what expects fewer than 10
    pool = np.where(expected[order] < 10, pool, pool.max() + 1 + np.arange(len(order)))
    _, pool = np.unique(pool, return_inverse=True)
    e, n = np.bincount(pool, expected[order]), np.bincount(pool, counts[order])
    few = e < 5  # the remainder beside the last pool: to the largest cell
    e[-1], n[-1] = e[-1] + e[few].sum(), n[-1] + n[few].sum()
    e, n = e[~few], n[~few]
    return float(((n - e) ** 2 / e).sum()), len(e) - 1


def chi2_limit(df: int, z: float = 3.09) -> float:
    """The 99.9 % quantile of χ² (Wilson and Hilferty)."""
    return df * (1 - 2 / (9 * df) + z * (2 / (9 * df)) ** 0.5) ** 3


def gets_there(name: str, lam: float, steps: int) -> None:
    """From one text in all chains: within 0.02 of what as many exact draws show."""
    step = kernel(name, lam)
    problem: Enumerable = step.target.problem  # type: ignore[union-attr]
    worst = problem.sequences[np.argmin(problem.log_pi(lam))]
    start = np.tile(worst, (N, 1))
    assert problem.total_variation(start, lam) > 0.99
    state = run(step, start, steps, seed=1)
    floor = problem.floor(N, lam, np.random.default_rng(0))
    distance = problem.total_variation(state.tokens, lam)
    print(f"{name}, λ = {lam}: {distance:.4f}, floor {floor:.4f}")
    assert distance < floor + 0.02
    torch.testing.assert_close(state.log_prob, step.target.log_prob(state.tokens))


def stays_there(name: str, lam: float, steps: int) -> None:
    """From exact draws: counts as π has them, false-alarm rate 1e-3, though most chains have
    moved.
    """
    step = kernel(name, lam)
    problem: Enumerable = step.target.problem  # type: ignore[union-attr]
    start = problem.draw(N, lam, np.random.default_rng(3))
    state = run(step, start, steps, seed=2)
    assert float((state.tokens != torch.from_numpy(start)).any(1).double().mean()) > 0.4
    chi2, df = chi2_of_pools(problem, state.tokens, lam)
    print(
        f"{name}, λ = {lam}: χ² {chi2:.0f} with {df} degrees of freedom, limit {chi2_limit(df):.0f}"
    )
    assert df > 30
    assert chi2 < chi2_limit(df)


def test_gets_to_pi_from_one_text() -> None:
    gets_there("7776 texts", 1.0, 120)


def test_stays_at_pi() -> None:
    stays_there("end token", 1.0, 20)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lam"), CASES)
def test_gets_to_pi_from_one_text_everywhere(name: str, lam: float) -> None:
    gets_there(name, lam, STEPS[lam])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lam"), CASES)
def test_stays_at_pi_everywhere(name: str, lam: float) -> None:
    stays_there(name, lam, 30)


@pytest.mark.parametrize("left_out", ["noise", "length"])
def test_a_wrong_ratio_shows(left_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The χ² above sees the density of the noise left out of the ratio, or the number of spans."""

    class Uncounted(Spans):
        def log_ratio(self, choice, tokens, proposed, prompt_mask, end_id):  # type: ignore[no-untyped-def]
            ratio = super().log_ratio(choice, tokens, proposed, prompt_mask, end_id)
            return torch.where(ratio == -torch.inf, ratio, 0.0)

    step = kernel("end token", 1.0)
    if left_out == "noise":
        monkeypatch.setattr(
            "dia_lightning.sampling.denoise_accept._log_noise",
            lambda z, mean, sigma, valid: torch.zeros(len(z), dtype=torch.float64),
        )
    else:
        step.proposal.positions = Uncounted(4)  # type: ignore[attr-defined]
    problem: Enumerable = step.target.problem  # type: ignore[union-attr]
    state = run(step, problem.draw(N, 1.0, np.random.default_rng(3)), 12, seed=2)
    chi2, df = chi2_of_pools(problem, state.tokens, 1.0)
    assert chi2 > 1.25 * chi2_limit(df)


@pytest.mark.parametrize("end", [False, True])
def test_the_oracle_by_hand(end: bool) -> None:
    """Every probability as a product of conditionals, in a loop of its own; p and π sum to 1; r
    is standardised and no sum.
    """
    problem, lam = Enumerable(3, 4, seed=0, end=end), 0.7
    rows = [
        r
        for r in itertools.product(range(3), repeat=4)
        if not end or 2 not in r or set(r[r.index(2) :]) == {2}
    ]
    assert problem.sequences.tolist() == [list(row) for row in rows]
    for row, log_p in zip(rows, problem.log_p, strict=True):
        p = problem.first[row[0]] * problem.second[row[0]][row[1]]
        for i in (2, 3):
            p *= problem.later[row[i - 2]][row[i - 1]][row[i]]
        assert log_p == pytest.approx(math.log(p))
    p = np.exp(problem.log_p)
    assert p.sum() == pytest.approx(1)
    assert [(p * problem.reward**k).sum() for k in (1, 2)] == pytest.approx([0, 1], abs=1e-12)
    weight = p * np.exp(lam * problem.reward)
    assert problem.log_z(lam) == pytest.approx(math.log(weight.sum()))
    np.testing.assert_allclose(np.exp(problem.log_pi(lam)), weight / weight.sum())
    np.testing.assert_allclose(np.exp(problem.log_pi(0.0)), p)


def test_the_reward_is_not_additive() -> None:
    """What is left of r after the best sum over positions (least squares) is a good part of its
    variance.
    """
    problem = Enumerable(4, 4, seed=0)
    one_hot = np.eye(4)[problem.sequences].reshape(len(problem.sequences), -1)
    rest = problem.reward - one_hot @ np.linalg.lstsq(one_hot, problem.reward, rcond=None)[0]
    assert rest.var() > 0.3 * problem.reward.var()


def test_the_oracle_counts() -> None:
    problem = Enumerable(3, 3, seed=1, end=True)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(
        problem.index(problem.sequences), np.arange(len(problem.sequences))
    )
    two = problem.sequences[[4, 4, 9, 4]]
    assert problem.frequencies(two)[[4, 9]].tolist() == [0.75, 0.25]
    assert problem.frequencies(two, np.array([1.0, 1.0, 6.0, 0.0]))[[4, 9]].tolist() == [0.25, 0.75]
    pi = np.exp(problem.log_pi(1.0))
    assert problem.total_variation(problem.sequences, 1.0, pi) == pytest.approx(0, abs=1e-12)
    assert problem.total_variation(problem.sequences[:1], 1.0) == pytest.approx(1 - pi[0])
    draws = [problem.total_variation(problem.draw(500, 1.0, rng), 1.0) for _ in range(40)]
    # The mean of 20 and of 40 values of standard deviation about 0.012: seven standard errors are
    # 0.023.
    assert problem.floor(500, 1.0, rng) == pytest.approx(np.mean(draws), abs=0.023)
    assert problem.draw(5, 1.0, rng).shape == (5, 3)


def test_the_oracle_refuses_what_is_no_text() -> None:
    problem = Enumerable(3, 3, seed=1, end=True)
    for wrong, said in (
        ([[0, 1]], "needed"),
        ([[0, 1, 3]], "needed"),
        ([[0, 2, 1]], "goes on after its end token 2"),
    ):
        with pytest.raises(ValueError, match=said):
            problem.index(wrong)
    with pytest.raises(ValueError, match=r"V\^T: 11\^5"):
        Enumerable(11, 5, seed=0)
